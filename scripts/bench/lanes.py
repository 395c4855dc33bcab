#!/usr/bin/env python3
"""Tokens/s with one and with two lanes, where the attention worker is slowed until both tiers take equally long.

usage: scripts/bench/lanes.py [--sequences 32] [--tokens 128] [--rounds 5] [--steps 24] [--model smollm2-135m]

One engine and one attention worker on this host, which sleeps in each layer for the positions that it reads, so that no
core is taken. First its sleep is set so that a batch of `--sequences` rows, alone, spends as long in attention as in
the model. Then rounds take turns, over the same running sequences:
- one batch of that size in one lane;
- two batches of that size in two lanes: twice the sequences. Ideal is 2 of the first, published is 1.90 (KernelFlume);
- the same sequences as the second in one lane, as one batch of twice the size. Where dense layers are bound by reading
  weights this gains too, without lanes, and two lanes over it are at most 1.5.
Asked: two lanes give 1.6 times the first.
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
from typing import Any, NamedTuple

from local_share import Stream
from move import start_worker

from lamina.messages.snapshot import Snapshot
from lamina.scheduling.lane_tuner import LaneTuner
from lamina.system.machine import this_machine

CLOSE = 0.1  # of the model's time, by which attention may be off before the sleep is set anew
TRIES = 4


class Rate(NamedTuple):
    """Of some steps: tokens a second, and ms in the model and in attention for each batch."""

    tokens: float
    model: float
    attention: float


def look(engine: Any) -> Snapshot:
    """The engine's counters between two batches."""
    seen: queue.SimpleQueue[Snapshot] = queue.SimpleQueue()
    engine.snapshot(seen.put)
    return seen.get(timeout=60)


def measure(llm: Any, lanes: int, steps: int) -> Rate:
    """`steps` batches a lane, after as many lanes are in use."""
    engine = llm._runtime.engine  # a benchmark may look inside
    engine._control.lanes = LaneTuner(lanes)
    settle(engine, 4 * lanes)
    first = look(engine)
    last = settle(engine, steps * lanes)
    batches = last.batches - first.batches
    return Rate(
        (last.generation_tokens - first.generation_tokens) / (last.uptime - first.uptime),
        (last.model_seconds - first.model_seconds) / batches * 1e3,
        (last.attention_seconds - first.attention_seconds) / batches * 1e3,
    )


def settle(engine: Any, batches: int) -> Snapshot:
    """The counters once that many batches more are complete."""
    until = look(engine).batches + batches
    while (seen := look(engine)).batches < until:
        pass  # each look waits for the end of a batch
    return seen


def balanced(args: argparse.Namespace, options: dict[str, Any]) -> float:
    """The worker's sleep, in seconds for each million positions in a layer, with which a batch is as long in attention
    as in the model."""
    from lamina import LLM

    delay, unslowed = 0.0, 0.0
    for number in range(TRIES):
        worker, address = start_worker("--read-delay", str(delay))
        with LLM(args.model, attention_workers=[address], **options) as llm:
            stream = Stream(llm, args.sequences, args.tokens, 0)
            rate = measure(llm, 1, args.steps)
            stream.end()
            layers = len(llm._runtime.engine._worker._merge._config.layers)  # type: ignore[union-attr]
        worker.terminate()
        worker.wait()
        print(
            f"a sleep of {delay:.3g} s a million positions: model {rate.model:.1f} ms, attention {rate.attention:.1f}"
        )
        if rate.attention >= (1 - CLOSE) * rate.model and (not delay or rate.attention <= (1 + CLOSE) * rate.model):
            break
        if number == 0:
            unslowed = rate.attention
            positions = args.sequences * (args.tokens + args.steps / 2)
            delay = (rate.model - rate.attention) / 1e3 / layers / positions * 1e6
        elif rate.attention > unslowed:  # in proportion: a sleep takes longer than it says
            delay *= max(0.1, (rate.model - unslowed) / (rate.attention - unslowed))
    return delay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32, help="of a batch in its lane")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--delay", type=float, help="the worker's sleep, instead of one that is found")
    args = parser.parse_args()
    from lamina import LLM

    options: dict[str, Any] = {
        "prefix_cache": False,
        "lanes": 1,
        "kv_memory": "2GiB",
        "local_share": 0,
        "query_first": "never",
    }
    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores, load {os.getloadavg()[0]:.1f}; {args.model}")
    delay = balanced(args, options) if args.delay is None else args.delay
    worker, address = start_worker("--read-delay", str(delay))
    kinds = {"one lane": (1, 1), "two lanes": (2, 2), "one lane, both batches as one": (1, 2)}
    found: dict[str, list[Rate]] = {name: [] for name in kinds}
    with LLM(args.model, attention_workers=[address], **options) as llm:
        for number in range(args.rounds):
            streams = [Stream(llm, args.sequences, args.tokens, 2 * number)]
            for name, (lanes, batches) in kinds.items():
                if len(streams) < batches:
                    streams.append(Stream(llm, args.sequences, args.tokens, 2 * number + 1))
                found[name].append(measure(llm, lanes, args.steps))
            llm._runtime.engine._control.lanes = LaneTuner(1)  # type: ignore[union-attr]
            for stream in streams:
                stream.end()
    worker.terminate()
    worker.wait()
    print(f"batches of {args.sequences} sequences of {args.tokens} tokens; medians of {args.rounds} rounds")
    base = found["one lane"]
    for name, rates in found.items():
        ratios = [one.tokens / other.tokens for one, other in zip(rates, base, strict=True)]
        print(
            f"{name:30} {statistics.median(one.tokens for one in rates):8.1f} tokens/s   "
            f"{statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f}) of one lane   "
            f"a batch: model {statistics.median(one.model for one in rates):6.1f} ms, "
            f"attention {statistics.median(one.attention for one in rates):6.1f} ms"
        )


if __name__ == "__main__":
    main()
