"""Scheduler and placement as one: what is computed next, which holder reads and stores what, and what follows from the
holders' answers. Pure: engine and simulator use the same decisions.

`ControlPlane.plan` gives a `Step`, which takes the holders' answers and the tokens of its batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from lamina.errors import EngineError
from lamina.kv.kv_shares import NO_PAGES, Pages
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import Outcome, Plan, PlannedRow, ScheduledSequence, SchedulerConfig
from lamina.kv.spares import Spares
from lamina.scheduling.scheduler import Scheduler
from lamina.scheduling.step_tuner import StepTuner
from lamina_protocols.messages.messages import Announced
from lamina_protocols.messages.routes import HolderBatch


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
        self.tuner = tuner or StepTuner()

    @property
    def spares(self) -> Spares:
        """What is kept in case that a holder is lost."""
        return self.scheduler.running.spares

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished, a step under way, an operation waits for a holder, or the pages of one are
        estimated."""
        return self.scheduler.has_work or self.placement.pending or bool(self.scheduler.ledger.estimated)

    # Steps.

    def plan(self, alone: bool = True) -> Step | None:
        """The next step; `alone`: no other is under way. None where one under way must be over first, or there is no
        work. Where no sequence is unfinished, holders whose pages are estimated are asked for them. Too many operations
        for one announcement go in slices, before any rows."""
        if self.placement.overfull:
            return self.inquiry(()) if alone else None
        plan = self.scheduler.plan(self.tuner.lanes)
        if plan is not None:
            return Step(plan, self.placement.place(plan, fuses=self.tuner.fused), self)
        estimated = () if self.scheduler.has_work else self.scheduler.ledger.estimated
        return self.inquiry(estimated) if alone and (self.placement.pending or estimated) else None

    def inquiry(self, numbers: Iterable[int]) -> Step:
        """A step without rows: the operations that wait for any holder, and an announcement to each of these holders,
        whose answers say how many pages they have left. What copies take from now on is estimated anew."""
        holders = self.placement.holders
        inquiries = {number: holders[number].outgoing() for number in numbers}
        self.scheduler.ledger.estimated -= inquiries.keys()
        return Step(None, self.placement.outgoing() | inquiries, self)

    # Holders.

    def joined(self, number: int, holder: Holder) -> None:
        self.placement.joined(number, holder)
        self.spares.holders_changed()
        self.scheduler.joined(Pages.of(number, holder.pages))

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


