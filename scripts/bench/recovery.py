#!/usr/bin/env python3
"""What the loss of attention workers costs sequences that decode, with and without redundancy, beside their prefill.

usage: scripts/bench/recovery.py [--redundancy none,replica,parity] [--kills 1] [--sequences 8] [--tokens 2000]
           [--workers 3] [--rounds 3] [--model smollm2-135m] [--throughput TOKENS]

Each round starts an LLM and workers that share KV heads, on this host, and times the prefill of prompts that it has not
seen. Once these decode, and their KV has its spares, workers are killed with SIGKILL, all at once. Two times are
printed: from the kill, and from when the loss was noticed, until the next token of every sequence; the second is
divided by the prefill. Dead workers are not started again: on few cores that would be measured too.

With --throughput nothing is killed: so many tokens of each sequence are decoded, with redundancy "none" and each other
one in turn, and the tokens a second are compared, while the spares of the prompts are copied and afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

CORES = max(1, len(os.sched_getaffinity(0)))


class Noticed(logging.Handler):
    """When the engine has noticed a loss, and others have taken over."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.at, self.said = 0.0, ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "of lost KV are computed again, " in message:
            self.at, self.said = time.perf_counter(), message


def prompts(sequences: int, tokens: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(10, 40000) for _ in range(tokens)] for _ in range(sequences)]


@contextlib.contextmanager
def started(args: argparse.Namespace, redundancy: str) -> Iterator[tuple[Any, list[subprocess.Popen[str]]]]:
    """An LLM, and the processes of its attention workers, which print their addresses. More than three of them have one
    thread each: here they share the cores of one machine."""
    from lamina import LLM

    threads = CORES if args.workers <= 3 else 1
    command = [sys.executable, "-m", "lamina_workers.attention_main", "--kv-memory", str(1 << 30)]
    processes = [
        subprocess.Popen(
            [*command, "--threads", str(threads)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(args.workers)
    ]
    try:
        addresses = [process.stdout.readline().split()[1] for process in processes if process.stdout]
        options = {"dtype": "bfloat16", "prefix_cache": False, "local_share": 0, "lanes": 1, "query_first": "never"}
        with LLM(args.model, attention_workers=addresses, redundancy=redundancy, **options) as llm:
            llm.generate(prompts(1, args.tokens, 0)[0], max_tokens=1, ignore_eos=True)  # warms up
            yield llm, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def protected(llm: Any) -> float:
    """The share of the KV that has its spares."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    llm._runtime.engine.snapshot(answers.put)
    return float(answers.get(timeout=60).kv_redundant)


def loss(args: argparse.Namespace, redundancy: str, seed: int) -> tuple[float, float, float]:
    """Seconds of the prefill, from the kill until each sequence has its next token, and of that once it was noticed."""
    noticed = Noticed()
    logging.getLogger("lamina").addHandler(noticed)
    with started(args, redundancy) as (llm, processes):
        waiting = set(range(args.sequences))
        begun, prefill, killed, done = time.perf_counter(), 0.0, 0.0, 0.0
        for event in llm.stream(prompts(args.sequences, args.tokens, seed), max_tokens=1500, ignore_eos=True):
            now = time.perf_counter()
            if killed and (noticed.at < killed or now < noticed.at):
                continue  # a token of before the loss
            waiting.discard(event.prompt_index)
            if waiting:
                continue
            if killed:
                done = now
                break
            prefill = prefill or now - begun
            waiting = set(range(args.sequences))
            if redundancy == "none" or protected(llm) > 0.95:
                for process in processes[: args.kills]:
                    process.kill()
                killed = time.perf_counter()
    logging.getLogger("lamina").removeHandler(noticed)
    if not done or noticed.at < killed:
        raise SystemExit("the loss was not noticed in time, or there were no spares")
    print(f"  {noticed.said}", flush=True)
    return prefill, done - killed, done - noticed.at


def throughput(args: argparse.Namespace, redundancy: str, seed: int) -> tuple[float, float]:
    """Tokens a second of decode, and the share of the KV that had its spares halfway."""
    with started(args, redundancy) as (llm, _):
        waiting, first, count, share = set(range(args.sequences)), 0.0, 0, 0.0
        asked = prompts(args.sequences, args.tokens, seed)
        for event in llm.stream(asked, max_tokens=args.throughput, ignore_eos=True):
            waiting.discard(event.prompt_index)
            if not waiting:
                first, count = first or time.perf_counter(), count + 1
            if count == args.sequences * args.throughput // 2:
                share = protected(llm)
        return count / (time.perf_counter() - first), share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redundancy", default="none,replica,parity")
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--throughput", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    kinds = args.redundancy.split(",")
    if args.throughput:
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(args.rounds):
            for kind in kinds:
                rate, share = throughput(args, kind, 1 + number)
                rates[kind].append(rate)
                print(f"{kind:12} {rate:7.1f} tokens/s   {100 * share:3.0f}% has spares halfway", flush=True)
        for kind in kinds[1:]:
            ratios = [on / off for on, off in zip(rates[kind], rates[kinds[0]], strict=True)]
            print(f"{kind} / {kinds[0]}: {statistics.median(ratios):.3f}")
        return
    for kind in kinds:
        ratios = []
        for number in range(args.rounds):
            prefill, whole, since = loss(args, kind, 1 + number)
            ratios.append(since / prefill)
            print(
                f"{kind:12} prefill {prefill * 1e3:6.0f} ms   next tokens {whole * 1e3:6.0f} ms after the kill, "
                f"{since * 1e3:6.0f} ms after it was noticed, {ratios[-1]:5.2f} of the prefill",
                flush=True,
            )
        print(f"{kind}: median {statistics.median(ratios):.2f}", flush=True)


if __name__ == "__main__":
    main()
