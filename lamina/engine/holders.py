"""The register of an engine's holders: they join, are let go, and are dropped when they are lost.

Each change goes to the model worker and the control plane first, then to the listeners in their order. Everything is
called between two batches, on the engine's thread.

`Drains` let attention workers go without a loss. The holders of such a worker are marked: they get no new sequence, and
what they keep moves to other holders while all sequences go on. Once they are empty the worker leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

from lamina.engine.kv_migration import AT_ONCE, KvMigration
from lamina.errors import EngineError, InvalidRequest
from lamina.kv.kv_shares import NO_PAGES, Layout
from lamina.kv.placement import Holder
from lamina.kv.relocation import elsewhere, to_preempt
from lamina.kv.request import Plan, PlannedRow, Request, ScheduledSequence
from lamina.scheduling.blame import TRIES
from lamina.scheduling.control_plane import ControlPlane, Step
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.messages.routes import Span
from lamina_workers.decoder.sampler import RowSampling
from lamina_workers.errors import HolderFault, HolderLost, RankLost, faults
from lamina_workers.model_worker.interface import BatchWork, Seat, Workers, result
from lamina_workers.parallel.peers import Peer
from lamina_workers.ports.port import AttentionPort

logger = logging.getLogger("lamina")


@dataclass(frozen=True, slots=True)
class HolderChange:
    """Attention workers have joined, are lost, or are drained and gone. `rebuilt`: tokens of lost KV that are computed
    again for parts of sequences."""

    kind: Literal["joined", "lost", "drained"]
    names: tuple[str, ...]
    rebuilt: int = 0


class HolderListener(Protocol):
    """A part of the engine that is notified when the holders change."""

    def holders_changed(self, change: HolderChange) -> None:
        """Called after the register, the model worker and the control plane have the change."""


def seated(seat: Seat, page_layout: str) -> Holder:
    """A rank's seat at an attention worker with this page layout, as placement sees it."""
    holder = Holder(seat.pages, seat.weight, rank=seat.rank, page_layout=page_layout)
    if seat.kept is not None:
        holder.keeps(seat.kept)
    return holder


