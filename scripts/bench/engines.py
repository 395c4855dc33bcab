#!/usr/bin/env python3
"""The engines that decode.py measures, each as a process of its own: this file's child side, and the parent's `Child`.

A child says how many bytes of memory its libraries take before the model is loaded, and then reads requests, a JSON
line each, and answers each with a JSON line. A peer's Python runs this file too, so nothing of Lamina is imported
before an engine of it is asked for. It measures any commit: where the Lamina that is
imported has no statistic of announcements yet, that figure is absent.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from cpu_time import children, cpu_seconds
from json_child import JsonChild
from peers import LIBRARIES, PEERS, Answer, Decoded, Options, Run, Times, cores

KV_MEMORY = 4 << 30  # bytes of an attention worker that is started here


class Request(NamedTuple):
    """`batch` prompts of `context` random tokens, `tokens` new ones each. Equal seeds give equal prompts."""

    batch: int
    context: int
    tokens: int
    seed: int


# Lamina.


class Mark(NamedTuple):
    """The counters of an engine at one moment between two batches."""

    tokens: int
    cpu: float
    workers_cpu: float
    plan: float | None
    announce: float | None


def mark(snapshot: Any) -> Mark:
    """Counters now, on the engine's thread."""
    workers = sum(cpu_seconds(pid) for pid in children(os.getpid()))
    plan, announce = (getattr(snapshot, name, None) for name in ("plan_seconds", "announce_seconds"))
    return Mark(snapshot.generation_tokens, time.process_time(), workers, plan, announce)


def between(first: Mark, last: Mark, batch: int) -> Decoded | None:
    """What was counted from one mark to the other; None where no token came."""
    steps = (last.tokens - first.tokens) / batch
    if not steps:
        return None
    plan, announce = (
        None if a is None or b is None else b - a for a, b in ((first.plan, last.plan), (first.announce, last.announce))
    )
    return Decoded(steps, last.cpu - first.cpu, last.workers_cpu - first.workers_cpu, plan, announce)


def lamina(model: str, options: Options, **config: Any) -> Run:
    """Lamina, with weights in bfloat16 and without attention workers unless `config` says other things."""
    from lamina import LLM
    from lamina.config import EngineConfig

    if hasattr(EngineConfig, "query_first"):
        config["query_first"] = options.query_first
    if hasattr(EngineConfig, "weights"):
        config.setdefault("weights", "bfloat16")
    else:
        config["dtype"] = "bfloat16"
    llm = LLM(model, prefix_cache=options.keep, **config)

    def run(ids: list[list[int]], n: int) -> Answer:
        times: Times = [[] for _ in ids]
        marks: queue.SimpleQueue[Mark] = queue.SimpleQueue()
        engine: Any = llm._runtime.engine  # a benchmark may look inside
        begun = asked = 0
        for event in llm.stream(ids, max_tokens=n, ignore_eos=True, temperature=0):
            own = times[event.prompt_index]
            own.append(time.perf_counter())
            begun += len(own) == 1
            # Once when the last sequence has begun, once shortly before the first one ends.
            if (asked == 0 and begun == len(ids)) or (asked == 1 and len(own) == n - 4):
                engine.snapshot(lambda snapshot: marks.put(mark(snapshot)))
                asked += 1
        decoded = between(marks.get(timeout=10), marks.get(timeout=10), len(ids)) if asked == 2 else None
        return Answer(times, decoded)

    return run


def packed(model: str, options: Options) -> Run:
    """Lamina with the weights packed as in the model's file."""
    return lamina(model, options, weights="packed")


def over(**config: Any) -> Callable[[str, Options], Run]:
    """Lamina with attention workers that it starts itself, and all KV there."""

    def make(model: str, options: Options) -> Run:
        return lamina(model, options, attention_workers=options.attention_workers, **split(options), **config)

    return make


def over_tls(model: str, options: Options) -> Run:
    """Lamina with attention workers over TCP with TLS, by a certificate authority that is made for the run."""
    from lamina_workers.process.credentials import make_credentials

    folder = Path(KEPT.enter_context(tempfile.TemporaryDirectory(prefix="bench-tls-")))
    make_credentials(folder, ["127.0.0.1"])
    secrets = ["--tls-dir", str(folder), "--token-file", str(folder / "token")]
    addresses = [start_worker(*secrets) for _ in range(options.attention_workers)]
    config = {"tls_dir": folder, "token_file": folder / "token", "local_channel": False, "data_channel": "tcp"}
    return lamina(model, options, attention_workers=addresses, **split(options), **config)


