"""Scheduler and placement as one: what is computed next, which holder reads and stores what, and what follows from the
holders' answers. Pure: engine and simulator use the same decisions.

The life of a step: `plan`, then `accepted` or `refused` as the holders answer; once its batch is complete `recorded`,
or `dropped` where it failed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from lamina.kv.kv_shares import Pages
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import Outcome, Plan, PlannedRow, ScheduledSequence, SchedulerConfig
from lamina.kv.spares import Spares
from lamina.scheduling.scheduler import Scheduler
from lamina.scheduling.step_tuner import StepTuner
from lamina_protocols.messages.messages import Announced
from lamina_protocols.messages.routes import HolderBatch


class Step(NamedTuple):
    """What is announced together: a plan, and the operations and rows of each holder that it concerns. Without a plan a
    step carries operations alone."""

    plan: Plan | None
    batches: Mapping[int, HolderBatch]

    @property
    def rows(self) -> tuple[PlannedRow, ...]:
        """The rows that are computed."""
        return () if self.plan is None else self.plan.rows


class Rebuilt(NamedTuple):
    """What follows from a loss: how many tokens are computed again for lost parts of sequences, how many tokens the
    sequences had that begin anew, and how many need not be computed since there are spares."""

    tokens: int
    anew: int
    spared: int


def refusal(answers: Mapping[int, Announced]) -> str | None:
    """Why a holder refuses; None where all accept."""
    return next((answer.reason for answer in answers.values() if not answer.accepted), None)


def torn(answers: Mapping[int, Announced]) -> bool:
    """Whether a holder refuses because it lacks KV of earlier batches."""
    return any(answer.starts for answer in answers.values())


class ControlPlane:
    """Decides for one engine. `scheduler` owns the sequences, `placement` the holders and the parts of sequences;
    `tuner` decides how many steps are under way, whether q goes first in decode, and how much KV is kept beside the
    model.
    """

    def __init__(self, config: SchedulerConfig, placement: Placement, tuner: StepTuner | None = None) -> None:
        self.placement = placement
        self.scheduler = Scheduler(config, placement)
        self._least = Pages()  # that holders must have left, where their last answers were in doubt
        self.tuner = tuner or StepTuner()

    @property
    def spares(self) -> Spares:
        """What is kept in case that a holder is lost."""
        return self.scheduler.running.spares

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished, a step under way, or an operation waits for a holder."""
        return self.scheduler.has_work or self.placement.pending

    # Steps.

    def plan(self, alone: bool = True) -> Step | None:
        """The next step; `alone`: no other is under way. None where one under way must be over first, or there is no
        work."""
        plan = self.scheduler.plan(self.tuner.lanes)
        if plan is None:
            return Step(None, self.placement.outgoing()) if alone and self.placement.pending else None
        return Step(plan, self.placement.place(plan, fuses=self.tuner.fused))

    def accepted(self, step: Step, answers: Mapping[int, Announced]) -> None:
        """Every holder has accepted. Without rows the step is over with this."""
        free = self._applied(step.batches, answers)
        if step.plan is None:
            self.scheduler.ledger.update_free(free)
        else:
            self.scheduler.accepted(step.plan, free, self._floors(step.plan, step.batches, answers))

    def at_fault(self, step: Step, answers: Mapping[int, Announced]) -> dict[int, str]:
        """The holders whose answers the books contradict too often, and what they say. Asked once of each answer,
        before anything else is done with it."""
        refusals, found = self.scheduler.refusals, {}
        for number, answer in answers.items():
            starts: dict[PlannedRow, int] = {}  # a sequence can have several parts there
            for route, start in zip(step.batches[number].routes, answer.starts, strict=False):  # or there are none
                row = step.rows[route.source]
                starts[row] = min(start, starts.get(row, start))
            for row, start in starts.items():
                if start < row.start and refusals.lacks(number, row, start):
                    found[number] = answer.reason
        least, self._least = self.scheduler.ledger.room(), Pages()
        full = {number for number, answer in answers.items() if not (answer.accepted or answer.starts)}
        said = {(number, pool): free for number, a in answers.items() for pool, free in enumerate(a.free_pages)}
        if full or any(free < least.get(at, 0) for at, free in said.items()):
            # What is taken is counted anew: after a batch that failed the ledger does not know all of it.
            self._least = self.placement.pages - self.scheduler.running.most()
        for number, answer in answers.items():
            pools = len(self.placement.holders[number].pages)
            if len(answer.free_pages) != pools:
                found[number] = f"it has {len(answer.free_pages)} pools, {pools} are expected"
            left = [self._least.get((number, pool), 0) for pool in range(pools)]
            if refusals.full(number, number in full and (min(left) >= 0 or not step.batches[number].routes)):
                least_left = " and ".join(map(str, left))
                found[number] = f"{answer.reason}, while {least_left} pages or more must be free"
        return found

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
        believed = self.scheduler.refusals.believed
        refusers = {number for number, answer in answers.items() if not answer.accepted and believed(number)}
        return self.scheduler.refused(step.plan, free, self.placement.places(refusers))

    def answered(self, batches: Mapping[int, HolderBatch], answers: Mapping[int, Announced]) -> None:
        """Holders have answered an announcement of operations outside of any step."""
        self.scheduler.ledger.update_free(self._applied(batches, answers))

    def recorded(self, plan: Plan, tokens: Sequence[int | None]) -> list[Outcome]:
        """The batch is complete: see `Scheduler.record`."""
        return self.scheduler.record(plan, tokens)

    def dropped(self, step: Step) -> None:
        """The batch failed. Nothing of it counts; its rows are planned again."""
        if step.plan is not None:
            self.scheduler.drop(step.plan)

    def _applied(self, batches: Mapping[int, HolderBatch], answers: Mapping[int, Announced]) -> Pages:
        """Note which holders have applied their operations. Returns the pages that they have left, as far as that can
        be."""
        free, holders = Pages(), self.placement.holders
        for number, answer in answers.items():
            if answer.accepted:
                holders[number].accepted(batches[number])
            for pool, (said, whole) in enumerate(zip(answer.free_pages, holders[number].pages, strict=False)):
                # Where it refuses, the pages that closes free are not free yet, and they may be more than is known.
                least = self._least.get((number, pool), 0) if answer.accepted else 0
                free[number, pool] = min(max(said, least), whole)
        return free

    def _floors(self, plan: Plan, batches: Mapping[int, HolderBatch], answers: Mapping[int, Announced]) -> list[int]:
        """For each row the highest floor of the parts that were asked, local copies aside. Of states it is the row's
        start, whatever was answered."""
        floors, states = [0] * len(plan.rows), self.placement.states
        for number, answer in answers.items():
            if any(answer.floors) or (states and answer.accepted):
                for route, said in zip(batches[number].routes, answer.floors, strict=True):
                    floor = route.row.start if route.pool in states else said
                    copied = plan.rows[route.source].sequence.local_copy
                    if not copied or number not in self.placement.local_pools:
                        floors[route.source] = max(floors[route.source], floor)
        return floors

    # Holders.

    def joined(self, number: int, holder: Holder) -> None:
        """There is one holder more, empty."""
        self.placement.joined(number, holder)
        self.spares.holders_changed()
        self.scheduler.joined(Pages.of(number, holder.pages))

    def grow(self, numbers: Sequence[int]) -> int:
        """Have running sequences grow at these holders, which have joined. Returns how many do."""
        return self.scheduler.growth.joined(numbers)

    def drain(self, numbers: Sequence[int]) -> None:
        """These holders are to be let go: they get no new sequence, no running one grows there, and what they keep is
        to go elsewhere."""
        for number in numbers:
            self.placement.holders[number].draining = True
        self.scheduler.growth.leave(numbers)
        self.spares.leave(numbers)
        self.scheduler.admission.look_again()

    def stay(self, numbers: Iterable[int]) -> None:
        """Those of these holders that are there take sequences again."""
        for number in numbers:
            if number in self.placement.holders:
                self.placement.holders[number].draining = False
        self.spares.holders_changed()
        self.scheduler.admission.joined()

    def vacated(self, numbers: Collection[int]) -> bool:
        """Whether these draining holders keep nothing, and no operation waits for them. Once they keep no sequence,
        they give up all prefixes."""
        running = self.scheduler.running
        if running.kept_by(numbers):
            return False
        running.prefix_cache.clear(set(numbers))
        return not any(self.placement.holders[number].outbox for number in numbers)

    def lost(self, numbers: Sequence[int]) -> Rebuilt:
        """Holders are gone, with their KV. Nothing may be in flight. Draining ones stay where no other is left."""
        self.scheduler.admission.losing()
        for number in numbers:
            self.placement.lost(number)
        self.spares.holders_changed()
        if not self.placement.capacity:
            self.stay(self.placement.draining)
        rebuilt = [self.scheduler.lost(number) for number in numbers]
        return Rebuilt(*map(sum, zip((0, 0, 0), *rebuilt, strict=True)))

    def left(self, number: int) -> None:
        """A holder without KV is gone."""
        self.placement.lost(number)
        self.spares.holders_changed()
        self.scheduler.ledger.left(number)
        self.scheduler.admission.left()

    def emptied(self, numbers: Sequence[int]) -> int:
        """These holders have lost their KV and go on. Nothing may be in flight. Returns how many tokens are computed
        again."""
        tokens = 0
        for number in numbers:
            self.placement.emptied(number)
            tokens += self.scheduler.emptied(number, Pages.of(number, self.placement.holders[number].pages))
        return tokens

    def tokens_read(self, plan: Plan) -> tuple[int, int]:
        """How many tokens of KV the plan's rows read, in the local pools and elsewhere."""
        local, total = self.placement.local_tokens((row.sequence.layout, row.start + 1) for row in plan.rows)
        return local, total - local