class Holders:
    """The holders by number. `names` are those of attention workers; holders in model workers' processes have none.
    `returns`: how often a model worker has come back.

    `listeners` are set once, before the engine runs.
    """

    def __init__(self, worker: Workers[Peer], control: ControlPlane, names: Mapping[int, str]) -> None:
        self.names = dict(names)
        self.listeners: tuple[HolderListener, ...] = ()
        self.returns = 0
        self._worker = worker
        self._control = control
        self._last = max(names, default=0)

    @property
    def empty(self) -> bool:
        return not self._control.placement.capacity

    @property
    def halted(self) -> bool:
        """Whether nothing can be computed before a holder joins or a model worker comes back."""
        return self.empty or bool(self.missing)

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks of model workers that are gone, and not back yet."""
        return self._worker.missing

    def numbers(self, name: str) -> list[int]:
        """The holders of that name, one a rank; empty for an unknown name."""
        return [number for number, holder_name in self.names.items() if holder_name == name]

    def companions(self, numbers: Sequence[int]) -> list[int]:
        """These holders, and all others at the same attention workers."""
        names = {self.names[number] for number in numbers}
        return [number for number, name in self.names.items() if name in names]

    def contradicted(self, guilty: Mapping[int, str]) -> HolderLost:
        """The error for holders whose answers the books contradict. Those in this process cannot be lost: then the
        requests alone are suspects."""
        names = self.names
        answers = "; ".join(f"{names.get(number, 'this machine')}: {what}" for number, what in guilty.items())
        why = f"{TRIES} answers without progress contradict the engine's books: {answers}"
        return HolderLost(why, [number for number in guilty if number in names])

    # Changes.

    def join(self, port: AttentionPort, holder: Holder, credentials: Credentials | None = None) -> None:
        """One attention worker more, with a holder for each rank; new sequences use it. `credentials` are for the other
        ranks, which connect to it too. Raises HolderFault where one of them cannot."""
        first = self._last + 1
        seats = self._worker.join(first, port, credentials)
        holders = [holder, *(seated(seat, port.page_layout) for seat in seats)]
        for number, joining in enumerate(holders, first):
            self.names[number] = joining.name = port.name
            joining.features = self._worker.features(number)
            self._control.joined(number, joining)
        self._last += len(holders)
        grown = self._control.scheduler.growth.joined(range(first, first + len(holders)))
        pages = " and ".join(map(str, map(sum, zip(*(joining.pages for joining in holders), strict=True))))
        logger.info("attention worker %s joined with %s KV pages; %d sequences grow there", port.name, pages, grown)
        self._changed(HolderChange("joined", (port.name,)))

    def lose(self, numbers: Sequence[int]) -> None:
        """These holders are gone. Their KV is opened elsewhere and computed again. Nothing may be in flight."""
        for number in numbers:
            self._worker.leave(number)
        rebuilt, anew, spared = self._control.lost(numbers)
        names = self._drop(numbers)
        for name in names:
            logger.warning("attention worker %s is lost", name)
        places = ", ".join(dict.fromkeys(self.names.values())) or ("any that joins" if self.empty else "this machine")
        had = f"; copies had {spared}" if spared else ""
        logger.warning(
            "on %s: %d tokens of lost KV are computed again, %d from the start%s", places, rebuilt, anew, had
        )
        self._changed(HolderChange("lost", names, rebuilt))

    def let_go(self, numbers: Sequence[int]) -> None:
        """These holders are empty, and leave."""
        for number in numbers:
            self._worker.leave(number)
            self._control.left(number)
        self._changed(HolderChange("drained", self._drop(numbers)))

    def emptied(self, numbers: Sequence[int]) -> None:
        """A model worker is back. These pools have lost their KV: they are in its process where that was started again,
        perhaps of another version."""
        self.returns += 1
        for number, holder in self._control.placement.holders.items():
            holder.features = self._worker.features(number)
        if again := self._control.emptied(numbers):
            logger.warning("%d tokens of KV that a model worker kept itself are computed again", again)

    def _drop(self, numbers: Iterable[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.names.pop(number) for number in numbers))

    def _changed(self, change: HolderChange) -> None:
        for listener in self.listeners:
            listener.holders_changed(change)

    def ask_for_room(self, numbers: Iterable[int]) -> None:
        """Have holders apply the operations that wait; these say at least how many pages they have left."""
        inquired, more = list(numbers), True
        while more:
            more, step = self._control.placement.overfull, self._control.inquiry(inquired)
            try:
                _, answers = self._worker.announce_now(step.batches)
            except HolderFault as fault:  # the first batch meets it again, and handles it
                logger.warning("%s", fault)
                step.dropped()
                return
            step.accepted(answers)
            more = more and all(answer.accepted for answer in answers.values())

    def probe(self) -> HolderFault | None:
        """Have batches of one token of no request computed, so that each holder stores one where the layouts of
        sequences differ. Returns the fault with which one fails. None where all go well, and where they say nothing: a
        worker is lost, or a holder full."""
        placement = self._control.placement
        for _ in range(max(1, len(placement.holders))):  # each that is opened begins at another holder
            for layout in placement.layouts(1) or ((),):
                try:
                    with faults():
                        self._compute_one(layout)
                except HolderFault as fault:
                    return None if self._worker.lost() or isinstance(fault, RankLost) else fault
        return None

    def _compute_one(self, layout: Layout) -> None:
        placement = self._control.placement
        handle = placement.open(layout)
        try:
            sequence = ScheduledSequence(Request("", (0,), 1), 0, 0, [0], handle=handle, layout=layout)
            step = Step(None, placement.place(Plan((PlannedRow(sequence, handle, 0, 1, True),))), self._control)
            number, answers = self._worker.announce_now(step.batches)
            step.accepted(answers)
            if layout and all(answer.accepted for answer in answers.values()):
                work = BatchWork((Span(0, 1),), (1,), (0,), (0,), (RowSampling(),))
                result(self._worker.execute(work, number, step.batches, False))
        finally:
            placement.close(handle, NO_PAGES)


_EVICTED = 32  # cached prefixes that are given up between two steps, at most
_STILL_S = 600.0  # seconds in which nothing of a drain goes on, after which it ends with an error


@dataclass(slots=True)
class _Drain:
    """A drain under way of these holders. `copied`: the tokens that all moves had copied before it. `progress`: what
    the holders keep, and how far that is computed and copied; `since`: when it last changed."""

    numbers: tuple[int, ...]
    done: Future[int]
    copied: int
    since: float
    progress: object = None


class Drains:
    """The drains under way, by the attention worker's name."""

    def __init__(
        self, control: ControlPlane, holders: Holders, migration: KvMigration, clock: Callable[[], float]
    ) -> None:
        self._control = control
        self._holders = holders
        self._migration = migration
        self._clock = clock
        self._drains: dict[str, _Drain] = {}
        self._refused: set[str] = set()  # the workers that are about to end and could not be drained

    @property
    def under_way(self) -> bool:
        return bool(self._drains)

    def begin(self, name: str, done: Future[int]) -> None:
        """Have an attention worker go once its KV is elsewhere. The result is how many tokens moves have copied
        meanwhile.

        It is InvalidRequest for an unknown name, for one that is drained already and for the last one that is not, and
        EngineError where the worker is lost, no other is left, a move fails, or nothing of it goes on for some minutes;
        then the worker stays.
        """
        if not done.set_running_or_notify_cancel():
            return
        if why := self._refusal(name):
            done.set_exception(InvalidRequest(why))
            return
        numbers = tuple(self._holders.numbers(name))
        self._drains[name] = _Drain(numbers, done, self._migration.tokens, self._clock())
        self._migration.abandon(set(numbers))
        self._control.drain(numbers)

    def leaving(self, name: str) -> None:
        """An attention worker is about to end, and asks, with each heartbeat, that its KV be moved: it is drained as
        soon as that is possible."""
        if not self._holders.numbers(name) or name in self._drains:  # it is gone by now, or about to be
            return
        if not (why := self._refusal(name)):
            logger.info("attention worker %s is about to end: its KV moves to the others", name)
            self.begin(name, Future())
        elif name not in self._refused:
            self._refused.add(name)
            logger.warning("attention worker %s is about to end with its KV: %s", name, why)

    def _refusal(self, name: str) -> str:
        numbers = self._holders.numbers(name)
        if not numbers:
            names = ", ".join(dict.fromkeys(self._holders.names.values()))
            return f"no attention worker is called {name!r:.80}; there are {names}"
        if name in self._drains:
            return f"{name} is being drained already"
        if {number for number, _ in self._control.placement.capacity} <= set(numbers):
            return f"{name} is the only attention worker: there is none to move its KV to"
        return ""

    def step(self, in_flight: Set[int]) -> None:
        """Begin moves, and let the workers go that are empty. Batches under way concern the holders `in_flight`."""
        if not self._drains:
            return
        self._vacate()
        for name, drain in list(self._drains.items()):
            if self._control.vacated(drain.numbers) and in_flight.isdisjoint(drain.numbers):
                self._holders.let_go(drain.numbers)
                del self._drains[name]
                moved = self._migration.tokens - drain.copied
                logger.info("attention worker %s is drained: %d tokens were copied meanwhile", name, moved)
                drain.done.set_result(moved)
            elif self._stands_still(drain):
                self._fail(name, f"nothing has moved for {_STILL_S:g} s")

    def _stands_still(self, drain: _Drain) -> bool:
        """Whether a drain has not gone on for too long: then it never would. While a model worker is missing nothing
        can."""
        sequences = self._control.scheduler.running.kept_by(drain.numbers)
        computed, now = sum(sequence.next for sequence in sequences), self._clock()
        progress = self._migration.tokens, len(sequences), computed, self._holders.returns
        if progress != drain.progress:
            drain.progress, drain.since = progress, now
        return now - drain.since > _STILL_S

    def give_up(self, why: Exception) -> None:
        """Every drain ends with an error: a move has failed, or the engine stops. The workers stay."""
        for name in list(self._drains):
            self._fail(name, why)

    def holders_changed(self, change: HolderChange) -> None:
        """After a loss: drains of lost workers end with an error, and those of workers that are needed again."""
        self._refused.difference_update(change.names)
        if change.kind != "lost":
            return
        for name, drain in list(self._drains.items()):
            if name in change.names:
                self._fail(name, "it is lost")
            elif not self._control.placement.draining.issuperset(drain.numbers):
                self._fail(name, "no other attention worker is left")

    def _fail(self, name: str, why: object) -> None:
        drain = self._drains.pop(name)
        self._control.stay(drain.numbers)
        drain.done.set_exception(EngineError(f"{name} could not be drained: {why}"))

    def _vacate(self) -> None:
        """Begin moves away from draining holders. Where none is possible any more, one sequence gives its KV back, and
        is computed again elsewhere."""
        scheduler, draining = self._control.scheduler, self._control.placement.draining
        cache, sequences = scheduler.running.prefix_cache, scheduler.running.kept_by(draining)
        for _ in range(_EVICTED):
            cache.evict(self._control.placement.places(draining))
        moving, stuck = self._migration.under_way, list[ScheduledSequence]()
        for sequence in sequences:
            if len(self._migration.under_way) >= AT_ONCE:
                return
            if sequence.decodes and sequence not in moving and not self._begin(sequence):
                stuck.append(sequence)
        victim = to_preempt(sequences, self._migration.under_way, stuck)
        if victim is not None:
            scheduler.admission.preempt(victim)

    def _begin(self, sequence: ScheduledSequence) -> bool:
        """Have a sequence move to where there is room. False where there is none, nor any after batches under way."""
        scheduler = self._control.scheduler
        room = scheduler.ledger.unpromised() + scheduler.running.prefix_cache.evictable
        layouts = elsewhere(self._control.placement, sequence.layout, room)
        targets = {share.at for layout in layouts for share in layout}
        return any(self._migration.begin(sequence, layout) for layout in layouts) or scheduler.copies.in_use(targets)
