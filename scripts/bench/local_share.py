#!/usr/bin/env python3
"""Steps at fixed shares of local attention and at the share that is chosen by measurement, over tiers of unlike speed.

usage: scripts/bench/local_share.py [--sequences 8] [--tokens 1024] [--rounds 5] [--steps 24] [--model smollm2-135m]

One engine and one attention worker on this host. Three cases: even; the worker's reading slowed 3x; the local reading
slowed 3x (by sleeping, so that no core is taken). In each round of each case the shares 0, 0.25, 0.5, 0.75, 1 and auto
are measured in turns over the same running sequences, in an order that changes from round to round. Printed: medians
of a step; auto against the best fixed share (asked: within 5 %) and against all local (asked: no more than 3 % slower);
and how many steps auto takes to settle after the delays have changed under it (asked: 50 at most).
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from move import start_worker

from lamina.scheduling.step_tuner import MeasuredBatch, StepTuner

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SLOWER = 3.0


class Watched(StepTuner):
    """A `StepTuner` of one lane that records the batches it gets, and its share after each."""

    def __init__(self, share: float | None) -> None:
        super().__init__(share=share)
        self.seen: list[tuple[MeasuredBatch, bool, float, bool]] = []

    def completed(self, batch: MeasuredBatch, moving: bool = False) -> None:
        super().completed(batch, moving)
        self.seen.append((batch, moving, self.share, self.settled))

    def quiet(self) -> list[MeasuredBatch]:
        """The batches of the last stretch in which nothing moved, without its first two."""
        still = list(itertools.takewhile(lambda one: not one[1], reversed(self.seen)))
        return [batch for batch, *_ in still[:-2]]


@dataclass
class Rig:
    """An engine, its worker's process, and the tiers that are slowed now."""

    llm: Any
    worker: Any
    local_delay: float
    slowed: set[str] = field(default_factory=set)

    @property
    def control(self) -> Any:
        return self.llm._runtime.engine._control  # a benchmark may look inside

    def slow(self, who: set[str]) -> None:
        """Slow exactly these of "worker" and "local"."""
        from lamina_workers.attention_worker.attention_worker import AttentionWorker

        if ("worker" in who) != ("worker" in self.slowed):
            self.worker.send_signal(signal.SIGUSR1)
        AttentionWorker.read_delay = self.local_delay if "local" in who else 0.0
        self.slowed = set(who)

    def measure(self, share: float | None, steps: int, most: int = 400) -> tuple[Watched, list[MeasuredBatch]]:
        """Want that share (None: auto) until `steps` batches have run there, undisturbed."""
        tuner = self.control.tuner = Watched(share)
        until(lambda: (tuner.settled and len(tuner.quiet()) >= steps) or len(tuner.seen) >= most)
        return tuner, tuner.quiet()[-steps:]


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing came of it for {seconds:g} s")
        time.sleep(0.005)


def step(batches: list[MeasuredBatch]) -> float:
    """Milliseconds of a step."""
    return statistics.median(batch.seconds for batch in batches) * 1e3


class Stream:
    """Sequences that decode until `end`."""

    def __init__(self, llm: Any, sequences: int, tokens: int, seed: int) -> None:
        rng = random.Random(seed)
        self._prompts = [[rng.randint(10, 40000) for _ in range(tokens)] for _ in range(sequences)]
        self._llm, self._over = llm, False
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._started.wait()

    def _run(self) -> None:
        begun = set()
        for event in self._llm.stream(self._prompts, max_tokens=2500, temperature=0, ignore_eos=True):
            begun.add(event.prompt_index)
            if len(begun) == len(self._prompts):
                self._started.set()
            if self._over:
                return

    def end(self) -> None:
        self._over = True
        self._thread.join()