class Step:
    """What is announced together: a plan, and the operations and rows of each holder that it concerns. Without a plan a
    step carries operations alone.

    Its life: the holders' answers are checked by `at_fault`, then they are `accepted` or `refused`. Once its batch is
    complete it is `recorded`, or `dropped` where it failed.
    """

    __slots__ = ("_control", "_least", "batches", "plan")

    def __init__(self, plan: Plan | None, batches: Mapping[int, HolderBatch], control: ControlPlane) -> None:
        self.plan = plan
        self.batches = batches
        self._control = control
        self._least = NO_PAGES  # that holders must have left, where their answers are in doubt

    @property
    def rows(self) -> tuple[PlannedRow, ...]:
        return () if self.plan is None else self.plan.rows

    # The holders' answers.

    def at_fault(self, answers: Mapping[int, Announced]) -> dict[int, str]:
        """The holders whose answers the books contradict too often, and what they say. Called once, before anything
        else is done with the answers."""
        return self._impossible_starts(answers) | self._false_refusals(answers)

    def _impossible_starts(self, answers: Mapping[int, Announced]) -> dict[int, str]:
        """The holders that say too often that they lack KV which the books say they have."""
        refusals, guilty = self._control.scheduler.refusals, dict[int, str]()
        for number, answer in answers.items():
            starts: dict[PlannedRow, int] = {}  # a sequence can have several parts there
            for route, start in zip(self.batches[number].routes, answer.starts, strict=False):  # or there are none
                row = self.rows[route.source]
                starts[row] = min(start, starts.get(row, start))
            for row, start in starts.items():
                if start < row.start and refusals.lacks(number, row, start):
                    guilty[number] = answer.reason
        return guilty

    def _false_refusals(self, answers: Mapping[int, Announced]) -> dict[int, str]:
        """The holders that say too often that they are full while the books say that there is room, and those whose
        number of pools is wrong."""
        scheduler, holders = self._control.scheduler, self._control.placement.holders
        room = scheduler.ledger.room()
        refusers = {number for number, answer in answers.items() if not (answer.accepted or answer.starts)}
        if refusers or any(
            free < room.get((number, pool), 0)
            for number, answer in answers.items()
            for pool, free in enumerate(answer.free_pages)
        ):
            # What is taken is counted anew: after a batch that failed the ledger does not know all of it.
            self._least = self._control.placement.pages - scheduler.running.most()
        guilty: dict[int, str] = {}
        for number, answer in answers.items():
            pools = len(holders[number].pages)
            if len(answer.free_pages) != pools:
                guilty[number] = f"it has {len(answer.free_pages)} pools, {pools} are expected"
            least = [self._least.get((number, pool), 0) for pool in range(pools)]
            falsely = number in refusers and (min(least) >= 0 or not self.batches[number].routes)
            if scheduler.refusals.full(number, falsely):
                pages = " and ".join(map(str, least))
                guilty[number] = f"{answer.reason}, while {pages} pages or more must be free"
        return guilty

    def accepted(self, answers: Mapping[int, Announced]) -> None:
        """Every holder has accepted. Without rows the step is over with this, and some may have refused."""
        scheduler, free = self._control.scheduler, self._applied(answers)
        if self.plan is None:
            scheduler.ledger.update_free(free)
        else:
            scheduler.accepted(self.plan, free, self._floors(self.plan, answers))

    def refused(self, answers: Mapping[int, Announced]) -> tuple[ScheduledSequence, ...]:
        """A holder has refused, others may have accepted: undo the step, and make room for the next one or have lost KV
        computed again. Returns the sequences that can never go on, which have ended."""
        scheduler, free = self._control.scheduler, self._applied(answers)
        if self.plan is None:
            scheduler.ledger.update_free(free)
            return ()
        if torn(answers):
            starts = [row.start for row in self.rows]
            for number, answer in answers.items():
                for route, start in zip(self.batches[number].routes, answer.starts, strict=False):  # or there are none
                    starts[route.source] = min(starts[route.source], start)
            scheduler.torn(self.plan, free, self._floors(self.plan, answers), starts)
            return ()
        believed = scheduler.refusals.believed
        refusers = {number for number, answer in answers.items() if not answer.accepted and believed(number)}
        return scheduler.refused(self.plan, free, self._control.placement.places(refusers))

    def _applied(self, answers: Mapping[int, Announced]) -> Pages:
        """Note which holders have applied their operations. Returns the pages that they have left, as far as that can
        be."""
        free, holders = Pages(), self._control.placement.holders
        for number, answer in answers.items():
            if answer.accepted:
                holders[number].accepted(self.batches[number])
            for pool, (count, total) in enumerate(zip(answer.free_pages, holders[number].pages, strict=False)):
                # Where it refuses, the pages that closes free are not free yet, and they may be more than is known.
                least = self._least.get((number, pool), 0) if answer.accepted else 0
                free[number, pool] = min(max(count, least), total)
        return free

    def _floors(self, plan: Plan, answers: Mapping[int, Announced]) -> list[int]:
        """For each row the highest floor of the parts that were asked, local copies aside. Of states it is the row's
        start, whatever was answered."""
        placement = self._control.placement
        floors, states = [0] * len(plan.rows), placement.states
        for number, answer in answers.items():
            if any(answer.floors) or (states and answer.accepted):
                for route, cut in zip(self.batches[number].routes, answer.floors, strict=True):
                    floor = route.row.start if route.pool in states else cut
                    copied = plan.rows[route.source].sequence.local_copy
                    if not copied or number not in placement.local_pools:
                        floors[route.source] = max(floors[route.source], floor)
        return floors

    # Its batch.

    def recorded(self, tokens: Sequence[int | None]) -> list[Outcome]:
        """The batch is complete: see `Scheduler.record`. Raises EngineError for a step without a plan."""
        if self.plan is None:
            raise EngineError("a step without rows has no tokens to record")
        return self._control.scheduler.record(self.plan, tokens)

    def dropped(self) -> None:
        """The batch failed. Nothing of it counts; its rows are planned again, and its holders asked again."""
        if self.plan is not None:
            self._control.scheduler.drop(self.plan)
        else:
            self._control.scheduler.ledger.estimated.update(self.batches)