def split(options: Options) -> dict[str, Any]:
    """The settings of every engine with attention workers."""
    return {"local_share": 0, "lanes": options.lanes or "auto", "shard": options.shard}


def start_worker(*flags: str, command: Sequence[str] = ("-m", "lamina_workers.attention_main")) -> str:
    """The address of an attention worker that is started here, and ends with this process. `command`: what Python
    runs."""
    flags = ("--kv-memory", str(KV_MEMORY), "--threads", str(cores()), "--die-with-parent", *flags)
    process = subprocess.Popen(
        [sys.executable, *command, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    line = process.stdout.readline() if process.stdout else ""
    if not line.startswith("listening "):
        raise SystemExit(f"an attention worker ended with status {process.wait()}")
    KEPT.callback(process.terminate)
    return line.split()[1]


KEPT = ExitStack()  # what an engine needs until this process ends


def bandwidth(_model: str, _options: Options) -> Run:
    """No engine: reads a GiB several times, once the threads of the engine before have stopped spinning."""
    import torch

    data = torch.ones(1 << 28)

    def run(_ids: list[list[int]], _n: int) -> Answer:
        time.sleep(0.5)
        times = [time.perf_counter()]
        for _ in range(9):
            data.sum()
            times.append(time.perf_counter())
        return Answer([times])

    return run


ENGINES: dict[str, Callable[[str, Options], Run]] = {
    "lamina": lamina,
    "local": over(),
    "tcp": over(local_channel=False, data_channel="tcp"),
    "grpc": over(local_channel=False),
    "tls": over_tls,
    "bfloat16": lamina,
    "packed": packed,
    "packed-local": over(weights="packed"),
    **PEERS,
    "bandwidth": bandwidth,
}


class Resident(NamedTuple):
    """Bytes of memory of a process and those that it has started, mapped files included: now, and at most so far."""

    now: int
    peak: int


def resident(pid: int) -> Resident:
    """What a process of this host has in memory."""
    now = peak = 0
    for each in (pid, *children(pid)):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{each}/status").read_text().splitlines())
        now += int(status["VmRSS"].split()[0]) << 10
        peak += int(status["VmHWM"].split()[0]) << 10
    return Resident(now, peak)


def prompts(batch: int, context: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(10, 40000) for _ in range(context)] for _ in range(batch)]


class Child(JsonChild):
    """One engine in its own process. `tree`: the checkout whose Lamina it measures, None for the one that is there;
    `script`: what has the engine, and calls `main`. `libraries`: bytes of memory before the model was loaded."""

    def __init__(
        self,
        engine: str,
        python: str,
        model: str,
        options: Options,
        tree: str | None = None,
        log: str = os.devnull,
        script: str = __file__,
    ) -> None:
        environment = dict(os.environ)
        if tree is not None:
            rooms = (Path(tree, room) for room in ("", "workers", "kernels", "protocols"))
            environment["PYTHONPATH"] = os.pathsep.join(map(str, rooms))
        command = [python, script, engine, "--model", model, "--options", json.dumps(options)]
        super().__init__(engine, command, log, environment, first=options.first)
        self.libraries = int(self.line())
        self.ready()

    def run(self, request: Request) -> Answer:
        """Have the engine serve a request, and wait for the answer."""
        times, decoded = json.loads(self.ask(request))
        return Answer(times, decoded and Decoded(*decoded))


def main(argv: Sequence[str] | None = None) -> None:
    """The child: serve requests until stdin closes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--options", type=json.loads, default=Options(), help="a JSON list of the fields of Options")
    args = parser.parse_args(argv)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print, those in C++ too
    for library in LIBRARIES.get(args.engine, ("torch", "lamina.launch.builder")):
        importlib.import_module(library)
    print(resident(os.getpid()).now, file=answers, flush=True)
    with KEPT:
        run = ENGINES[args.engine](args.model, Options(*args.options))
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            request = Request(*json.loads(line))
            ids = prompts(request.batch, request.context, request.seed)
            start = time.perf_counter()
            answer = run(ids, request.tokens)
            times = [[at - start for at in own] for own in answer.times]
            print(json.dumps([times, answer.decoded]), file=answers, flush=True)


if __name__ == "__main__":
    main()
