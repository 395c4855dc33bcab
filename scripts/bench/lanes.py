#!/usr/bin/env python3
"""Tokens/s with one and with two lanes, where the attention worker is slowed until both tiers take equally long.

usage: scripts/bench/lanes.py [--sequences 32] [--tokens 128] [--rounds 5] [--steps 24] [--model smollm2-135m] [--apart]

One engine and one attention worker on this host, which sleeps in each layer for the positions that it reads, so that no
core is taken. First its sleep is set so that a batch of `--sequences` rows, alone, spends as long in attention as in
the model. Then rounds take turns:
- one batch of that size in one lane;
- two batches of that size in two lanes: twice the sequences. Ideal is 2 of the first, published is 1.90 (KernelFlume);
- the sequences of the second in one lane, as one batch of twice the size. Where dense layers are bound by reading
  weights this gains too, without lanes.
Each begins with new sequences of the same length, since the sleep grows with what is read. Asked: two lanes give 1.6
times the first.

Both tiers work on the same cores, so two lanes cannot be faster than the work of both allows. That limit stands beside
the ratio: the step of one lane over the longest of its time in the model, its time in attention, and the processor time
of both processes by cores. With `--apart` each tier has a half of the cores for itself, as two machines would, but
that memory is shared.
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
import time
from typing import Any, NamedTuple

from cpu_time import cpu_seconds
from local_share import Stream
from move import start_worker

from lamina.messages.snapshot import Snapshot
from lamina.scheduling.step_tuner import StepTuner
from lamina.system.machine import this_machine

CLOSE = 0.1  # of the model's time, by which attention may be off before the sleep is set anew
TRIES = 4
LOOKS = 0.05  # seconds between two looks at the counters


class Rate(NamedTuple):
    """Of some steps: tokens a second; and for each batch ms until the next is over, in the model and in attention, and
    ms of processor time of the engine and of the worker."""

    tokens: float
    step: float
    model: float
    attention: float
    engine: float
    worker: float

    def limit(self, cores: int) -> float:
        """How many times the rate two lanes can reach at most, if this is that of one."""
        return self.step / max(self.model, self.attention, (self.engine + self.worker) / cores)


def look(engine: Any) -> Snapshot:
    """The engine's counters between two batches."""
    seen: queue.SimpleQueue[Snapshot] = queue.SimpleQueue()
    engine.snapshot(seen.put)
    return seen.get(timeout=60)


def measure(llm: Any, worker: int, lanes: int, prompts: tuple[int, int, int], steps: int) -> Rate:
    """`steps` batches a lane of new sequences. worker: its process; prompts: how many, of how many tokens, a seed."""
    engine = llm._runtime.engine  # a benchmark may look inside
    engine._control.tuner = StepTuner((lanes,), 0.0)
    stream = Stream(llm, *prompts)
    settle(engine, 4 * lanes)
    used = time.process_time(), cpu_seconds(worker)
    first = look(engine)
    last = settle(engine, steps * lanes)
    own, its = time.process_time() - used[0], cpu_seconds(worker) - used[1]
    stream.end()
    batches = last.batches - first.batches
    spans = (
        last.uptime - first.uptime,
        last.model_seconds - first.model_seconds,
        last.attention_seconds - first.attention_seconds,
        own,
        its,
    )
    tokens = last.generation_tokens - first.generation_tokens
    return Rate(tokens / spans[0], *(seconds / batches * 1e3 for seconds in spans))


def settle(engine: Any, batches: int) -> Snapshot:
    """The counters once that many batches more are complete."""
    until = look(engine).batches + batches
    while (seen := look(engine)).batches < until:
        time.sleep(
            LOOKS
        )  # the engine answers between layers where several lanes are in use, and each answer takes it time
    return seen


def begin_worker(delay: float, cores: set[int]) -> tuple[Any, str]:
    """An attention worker on these cores that sleeps so long, and its address."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        return start_worker("--read-delay", str(delay))
    finally:
        os.sched_setaffinity(0, own)


def balanced(args: argparse.Namespace, options: dict[str, Any], cores: set[int]) -> float:
    """The sleep of a worker on these cores, in seconds for each million positions in a layer, with which a batch is as
    long in attention as in the model."""
    from lamina import LLM

    delay, unslowed = 0.0, 0.0
    for number in range(TRIES):
        worker, address = begin_worker(delay, cores)
        with LLM(args.model, attention_workers=[address], **options) as llm:
            rate = measure(llm, worker.pid, 1, (args.sequences, args.tokens, 0), args.steps)
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
    parser.add_argument("--apart", action="store_true", help="a half of the cores for each tier")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    theirs = set(cores)
    if args.apart:
        if len(cores) < 2:
            raise SystemExit("two tiers apart need two cores")
        theirs = set(cores[len(cores) // 2 :])
        os.sched_setaffinity(0, set(cores) - theirs)
        os.environ["OMP_NUM_THREADS"] = str(len(cores) - len(theirs))
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
    delay = balanced(args, options, theirs) if args.delay is None else args.delay
    worker, address = begin_worker(delay, theirs)
    kinds = {"one lane": (1, 1), "two lanes": (2, 2), "one lane, both batches as one": (1, 2)}
    found: dict[str, list[Rate]] = {name: [] for name in kinds}
    with LLM(args.model, attention_workers=[address], **options) as llm:
        for number in range(args.rounds):
            for name, (lanes, batches) in kinds.items():
                prompts = batches * args.sequences, args.tokens, number
                found[name].append(measure(llm, worker.pid, lanes, prompts, args.steps))
    worker.terminate()
    worker.wait()
    print(f"batches of {args.sequences} sequences of {args.tokens} tokens; medians of {args.rounds} rounds")
    base = found["one lane"]
    for name, rates in found.items():
        ratios = [one.tokens / other.tokens for one, other in zip(rates, base, strict=True)]
        middle = Rate(*map(statistics.median, zip(*rates, strict=True)))
        print(
            f"{name:30} {middle.tokens:7.1f} tokens/s, {statistics.median(ratios):.2f} ({min(ratios):.2f}-"
            f"{max(ratios):.2f}) of one lane; a batch: step {middle.step:.1f} ms, model {middle.model:.1f}, attention "
            f"{middle.attention:.1f}; processor time {middle.engine:.1f} + {middle.worker:.1f} ms"
        )
    print(f"two lanes can reach {statistics.median(rate.limit(machine.cores) for rate in base):.2f} at most")


if __name__ == "__main__":
    main()
