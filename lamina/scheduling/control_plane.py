"""Scheduler and placement as one: what is computed next, which holder reads and stores what, and what follows from the
holders' answers. Pure: engine and simulator use the same decisions.

The life of a step: `plan`, then `accepted` or `refused` as the holders answer; once its batch is complete `recorded`,
or `dropped` where it failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lamina.scheduling.holder import Holder
from lamina.scheduling.kv_shares import Pages
from lamina.scheduling.lane_tuner import LaneTuner
from lamina.scheduling.local_share import LocalShare
from lamina.scheduling.order_tuner import OrderTuner
from lamina.scheduling.placement import Placement
from lamina.scheduling.request import Outcome, Plan, PlannedRow, ScheduledSequence, SchedulerConfig
from lamina.scheduling.scheduler import Scheduler
from lamina_protocols.messages import Announced
from lamina_protocols.routes import HolderBatch


class Step(NamedTuple):
    """What is announced together: a plan, and the operations and rows of each holder that it concerns. Without a plan a
    step carries operations that placement alone has made, as moves do."""

    plan: Plan | None
    batches: Mapping[int, HolderBatch]

    @property
    def rows(self) -> tuple[PlannedRow, ...]:
        """The rows that are computed."""
        return () if self.plan is None else self.plan.rows


class Rebuilt(NamedTuple):
    """What follows from a loss: how many tokens are computed again for lost parts of sequences, and how many tokens the
    sequences had that begin anew."""

    tokens: int
    anew: int


def refusal(answers: Mapping[int, Announced]) -> str | None:
    """Why a holder refuses; None where all accept."""
    return next((answer.reason for answer in answers.values() if not answer.accepted), None)


def torn(answers: Mapping[int, Announced]) -> bool:
    """Whether a holder refuses because it lacks KV of earlier batches."""
    return any(answer.starts for answer in answers.values())


class ControlPlane:
    """Decides for one engine. `scheduler` owns the sequences, `placement` the holders and the parts of sequences;
    `lanes`, `order` and `local_share` decide how many steps are under way, whether q goes first in decode, and how much
    KV is kept beside the model.

    `prefill_free` has the pages that prefill pools have left, by their last answers; the scheduler does not count them.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        placement: Placement,
        lanes: LaneTuner | None = None,
        local_share: LocalShare | None = None,
        order: OrderTuner | None = None,
    ) -> None:
        self.placement = placement
        self.scheduler = Scheduler(config, placement)
        self.lanes = lanes or LaneTuner(1)
        self.local_share = local_share or LocalShare()
        self.order = order or OrderTuner()
        self.prefill_free: dict[int, int] = {}

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished, a step under way, or an operation waits for a holder."""
        return self.scheduler.has_work or self.placement.pending

    # Steps.

    def plan(self, alone: bool = True) -> Step | None:
        """The next step; `alone`: no other is under way. None where one under way must be over first, or there is no
        work."""
        plan = self.scheduler.plan(self.lanes.count)
        if plan is None and not (alone and self.placement.pending):
            return None
        return self._placed(plan)

    def plan_operations(self) -> Step | None:
        """A step of all operations that wait, without rows. None where none does."""
        plan = self.scheduler.plan_operations()
        return None if plan is None and not self.placement.pending else self._placed(plan)

    def _placed(self, plan: Plan | None) -> Step:
        self.placement.fuses = self.order.fused
        return Step(plan, self.placement.outgoing() if plan is None else self.placement.place(plan))

    def accepted(self, step: Step, answers: Mapping[int, Announced]) -> None:
        """Every holder has accepted. Without rows the step is over with this."""
        free = self._applied(step.batches, answers)
        if step.plan is None:
            self.scheduler.ledger.update_free(free)
        else:
            self.scheduler.accepted(step.plan, free, self._floors(step.plan, step.batches, answers))

    def refused(self, step: Step, answers: Mapping[int, Announced]) -> tuple[ScheduledSequence, ...]:
        """A holder has refused, others may have accepted: undo the step, and make room for the next one or have lost KV
        computed again. Returns the sequences that can never go on, which have ended."""
        free = self._applied(step.batches, answers)
        if step.plan is None:
            self.scheduler.ledger.update_free(free)
            return ()
        if torn(answers):
            starts = [row.start for row in step.rows]
            for number, answer in answers.items():
                for route, start in zip(step.batches[number].routes, answer.starts, strict=False):  # or there are none
                    starts[route.source] = min(starts[route.source], start)
            self.scheduler.torn(step.plan, free, self._floors(step.plan, step.batches, answers), starts)
            return ()
        refusers = {number for number, answer in answers.items() if not answer.accepted}
        return self.scheduler.refused(step.plan, free, refusers)

    def answered(self, batches: Mapping[int, HolderBatch], answers: Mapping[int, Announced]) -> None:
        """Holders have answered an announcement of operations outside of any step."""
        self.scheduler.ledger.update_free(self._applied(batches, answers))

    def kept(self, answers: Mapping[int, Announced]) -> dict[int, Announced]:
        """The answers of holders that keep sequences: all but the prefill pools."""
        return {number: answer for number, answer in answers.items() if number not in self.placement.prefill_pools}

    def recorded(self, plan: Plan, tokens: Sequence[int]) -> list[Outcome]:
        """The batch is complete. `tokens` has one token for each row that samples, in row order. Sequences that were
        ended meanwhile have no outcome."""
        outcomes = self.scheduler.record(plan, tokens)
        self.placement.recorded(plan)
        return outcomes

    def dropped(self, step: Step) -> None:
        """The batch failed. Nothing of it counts; its rows are planned again."""
        if step.plan is not None:
            self.scheduler.drop(step.plan)

    def _applied(self, batches: Mapping[int, HolderBatch], answers: Mapping[int, Announced]) -> Pages:
        """Note which holders have applied their operations. Returns the pages that they have left, without those of the
        prefill pools."""
        free = Pages()
        for number, answer in answers.items():
            if answer.accepted:
                self.placement.holders[number].accepted(batches[number])
            if number in self.placement.prefill_pools:
                self.prefill_free[number] = answer.free_pages
            else:
                free[number] = answer.free_pages
        return free

    def _floors(self, plan: Plan, batches: Mapping[int, HolderBatch], answers: Mapping[int, Announced]) -> list[int]:
        """For each row the highest floor of its parts."""
        kept = self.kept(answers)
        asked = Counter(route.source for number in kept for route in batches[number].routes)
        # A part whose range is full was not asked: its floor has not changed.
        floors = [row.sequence.floor if asked[at] < len(row.sequence.layout) else 0 for at, row in enumerate(plan.rows)]
        for number, answer in kept.items():
            if any(answer.floors):
                for route, floor in zip(batches[number].routes, answer.floors, strict=True):
                    floors[route.source] = max(floors[route.source], floor)
        return floors

    # Holders.

    def joined(self, number: int, holder: Holder) -> None:
        """There is one holder more, empty."""
        self.placement.joined(number, holder)
        self.scheduler.joined(number, holder.pages)

    def lost(self, numbers: Sequence[int]) -> Rebuilt:
        """Holders are gone, with their KV. Nothing may be in flight."""
        for number in numbers:
            self.placement.lost(number)
        rebuilt = [self.scheduler.lost(number) for number in numbers]
        return Rebuilt(sum(tokens for tokens, _ in rebuilt), sum(anew for _, anew in rebuilt))

    def left(self, number: int) -> None:
        """A holder without KV is gone."""
        self.placement.lost(number)
        self.scheduler.ledger.left(number)

    def emptied(self, numbers: Sequence[int]) -> int:
        """These holders have lost their KV and go on. Nothing may be in flight. Returns how many tokens are computed
        again."""
        tokens = 0
        for number in numbers:
            self.placement.emptied(number)
            if number in self.placement.prefill_pools:
                self.prefill_free.pop(number, None)
            else:
                tokens += self.scheduler.emptied(number, self.placement.holders[number].pages)
        return tokens

    def tokens_read(self, plan: Plan) -> tuple[int, int]:
        """How many tokens of KV the plan's rows read, in the local pools and elsewhere; 0 where there is one tier."""
        if not self.placement.tiers:
            return 0, 0
        local, total = self.placement.local_tokens((row.sequence.layout, row.start + 1) for row in plan.rows)
        return local, total - local
