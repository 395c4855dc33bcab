#!/usr/bin/env python3
"""What streams feel while an attention worker joins, and while one is drained: the longest pause beside a usual step.

usage: scripts/bench/elastic.py [join] [drain] [--sequences 8] [--tokens 4000] [--kv 200] [--model smollm2-135m]

join: sequences of so many tokens stream over one worker; a second one joins. It prints how long the engine's thread was
busy with the switch, from there on the longest time between two tokens, and how much grows there. drain: two workers
have the sequences' heads; one of them, with about `--kv` MB of KV, is drained. The same requests run undisturbed
before, and their text is compared. Prompts share all but their ends, so that they are computed once; each sequence's KV
is read, and moved, for itself.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

OWN = 64  # tokens of a prompt that no other has
NEW = 400  # tokens that each sequence generates
AFTER = 40  # of them before something happens


class Gaps:
    """When the tokens of each stream came."""

    def __init__(self, streams: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(streams)]
        self.times: list[list[float]] = [[] for _ in range(streams)]

    def steps(self, since: float, until: float) -> list[float]:
        """The times between two tokens of one stream that end within this time, in seconds."""
        times = self.times[0]
        return [late - soon for soon, late in itertools.pairwise(times) if since < late <= until]


def worker(memory: int) -> tuple[subprocess.Popen[str], str]:
    """An attention worker of one thread, and its address."""
    command = [sys.executable, "-m", "lamina_workers.attention_main", "--kv-memory", str(memory), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if process.stdout is None:
        raise SystemExit("no output of a worker")
    return process, process.stdout.readline().split()[1]


def prompts(sequences: int, tokens: int) -> list[list[int]]:
    rng = random.Random(1)
    shared = [rng.randint(10, 40000) for _ in range(tokens - OWN)]
    return [[*shared, *(rng.randint(10, 40000) for _ in range(OWN))] for _ in range(sequences)]


def stream(llm: Any, asked: list[list[int]], happens: Callable[[], None] | None = None) -> Gaps:
    """All sequences to their ends; something may happen once each has some tokens."""
    gaps = Gaps(len(asked))
    for event in llm.stream(asked, max_tokens=NEW, ignore_eos=True, temperature=0):
        at = event.prompt_index
        gaps.tokens[at].append(event.token_id)
        gaps.times[at].append(time.perf_counter())
        if happens is not None and all(len(tokens) >= AFTER for tokens in gaps.tokens):
            happens()
            happens = None
    return gaps


def report(what: str, before: Gaps, gaps: Gaps, since: float, until: float) -> None:
    usual = statistics.median(before.steps(0, float("inf")))
    steps = gaps.steps(since, until) or [0.0]
    same = sum(a == b for a, b in zip(before.tokens, gaps.tokens, strict=True))
    print(
        f"{what}: usual step {usual * 1e3:.1f} ms, longest meanwhile {max(steps) * 1e3:.1f} ms "
        f"({max(steps) / usual:.2f} steps; second longest {sorted(steps)[-2:][0] * 1e3:.1f} ms), median then "
        f"{statistics.median(steps) * 1e3:.1f} ms; {same} of {len(gaps.tokens)} texts equal"
    )


def joins(llm: Any, address: str, asked: list[list[int]]) -> None:
    """A second worker joins while the sequences stream."""
    from lamina.deploy.worker_events import WorkerAddress
    from lamina.engine.holders import seated

    engine, pool = llm._runtime.engine, llm._runtime.pools.attention
    before = stream(llm, asked)
    busy: list[tuple[float, float]] = []
    join = engine._holders.join

    def timed(*what: Any) -> None:
        began = time.perf_counter()
        join(*what)
        busy.append((began, time.perf_counter()))

    engine._holders.join = timed

    def connect() -> None:
        port = pool._connect(WorkerAddress("second", address))
        engine.join(port, seated(pool._seat(port), port.page_layout), None)

    thread = threading.Thread(target=connect)
    gaps = stream(llm, asked, thread.start)
    thread.join()
    ((began, ended),) = busy
    report("join", before, gaps, began, began + 2.0)
    from lamina_protocols.channels.grpc_client import WorkerClient

    with WorkerClient(address, None) as client:
        stored = client.status(5.0).stored
    print(f"      the switch took the engine {(ended - began) * 1e6:.0f} us; {stored} vectors are stored there")


def drains(llm: Any, asked: list[list[int]], mib: float) -> None:
    """A worker is drained while the sequences stream."""
    engine = llm._runtime.engine
    before = stream(llm, asked)
    moved: list[tuple[float, int]] = []
    began: list[float] = []

    def drain() -> None:
        began.append(time.perf_counter())
        name = next(iter(dict.fromkeys(engine._holders.names.values())))
        done = engine.drain(name)
        done.add_done_callback(lambda future: moved.append((time.perf_counter(), future.result())))

    gaps = stream(llm, asked, drain)
    while not moved:
        time.sleep(0.05)
    ((ended, tokens),) = moved
    report(f"drain of {mib:.0f} MB", before, gaps, began[0], ended)
    print(f"      it took {ended - began[0]:.2f} s for {tokens} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=("join", "drain"), default=("join", "drain"))
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--kv", type=float, default=200.0, metavar="MB", help="at the worker that is drained")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    processes = [worker(3 << 30) for _ in range(2)]
    addresses = [address for _, address in processes]
    from lamina import LLM
    from lamina_workers.attention_worker.page_layout import page_cost

    options: dict[str, Any] = {
        "dtype": args.dtype,
        "threads": 1,
        "local_share": 0,
        "lanes": 1,
        "query_first": "never",
        "prefix_cache": True,
    }
    try:
        for what in args.what:
            used = addresses[:1] if what == "join" else addresses
            with LLM(args.model, attention_workers=used, **options) as llm:
                if what == "join":
                    joins(llm, addresses[1], prompts(args.sequences, args.tokens))
                    continue
                holder = llm._runtime.pools.attention._holder
                token = page_cost(holder) / holder.page_size * sum(spec.kv_heads for spec in holder.layers) / 2
                count = max(1, round(args.kv * 1e6 / (token * args.tokens)))
                drains(llm, prompts(count, args.tokens), count * args.tokens * token / 1e6)
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
