#!/usr/bin/env python3
"""How fast a running sequence moves between the engine's process and an attention worker, and what others notice.

usage: scripts/bench/move.py [--tokens 4000] [--streams 4] [--rounds 5] [--model smollm2-135m]

One long sequence moves back and forth while short ones decode beside it. Printed for each direction: bytes of KV a
second while KV is copied, beside what the same kind of channel carries bare (frames of the same size from process to
process, nothing made of them), measured in turns with it; how long the move took from beginning to end; and the longest
gap between two tokens of a running stream meanwhile, in steps of the same load without a move.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lamina
from lamina_workers.devices.openmp import share_cores

share_cores()  # before torch is imported

from lamina_protocols.channels.channels import Channel, ChannelClosed  # noqa: E402
from lamina_protocols.channels.sockets import Listener, connect_unix, listen_unix  # noqa: E402
from lamina_protocols.frames import codec  # noqa: E402
from lamina_protocols.messages.messages import Query  # noqa: E402

SECRET = bytes(32)


def swallow(path: str) -> None:
    """The other end of the bare channel: answers each small frame, drops the others, until stdin closes."""

    def serve(channel: Channel) -> None:
        try:
            while True:
                frame = channel.receive()
                if len(frame) < 1000:
                    channel.send([frame])
        except ChannelClosed:
            channel.close()

    def deliver(channel: Channel, _: bytes) -> None:
        threading.Thread(target=serve, args=(channel,), daemon=True).start()

    Listener(listen_unix(path), SECRET.__eq__, deliver)
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


def bare(channel: Channel, size: int, count: int, different: bool) -> float:
    """Bytes a second of `count` frames of `size` bytes, which all lie in different memory, or are all the same."""
    import torch

    numbers = torch.ones(count if different else 1, size // 256, 64)
    frames = [codec.encode(Query(0, 0, 0, each)) for each in numbers]
    small = codec.encode(Query(0, 0, 0, torch.zeros(1, 1)))
    start = time.perf_counter()
    for number in range(count):
        channel.send(frames[number % len(frames)])
    channel.send(small)
    channel.receive(60)
    return size * count / (time.perf_counter() - start)


def start_worker(*flags: str) -> tuple[subprocess.Popen[str], str]:
    """An attention worker on this host, and its address."""
    threads = max(1, len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "lamina_workers.attention_main", "--kv-memory", str(2 << 30), *flags]
    process = subprocess.Popen(
        [*command, "--threads", str(threads)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    line = process.stdout.readline() if process.stdout else ""
    return process, line.split()[1]


class Gaps:
    """When tokens come, on a thread of its own."""

    def __init__(self, llm: object, prompts: list[list[int]], tokens: int) -> None:
        self.times: list[list[float]] = [[] for _ in prompts]
        self._enough = threading.Event()
        self._run = threading.Thread(target=self._read, args=(llm, prompts, tokens), daemon=True)
        self._run.start()

    def _read(self, llm: object, prompts: list[list[int]], tokens: int) -> None:
        for event in llm.stream(prompts, max_tokens=tokens, temperature=0, ignore_eos=True):  # type: ignore[attr-defined]
            self.times[event.prompt_index].append(time.perf_counter())
            if self._enough.is_set():
                return

    def running(self) -> bool:
        return all(self.times)

    def between(self, start: float, end: float) -> list[float]:
        """Gaps between tokens of every stream that overlap with that time."""
        return [
            later - sooner
            for times in self.times
            for sooner, later in itertools.pairwise(times)
            if later >= start and sooner <= end
        ]

    def stop(self) -> None:
        self._enough.set()
        self._run.join()


def timed(mover: Any) -> list[float]:
    """The seconds that the mover's steps take from now on, summed in place."""
    seconds, step = [0.0], mover.step

    def measured(*arguments: Any, **options: Any) -> None:
        start = time.perf_counter()
        step(*arguments, **options)
        seconds[0] += time.perf_counter() - start

    mover.step = measured
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--swallow", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.swallow:
        swallow(args.swallow)
    rng = random.Random(0)
    process, address = start_worker()
    folder = tempfile.TemporaryDirectory(prefix="lamina-bench-")
    path = str(Path(folder.name) / "bare")
    command = [sys.executable, __file__, "--swallow", path]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if other.stdout:
        other.stdout.readline()
    channel = connect_unix(path, SECRET, 10.0)
    options = {
        "attention_workers": [address],
        "prefix_cache": False,
        "lanes": 1,
        "kv_memory": "3GiB",
        "query_first": "never",
    }
    found: dict[str, list[tuple[float, float, float, float, float]]] = {"to the worker": [], "from the worker": []}
    with lamina.LLM(args.model, local_share=1.0, **options) as llm:
        engine = llm._runtime.engine  # type: ignore[union-attr]  # a benchmark may look inside
        holder = engine._worker._merge._config
        token = sum(spec.kv_heads * (spec.d_k + spec.d_v) for spec in holder.layers)
        token *= 2 if holder.dtype in ("bfloat16", "float16") else 4
        layers = len(holder.layers)
        mover, tuner = engine._tiering._migration, engine._control.tuner
        prompts = [[rng.randint(10, 40000) for _ in range(64)] for _ in range(args.streams)]
        prompts.append([rng.randint(10, 40000) for _ in range(args.tokens)])
        gaps = Gaps(llm, prompts, 200 + 160 * args.rounds)
        copying = timed(mover)
        while not gaps.running():
            time.sleep(0.01)
        for number in range(2 * args.rounds):
            carried, read = (
                bare(channel, 1024 * token // layers, 4 * layers, different) for different in (False, True)
            )
            time.sleep(1.0)
            now = time.perf_counter()
            step = statistics.median(gaps.between(now - 0.8, now))
            before, at, start = mover.tokens, copying[0], time.perf_counter()
            tuner.share = float(number % 2)  # 0: all to the worker
            while not engine._tiering.busy and mover.tokens == before:
                time.sleep(0.001)
            while engine._tiering.busy or abs(engine._tiering.local_share - tuner.share) > 0.01:
                time.sleep(0.001)
            end = time.perf_counter()
            time.sleep(0.2)
            rate = (mover.tokens - before) * token / (copying[0] - at)
            pause = max(gaps.between(start, end)) / step
            name = "from the worker" if number % 2 else "to the worker"
            found[name].append((rate, carried, read, end - start, pause))
        gaps.stop()
    process.terminate()
    process.wait()
    other.terminate()
    other.wait()
    print(f"{args.tokens} tokens of {token / 1e3:.0f} kB, {args.streams} streams beside it, medians of {args.rounds}")
    for name, rounds in found.items():
        rate, carried, read, took, pause = (statistics.median(column) for column in zip(*rounds, strict=True))
        share, of_read = (statistics.median(one[0] / one[at] for one in rounds) for at in (1, 2))
        worst = max(one[4] for one in rounds)
        print(
            f"{name:16} {rate / 1e6:6.0f} MB/s of {carried / 1e6:6.0f} bare = {share:4.0%} (asked: 50%), "
            f"of {read / 1e6:6.0f} from memory = {of_read:4.0%}   "
            f"{took:5.2f} s in all   longest pause {pause:.2f} steps, at most {worst:.2f} (asked: 2)"
        )


if __name__ == "__main__":
    main()
