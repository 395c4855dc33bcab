"""Workers that are lost while requests run, and what comes back of it, in simulated time.

Recovery costs what `scripts/bench/recovery.py` measured (docs/internals/reliability.md): without redundancy all is
computed again, by the scheduler and the cost model; with it, a share of the time of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import Load
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System
from lamina.simulator.event_loop.instance import Instance, Totals
from lamina.simulator.traces.arrivals import Trace


@dataclass(frozen=True, slots=True)
class Redundancy:
    """Copies of KV for the loss of an attention worker. `kept`: the share of the memory for KV that is left for
    sequences. `recovery`: how long no sequence gets a token, as a share of the seconds in which all running contexts
    would be computed again. `slower`: how many times its own seconds a batch takes. `workers`: the fewest that it
    needs."""

    kept: float
    recovery: float
    slower: float
    workers: int


REDUNDANCY = {
    "none": Redundancy(1.0, 0.0, 1.0, 1),
    "replica": Redundancy(1 / 2, 0.04, 1 / 0.96, 2),
    "parity": Redundancy(2 / 3, 0.05, 1 / 0.96, 3),
}
"""Measured: SmolLM2-135M, 8 sequences of 2,000 tokens, 3 workers, two cores; copies take 4 % of the time."""


@dataclass(frozen=True, slots=True)
class Failures:
    """Each instance loses a worker `every` so many seconds, and has another one `restart` seconds later.

    Where attention is elsewhere an attention worker is lost, and without redundancy a part of each sequence with it:
    all is computed again, on the workers that are left. Where a system has no other devices it is lost as a whole.
    Raises InvalidRequest.
    """

    every: float
    redundancy: str = "none"
    restart: float = 10.0

    def __post_init__(self) -> None:
        for name in ("every", "restart"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise InvalidRequest(f"{name} of the failures is {value!r:.80}; allowed are finite seconds above 0")
        if self.redundancy not in REDUNDANCY:
            raise InvalidRequest(f"redundancy is {self.redundancy!r:.80}; allowed are {', '.join(REDUNDANCY)}")

    def reserved(self, system: System) -> Colocated | Offloaded:
        """The system with the memory that copies leave. Raises InvalidRequest where there can be none."""
        if isinstance(system, Disaggregated):
            raise InvalidRequest(
                f"failures were given with {system.name!r}; allowed are systems whose prompts and decode share devices"
            )
        copies = REDUNDANCY[self.redundancy]
        workers = system.attention_count if isinstance(system, Offloaded) else 1
        if workers < copies.workers:
            raise InvalidRequest(
                f"{system.name!r} has {workers} attention workers; {self.redundancy} needs {copies.workers} at least"
            )
        if not isinstance(system, Offloaded) or copies.kept == 1:
            return system
        return replace(system, attention_memory_share=system.attention_memory_share * copies.kept)


class FailingInstance(Instance):
    """An instance that loses workers."""

    def __init__(
        self, system: System, trace: Trace, prefill: bool, prefix_cache: bool, totals: Totals, failures: Failures
    ) -> None:
        self._intact = failures.reserved(system)
        super().__init__(self._intact, trace, prefill, prefix_cache, totals, pooled=True)
        self._failures, self._redundancy = failures, REDUNDANCY[failures.redundancy]
        self.slower = self._redundancy.slower
        self._next = failures.every
        self._back = math.inf  # when the lost worker's successor is there

    def step(self) -> bool:
        """A step of an instance, after the losses and returns up to now."""
        if self.now >= self._back:
            self.resize(self._intact)
            self._back = math.inf
        if self.now >= self._next:
            self._lose()
            self._next = max(self._next, self.now) + self._failures.every
        return super().step()

    def _lose(self) -> None:
        system, restart = self._intact, self._failures.restart
        self._totals.losses += 1
        if self._redundancy.recovery:
            again = prefill_seconds(system, self.contexts)
            self.pause(self._redundancy.recovery * again)
            return
        self._totals.recomputed += self.lose_kv()
        if isinstance(system, Offloaded) and system.attention_count > 1:
            self.resize(replace(system, attention_count=system.attention_count - 1))
            self._back = self.now + restart
        else:
            self.pause(restart)


def prefill_seconds(system: Colocated | Offloaded, contexts: Sequence[int]) -> float:
    """Seconds in which these contexts are computed from their beginning, one after another."""
    seconds = 0.0
    for context in contexts:
        done = 0
        while done < context:
            tokens = min(system.max_batch_tokens, context - done)
            pairs = tokens * (done + (tokens + 1) / 2)
            last = int(done + tokens == context)
            seconds += system.step(Load(0, 0.0, tokens, pairs, done + tokens, 0, 0.0, last)).seconds
            done += tokens
    return seconds