def delays(llm: Any, worker: Any, args: argparse.Namespace) -> tuple[float, float]:
    """What makes reading `SLOWER` times as slow: seconds for each million positions in a layer, here and there."""
    rig = Rig(llm, worker, 0.0)
    stream = Stream(llm, args.sequences, args.tokens, 0)
    layers = len(llm._runtime.engine._worker._merge._config.layers)
    _, here = rig.measure(1.0, args.steps)
    _, there = rig.measure(0.0, args.steps)
    stream.end()
    local = statistics.median(batch.local_seconds / batch.local_tokens for batch in here)
    remote = statistics.median(batch.remote_seconds / batch.remote_tokens for batch in there)
    print(f"reading a token of KV takes {local * 1e6:.2f} us here, {remote * 1e6:.2f} us at the worker")
    return ((SLOWER - 1) * local / layers * 1e6, (SLOWER - 1) * remote / layers * 1e6)


def settled_after(tuner: Watched, change: int) -> tuple[int, int]:
    """Steps from a change until the search that it caused was over and nothing moved (none, where none began), and how
    many searches began after that, before the change after it: of those the machine is the cause, or chance."""
    still = [settled and not moving for _, moving, _, settled in tuner.seen[change:]]
    begun = [at for at in range(1, len(still)) if still[at - 1] and not still[at]]
    if not begun:
        return 0, 0
    return next((at for at in range(begun[0], len(still)) if still[at]), len(still)), len(begun) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    from lamina import LLM

    options = {"prefix_cache": False, "lanes": 1, "kv_memory": "2GiB", "local_share": 1.0, "query_first": "never"}
    worker, address = start_worker()
    with LLM(args.model, attention_workers=[address], **options) as llm:
        here, there = delays(llm, worker, args)
    worker.terminate()
    worker.wait()
    worker, address = start_worker("--read-delay", str(there))
    cases: dict[str, set[str]] = {"even": set(), "worker slowed 3x": {"worker"}, "local slowed 3x": {"local"}}
    with LLM(args.model, attention_workers=[address], **options) as llm:
        rig = Rig(llm, worker, here, {"worker"})
        found: dict[str, dict[float | None, list[float]]] = {name: {} for name in cases}
        chosen: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(args.rounds):
            for name, who in cases.items():
                rig.slow(who)
                stream = Stream(llm, args.sequences, args.tokens, number)
                order: list[float | None] = [*SHARES, None]
                for share in order[number % 6 :] + order[: number % 6]:
                    tuner, batches = rig.measure(share, args.steps)
                    found[name].setdefault(share, []).append(step(batches))
                    if share is None:
                        chosen[name].append(batches[-1].share)
                stream.end()
        print(f"{args.sequences} sequences of {args.tokens} tokens, ms a step, medians of {args.rounds} rounds")
        print(f"{'':18}" + "".join(f"{share:9.2f}" for share in SHARES) + "     auto   (share)   of best  of local")
        for name, steps in found.items():
            middle = {share: statistics.median(several) for share, several in steps.items()}
            auto, best = middle[None], min(middle[share] for share in SHARES)
            print(
                f"{name:18}"
                + "".join(f"{middle[share]:9.2f}" for share in SHARES)
                + f"{auto:9.2f}   ({statistics.median(chosen[name]):.2f})"
                + f"   {auto / best:7.3f}   {auto / middle[1.0]:7.3f}"
            )
        stream = Stream(llm, args.sequences, args.tokens, 99)
        rig.slow(set())
        tuner, _ = rig.measure(None, args.steps)
        for name in ("local slowed 3x", "worker slowed 3x", "even", "local slowed 3x"):
            change = len(tuner.seen)
            rig.slow(cases[name])
            until(lambda change=change: len(tuner.seen) >= change + 100)  # type: ignore[misc]
            steps_taken, again = settled_after(tuner, change)
            share = statistics.median(batch.share for batch, *_ in tuner.seen[-10:])
            print(
                f"then {name}: settled after {steps_taken} steps (asked: 50), {again} later searches, share {share:.2f}"
            )
        stream.end()
    worker.terminate()
    worker.wait()


if __name__ == "__main__":
    main()
