#!/usr/bin/env python3
"""How long it takes to rebuild what a killed attention worker had of a sequence, beside the prefill of that sequence.

usage: scripts/bench/recovery.py [--tokens 2000] [--rounds 3] [--workers 2] [--model smollm2-135m]

Each round starts an LLM and workers that share KV heads, on this host, times the prefill of a prompt that it has not
seen, then kills a worker with SIGKILL while a second prompt of that length decodes. The rebuild is timed from the time
when the loss was noticed and others have taken over, to the moment when the last lost token is computed again. The dead
worker is not started again: on few cores that would be measured too.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import subprocess
import sys
import time


class Moments(logging.Handler):
    """The engine's log messages, with their times."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lost = self.rebuilt = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "of lost KV are computed again, " in message:
            self.lost = time.perf_counter()
        elif message.endswith("of lost KV are computed again"):
            self.rebuilt = time.perf_counter()


def prompt(tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(10, 40000) for _ in range(tokens)]


def start_worker() -> subprocess.Popen[str]:
    """An attention worker that prints its address."""
    threads = max(1, len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "lamina_workers.attention_main", "--kv-memory", str(2 << 30)]
    return subprocess.Popen(
        [*command, "--threads", str(threads)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def one_round(model: str, tokens: int, workers: int, seed: int) -> tuple[float, float]:
    """Seconds of the prefill and of the rebuild."""
    from lamina import LLM

    moments = Moments()
    logger = logging.getLogger("lamina")
    logger.addHandler(moments)
    logger.setLevel(logging.INFO)
    processes = [start_worker() for _ in range(workers)]
    addresses = [process.stdout.readline().split()[1] for process in processes if process.stdout]
    with LLM(
        model,
        dtype="bfloat16",
        prefix_cache=False,
        attention_workers=addresses,
        local_share=0,
        lanes=1,
        query_first="never",
    ) as llm:
        llm.generate(prompt(tokens, seed), max_tokens=1, ignore_eos=True)  # warms up
        start = time.perf_counter()
        llm.generate(prompt(tokens, seed + 1), max_tokens=1, ignore_eos=True)
        prefill = time.perf_counter() - start
        for count, _ in enumerate(llm.stream(prompt(tokens, seed + 2), max_tokens=40, ignore_eos=True)):
            if count == 8:
                processes[0].kill()
    for process in processes:
        process.kill()
        process.wait()
    logger.removeHandler(moments)
    if not moments.rebuilt:
        raise SystemExit("nothing was rebuilt: the worker was not lost in time")
    return prefill, moments.rebuilt - moments.lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    times = [one_round(args.model, args.tokens, args.workers, 10 * number) for number in range(args.rounds)]
    for prefill, rebuild in times:
        print(f"prefill {prefill * 1e3:7.0f} ms   rebuild {rebuild * 1e3:7.0f} ms   {rebuild / prefill:5.2f}")
    print(f"median ratio {statistics.median(rebuild / prefill for prefill, rebuild in times):5.2f}")


if __name__ == "__main__":
    main()
