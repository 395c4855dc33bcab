"""Has drafts proposed before a batch is planned, and measures afterwards what they were worth.

The model verifies them: see `lamina/scheduling/scheduler.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from lamina.engine.masks import Advance, Masks
from lamina.engine.proposer import Proposer, Wanted
from lamina.engine.stats import EngineStats
from lamina.kv.request import Outcome, Plan, ScheduledSequence
from lamina.messages.engine_request import EngineRequest
from lamina.scheduling.scheduler import before_the_end
from lamina.scheduling.speculation import Speculation, SpeculationCounts

if TYPE_CHECKING:
    from lamina.engine.observers import BatchDone
    from lamina.engine.request_registry import RequestRegistry


class Drafting:
    """Drafts of `proposer`, as many as `speculation` says; none without these. `clock`: seconds. For the engine's
    thread."""

    def __init__(
        self, proposer: Proposer | None, speculation: Speculation | None, stats: EngineStats, clock: Callable[[], float]
    ) -> None:
        self._proposer = proposer
        self._speculation = speculation
        self._stats = stats
        self._clock = clock
        self._last: float | None = None  # when the batch before was recorded, idle seconds not counted
        self._took = 0.0  # seconds that drafts have taken since

    @property
    def on(self) -> bool:
        """Whether there may be drafts."""
        return self._proposer is not None and self._speculation is not None

    @property
    def counts(self) -> SpeculationCounts | None:
        """What became of all drafts; None without speculation."""
        return None if self._speculation is None else self._speculation.counts

    def propose(self, decoding: Sequence[ScheduledSequence], registry: RequestRegistry, masks: Masks) -> None:
        """Set the `drafts` of sequences that will decode, but for those that have some from before. Where text is
        constrained, its masks along the drafts are there, or the sequence is held until they are."""
        if self._proposer is None or self._speculation is None or not decoding:
            return
        began = self._clock()
        depths = zip(decoding, self._speculation.depths(decoding), strict=True)
        wanted = [
            Wanted(sequence, registry.requests[sequence.request.id], depth)
            for sequence, depth in depths
            if depth > 0 and not sequence.drafts and not _slow(registry, sequence)
        ]
        if not wanted:
            return
        looks = []
        for (sequence, _, depth), proposed in zip(wanted, self._proposer.propose(wanted), strict=True):
            drafts = before_the_end(sequence, proposed[:depth])
            constraint = registry.constraints.get(sequence)
            if drafts and constraint is not None:
                looks.append(Advance(sequence, constraint, drafts, drafts=True))
            else:
                sequence.drafts = drafts
        for look in masks.begin(looks, _foreseen) if looks else ():
            _foreseen(look)
        self._took += self._clock() - began

    def recorded(self, plan: Plan, outcomes: Sequence[Outcome], requests: Mapping[str, EngineRequest]) -> None:
        """A batch is recorded, with these outcomes: count what was accepted."""
        if self._speculation is None:
            return
        tokens: dict[ScheduledSequence, list[int]] = {}
        for outcome in outcomes:
            if outcome.token is not None:
                tokens.setdefault(outcome.sequence, []).append(outcome.token)
        for row in plan.rows:
            if row.drafts and (new := tokens.get(row.sequence)):
                same = takewhile(lambda pair: pair[0] == pair[1], zip(row.drafts, new, strict=False))
                accepted = sum(1 for _ in same)
                self._speculation.recorded(row.sequence, len(row.drafts), accepted)
                request = requests[row.sequence.request.id]
                request.drafted += len(row.drafts)
                request.accepted += accepted

    def batch_done(self, done: BatchDone) -> None:
        """Measure what a batch took."""
        last, drafting = self._last, self._took
        self._last, self._took = done.now - self._stats.idle_seconds, 0.0
        if self._speculation is None or last is None or done.prefill or not done.sampled:
            return
        tokens = sum(row.count for row in done.plan.rows)
        self._speculation.took(len(done.plan.rows), tokens, done.sampled, self._last - last, drafting)

    def ended(self, sequence: ScheduledSequence) -> None:
        """A sample has ended."""
        if self._proposer is not None and self._speculation is not None:
            self._proposer.ended(sequence)
            self._speculation.ended(sequence)


def _slow(registry: RequestRegistry, sequence: ScheduledSequence) -> bool:
    """Whether the masks along drafts would take long."""
    constraint = registry.constraints.get(sequence)
    return constraint is not None and constraint.slow


def _foreseen(look: Advance) -> None:
    """A constraint has looked ahead along drafts."""
    if look.sequence.finish_reason is None and look.error is None:
        look.sequence.drafts = tuple(look.tokens[: len(look.constraint.foreseen)])
