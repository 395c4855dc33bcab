"""The step loop: schedule, announce, execute, record, publish. One batch on one screen.

One thread owns the loop and every torch call. Several batches can be under way, one a lane: while one waits for a
holder another computes. Requests, aborts and news of holders come through an inbox that is drained between batches;
outputs leave once a batch and client, through a sink that never blocks. Knows tokens; knows nothing of text.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lamina.balance import Balance
from lamina.clients import Clients
from lamina.errors import EngineError, InvalidRequest, LaminaError
from lamina.fleet import Fleet
from lamina.lanes import Lanes
from lamina.mover import Mover
from lamina.placement import Holder, Placement
from lamina.recovery import Found, Place
from lamina.request import Plan
from lamina.request import Sequence as Sample
from lamina.scheduler import Scheduler
from lamina.shares import Pages
from lamina.snapshot import Snapshot
from lamina.tally import Tally, survey
from lamina.ticket import Spared, Ticket, unwatched
from lamina.tiers import Tiers
from lamina.types import FinishReason
from lamina.work import work
from lamina_protocols.channels import Credentials
from lamina_protocols.messages import Announced, Usage
from lamina_workers.attention_port import AttentionPort
from lamina_workers.errors import HolderFault, HolderLost, RankLost
from lamina_workers.model_worker import Workers
from lamina_workers.resolver import Waiting
from lamina_workers.routes import HolderShare
from lamina_workers.sampler import Sampled, TokenHistory

if TYPE_CHECKING:
    from lamina.constraints import Grammars
    from lamina.recorder import Recorder
    from lamina_workers.crew import Mate

logger = logging.getLogger("lamina")

MAX_FAULTS = 3  # batches in a row that may fail at a holder before their requests do


class _End(NamedTuple):
    """What `abort` asks for."""

    ticket: Ticket
    sample: int | None
    reason: FinishReason


class _Join(NamedTuple):
    """What `join` tells."""

    port: AttentionPort
    holder: Holder
    credentials: Credentials | None


class _Return(NamedTuple):
    """What `rank_back` tells."""

    mate: Mate


class _Down(NamedTuple):
    """What `rank_gone` tells."""

    rank: int
    why: str
    stays: bool


class _Leave(NamedTuple):
    """What `leave` tells."""

    name: str


class _Drain(NamedTuple):
    """What `drain` asks for."""

    name: str
    done: Future[int]


class _Disclaim(NamedTuple):
    """What `disclaim` asks for."""


class _Look(NamedTuple):
    """What `snapshot` asks for."""

    sink: Callable[[Snapshot], None]


_News = Ticket | _End | _Join | _Leave | _Return | _Down | _Drain | _Disclaim | _Look | None


@dataclass(slots=True)
class _Flag:
    up: bool = False


@dataclass(eq=False, slots=True)
class _Lane:
    """A batch under way. `plan` is None where it only carries operations that the scheduler does not know of."""

    plan: Plan | None
    run: Generator[Waiting, None, None]
    announced: _Flag  # set once every holder has answered
    waiting: Waiting | None = None


class Engine:
    """Requests in, outputs out. Somebody's thread must `run` it; the other public methods are for any thread.

    Without any holder requests wait for one to join, `hope` seconds at most. `on_lost` is told the name of each that
    was given up, `on_rebuilt` how many of how many lost tokens have been computed again. Neither may block.
    """

    def __init__(
        self,
        worker: Workers,
        scheduler: Scheduler,
        placement: Placement,
        clock: Callable[[], float],
        *,
        names: Mapping[int, str] | None = None,
        scratch: Collection[int] = (),
        lanes: Lanes | None = None,
        balance: Balance | None = None,
        grammars: Grammars | None = None,
        hope: float = 60.0,
        recorder: Recorder | None = None,
        on_lost: Callable[[str], None] | None = None,
        on_rebuilt: Callable[[int, int], None] = unwatched,
    ) -> None:
        self._worker = worker
        self._scheduler = scheduler
        self._placement = placement
        self._scratch = frozenset(scratch)  # holders of which the scheduler knows nothing
        mover = Mover(worker, scheduler, placement, clock)
        self._fleet = Fleet(worker, scheduler, placement, dict(names or {}), self._scratch, mover)
        self._tiers = Tiers(balance or Balance(), mover, scheduler, placement, clock)
        self._clock = clock
        self._lane_count = lanes or Lanes(1)
        self._grammars = grammars
        self._hope = hope
        self._clients = Clients(scheduler, clock, grammars, recorder)
        self._on_lost = on_lost
        self._on_rebuilt = on_rebuilt
        self._rebuild: tuple[int, int] | None = None  # tokens computed again before the last loss, and due since
        self._lanes: deque[_Lane] = deque()  # whoever went on last stands at the end
        self._late: list[_Join] = []  # attention workers that came while a rank was missing
        self._full = False  # nothing more can be planned until something happens
        self._deserted: float | None = None  # since when there is no holder
        self._inbox: queue.SimpleQueue[_News] = queue.SimpleQueue()
        self._faults = 0  # since a batch was last complete
        self._tally = Tally(clock())
        self._door = threading.Lock()  # nothing may be submitted once the loop has stopped
        self._stopped = threading.Event()
        self._cause: BaseException | None = None  # of the stop, where nobody asked for it

    # Any thread.

    @property
    def alive(self) -> bool:
        """Whether requests are served, now or as soon as the loop runs."""
        return not self._stopped.is_set()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request. Raises EngineError where the engine has stopped, and InvalidRequest where its text cannot
        be held to what it asks for: that is compiled here, not on the engine's thread."""
        if ticket.params.constrained:
            if self._grammars is None:
                raise InvalidRequest("this engine has no tokenizer; it can hold no text to a schema or grammar")
            ticket.constraints = self._grammars.constraints(ticket.params, ticket.request.n)
        with self._door:
            if self._stopped.is_set():
                raise self._stop_error()
            self._inbox.put(ticket)

    def abort(self, ticket: Ticket, sample: int | None = None, reason: FinishReason = "abort") -> None:
        """End a request, or one sample of it. Harmless where it has ended; what is under way is thrown away."""
        self._inbox.put(_End(ticket, sample, reason))

    def join(self, port: AttentionPort, holder: Holder, credentials: Credentials | None = None) -> None:
        """One attention worker more, by the name of its port. New sequences use it. With several ranks `holder` is that
        of rank 0, and the others connect with `credentials`."""
        self._inbox.put(_Join(port, holder, credentials))

    def leave(self, name: str) -> None:
        """An attention worker is known to be gone. Harmless where that was noticed already."""
        self._inbox.put(_Leave(name))

    def rank_gone(self, rank: int, why: str, stays: bool) -> None:
        """A model worker beyond this one is known to be gone, and comes back unless it `stays` away."""
        self._inbox.put(_Down(rank, why, stays))

    def rank_back(self, mate: Mate) -> None:
        """A model worker that was gone is there again."""
        self._inbox.put(_Return(mate))

    def drain(self, name: str) -> Future[int]:
        """Let an attention worker go once its KV has moved to the others; the result is how many tokens moved."""
        drain = _Drain(name, Future())
        with self._door:
            if self._stopped.is_set():
                raise self._stop_error()
            self._inbox.put(drain)
        return drain.done

    def disclaim(self) -> None:
        """Whoever has not come back by now for a request that an engine before began will not: those are ended."""
        self._inbox.put(_Disclaim())

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        """Have `sink` told, by the engine's thread and between two batches, what the engine is doing; never where it
        has stopped."""
        self._inbox.put(_Look(sink))

    def close(self) -> None:
        """Stop after the batches under way; unfinished requests end with an EngineError."""
        self._inbox.put(None)

    # The engine's thread.

    def recover(self, found: Mapping[Place, Found], last_handle: int) -> tuple[Ticket, ...]:
        """As `Clients.recover`; no handle up to `last_handle` is given to others.

        What is shared among sequences is unknown here, and would be counted for each: so holders that have something
        are asked how much room they have, before anything is planned by it.
        """
        self._scheduler.number_handles_from(last_handle)
        tickets = self._clients.recover(found)
        if not tickets:
            return ()
        shares = {each.number: self._placement.holders[each.number].outgoing() for each in found.values()}
        try:
            _, answers = self._worker.announce_now(shares)
        except HolderFault as fault:  # it is met again, and seen to, by the first batch
            logger.warning("%s", fault)
        else:
            for number, answer in answers.items():
                if answer.accepted:
                    self._placement.holders[number].accepted(shares[number])
            self._scheduler.told(self._free(answers))
        self._clients.rebuild()
        return tickets

    def run(self) -> None:
        """Serve requests until `close`. Every torch call is made here."""
        self._tally.began = self._clock()
        try:
            while self._drain_inbox():
                self.step()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            logger.exception("the engine stopped")
            self._cause = error
        with self._door:
            self._stopped.set()
        while not self._inbox.empty():  # those who came too late are told like the others
            late = self._inbox.get()
            if isinstance(late, Ticket):
                self._clients.tickets[late.request.id] = late
            elif isinstance(late, _Drain):
                late.done.set_exception(self._stop_error())
        for lane in self._lanes:
            lane.run.close()
        self._clients.stopped(self._stop_error)

    def _stop_error(self) -> EngineError:
        error = EngineError("the engine has stopped" + (f": {self._cause!r}" if self._cause else ""))
        error.__cause__ = self._cause
        return error

    def _drain_inbox(self) -> bool:
        """Do what was asked since the last batch; wait only where there is nothing else to do."""
        while True:
            self._count_the_stranded()
            work = self._scheduler.has_work or self._placement.pending or self._tiers.busy
            waits = self._full and (self._fleet.halted or bool(self._scheduler.stranded))
            idle = not self._lanes and (not work or waits)
            since = self._clock() if idle else 0.0
            try:
                news = self._inbox.get(block=idle, timeout=self._patience() if idle else None)
            except queue.Empty:
                if idle:
                    self._despair()
                return True
            finally:
                if idle:
                    self._tally.idle_seconds += self._clock() - since
            if isinstance(news, _Look):  # it changes nothing
                self._look(news.sink)
                continue
            self._full = False
            match news:
                case None:
                    return False
                case Ticket():
                    self._clients.add(news)
                case _End():
                    self._clients.end(*news)
                case _Join():
                    self._join(*news)
                case _Leave(name):
                    self._leave(name)
                case _Return(mate):
                    self._rank_back(mate)
                case _Down(rank, why, stays) if rank in self._worker.missing:  # a replica is not missed
                    if stays:
                        raise EngineError(f"model worker {rank} is gone and stays away: {why}")
                    if self._deserted is None:
                        self._halt()
                case _Drain(name, done):
                    self._drain(name, done)
                case _Disclaim():
                    self._clients.disclaim()

    def _look(self, sink: Callable[[Snapshot], None]) -> None:
        self._tally.lanes, self._tally.attention_seconds = self._lane_count.count, self._worker.attention_seconds
        self._tally.local_share = self._tiers.local_share
        links, names = self._worker.links(), self._fleet.names
        taken = survey(self._tally, self._scheduler, self._placement, links, names, self._scratch, self._clock())
        try:
            sink(taken)
        except Exception:  # it may be anything
            logger.exception("a client could not take its snapshot")

    def step(self) -> None:
        """Begin batches where lanes are free, and go on with one whose reply has come: with the one that has waited
        longest where none has."""
        if self._worker.missing:
            self._full = True
            return
        self._move()
        while len(self._lanes) < self._lane_count.count and not self._full:
            plan = self._scheduler.plan(self._lane_count.count)
            if plan is None and (self._lanes or not self._placement.pending):
                self._full = True
                break
            self._lanes.append(self._begin(plan))
        if not self._lanes:
            return
        lane = next((lane for lane in self._lanes if lane.waiting is None or lane.waiting.over()), self._lanes[0])
        self._lanes.remove(lane)
        self._lanes.append(lane)
        self._advance(lane)

    def _move(self) -> None:
        """Let sequences change their place, between batches."""
        if self._tiers.busy:
            self._full = False  # what has moved away leaves room
        try:
            self._tiers.step()
        except HolderFault as fault:
            logger.warning("moving sequences failed: %s", fault)
            self._start_over()

    def _start_over(self) -> None:
        """A holder failed outside of any batch. Where it is not lost, it may have lost what it was to store."""
        self._abandon()
        if self._worker.missing:
            self._halt()
        elif gone := self._worker.lost():
            self._lose(gone)
        else:
            self._scheduler.recompute()

    def _advance(self, lane: _Lane) -> None:
        """Go on with a batch until it is over, or until it waits while there are others to go on with."""
        try:
            lane.waiting = next(lane.run)
            while len(self._lanes) == 1 == self._lane_count.count:
                lane.waiting = next(lane.run)
            return
        except StopIteration:
            self._over(lane)
        except RankLost as loss:
            logger.warning("%s", loss)
            self._faults += 1
            if self._faults >= 3 * MAX_FAULTS and not self._worker.missing:
                raise EngineError(f"the model workers failed {self._faults} times in a row: {loss}") from loss
            self._halt()
        except HolderLost as loss:
            if gone := self._worker.lost():
                logger.warning("%s", loss)
                self._lose(gone)
            else:  # the local one, which cannot be lost
                self._recover(lane, loss)
        except HolderFault as fault:
            self._recover(lane, fault)

    def _over(self, lane: _Lane) -> None:
        self._lanes.remove(lane)
        self._full = False

    def _begin(self, plan: Plan | None) -> _Lane:
        rows = plan.rows if plan is not None else ()
        # Looked up now: the batch goes on for those that end meanwhile.
        tickets = {row.sequence: self._clients.tickets[row.sequence.request.id] for row in rows}
        histories = {s: history for s in tickets if (history := self._clients.histories.get(s)) is not None}
        announced = _Flag()
        return _Lane(plan, self._batch(plan, tickets, histories, announced), announced)

    def _batch(
        self,
        plan: Plan | None,
        tickets: Mapping[Sample, Ticket],
        histories: Mapping[Sample, TokenHistory],
        announced: _Flag,
    ) -> Generator[Waiting, None, None]:
        """One batch: from the scheduler's plan to the outputs that its clients get."""
        shares = self._placement.place(plan) if plan is not None else self._placement.outgoing()
        batch, answers = yield from self._worker.announce(shares)
        announced.up = True
        for number, answer in answers.items():
            if answer.accepted:
                self._placement.holders[number].accepted(shares[number])
        if plan is None:
            self._scheduler.told(self._free(answers))
            return
        if self._accepted(plan, shares, answers) and plan.rows:
            self._mark_scheduled(tickets)
            suspends = self._lane_count.count > 1
            sampled = yield from self._worker.execute(
                work(plan, tickets, histories, self._clients.constraints), batch, shares, suspends
            )
            lanes = self._lane_count
            self._tiers.completed(plan, self._worker.times, lanes.count, lanes.trying)
            self._record(plan, sampled)
        self._faults = 0

    def _accepted(self, plan: Plan, shares: Mapping[int, HolderShare], answers: Mapping[int, Announced]) -> bool:
        """Whether every holder accepts. Where one refuses, the scheduler has made room for its next plan."""
        free = self._free(answers)
        self._tally.scratch_free |= {n: answer.free_pages for n, answer in answers.items() if n in self._scratch}
        if all(answer.accepted for answer in answers.values()):
            self._scheduler.accepted(plan, free, self._floors(plan, shares, answers))
            self._note_usages(plan, shares, answers)
            return True
        self._tiers.abandon()  # what moves must not keep from others what they cannot do without
        reason = next(answer.reason for answer in answers.values() if not answer.accepted)
        for sequence in self._scheduler.refused(plan, free):
            if ticket := self._clients.of(sequence):
                self._clients.fail(ticket, EngineError(f"the holders have no room: {reason}"))
        return False

    def _free(self, answers: Mapping[int, Announced]) -> Pages:
        """Pages left, of the holders that the scheduler knows."""
        return Pages({number: answer.free_pages for number, answer in answers.items() if number not in self._scratch})

    def _floors(self, plan: Plan, shares: Mapping[int, HolderShare], answers: Mapping[int, Announced]) -> list[int]:
        """Per row the highest floor of its parts; what scratch holders have only for now is not counted."""
        remote = {number: answer for number, answer in answers.items() if number not in self._scratch}
        asked = Counter(route.source for number in remote for route in shares[number].routes)
        # A part that was not asked, its range being full, has let go of no more than before.
        floors = [row.sequence.floor if asked[at] < len(row.sequence.layout) else 0 for at, row in enumerate(plan.rows)]
        for number, answer in remote.items():
            for route, floor in zip(shares[number].routes, answer.floors, strict=True):
                floors[route.source] = max(floors[route.source], floor)
        return floors

    def _note_usages(self, plan: Plan, shares: Mapping[int, HolderShare], answers: Mapping[int, Announced]) -> None:
        """What policies have spared each request, as those parts tell that were asked."""
        told: dict[str, list[Usage]] = {}
        for number, answer in answers.items():
            if number not in self._scratch and len(answer.usages) == len(shares[number].routes):
                for route, usage in zip(shares[number].routes, answer.usages, strict=True):
                    told.setdefault(plan.rows[route.source].sequence.request.id, []).append(usage)
        for request_id, usages in told.items():
            if ticket := self._clients.tickets.get(request_id):
                columns = [[getattr(usage, name) for usage in usages] for name in Spared._fields]
                spared = Spared(*map(sum, columns))._replace(worst=max(columns[Spared._fields.index("worst")]))
                self._tally.spared(ticket.spared, spared)
                ticket.spared = spared

    # What goes wrong.

    def _recover(self, lane: _Lane, fault: HolderFault) -> None:
        """Plan the batch again; where that keeps failing give up its requests, and at last everything."""
        self._faults += 1
        self._tally.failed_batches += lane.announced.up
        logger.warning("a batch failed and runs again: %s", fault)
        if lane.announced.up:
            self._over(lane)
            if lane.plan is not None:
                self._scheduler.drop(lane.plan)
        else:  # something that had no reply of its own was lost: perhaps stored keys
            self._abandon()
        if self._faults % MAX_FAULTS == 0 and lane.plan is not None:
            for request_id in {row.sequence.request.id for row in lane.plan.rows}:
                error = EngineError(f"a holder failed {MAX_FAULTS} times in a row: {fault}")
                if ticket := self._clients.tickets.get(request_id):
                    self._clients.fail(ticket, error, fault)
        if self._faults >= 3 * MAX_FAULTS:
            raise EngineError(f"a holder failed {self._faults} times in a row: {fault}") from fault
        if not lane.announced.up:
            self._scheduler.recompute()

    def _abandon(self) -> None:
        """Give up every batch under way, and every move. Nothing of them counts; they are planned again."""
        self._tiers.abandon()
        self._tally.failed_batches += len(self._lanes)
        for lane in self._lanes:
            lane.run.close()
            if lane.plan is not None:
                self._scheduler.drop(lane.plan)
        self._lanes.clear()
        self._full = False
        self._worker.next_epoch()

    def _lose(self, numbers: list[int]) -> None:
        """Holders are gone, and their attention workers with them: what those kept is rebuilt elsewhere, and the
        batches under way run again."""
        self._abandon()
        numbers = self._fleet.companions(numbers)
        names = list(dict.fromkeys(self._fleet.names[number] for number in numbers))
        self._tally.lost(names)
        due = self._fleet.lose(numbers)
        self._rebuild = (self._scheduler.counters.rebuilt_tokens, due) if due else None
        if self._on_lost is not None:
            for name in names:
                self._on_lost(name)
        self._tiers.changed()
        if self._fleet.empty:
            self._deserted = self._clock()

    def _leave(self, name: str) -> None:
        if number := [number for number, known in self._fleet.names.items() if known == name]:
            self._lose(number)

    def _join(self, port: AttentionPort, holder: Holder, credentials: Credentials | None) -> None:
        if self._worker.missing:  # who could not use it yet
            self._late.append(_Join(port, holder, credentials))
            return
        try:
            self._fleet.join(port, holder, credentials)
        except HolderFault as fault:  # another rank cannot use it
            logger.warning("%s", fault)
            port.close()
            if self._on_lost is not None:
                self._on_lost(port.name)
            return
        self._tally.joined()
        self._tiers.changed()
        self._deserted = self._deserted if self._fleet.halted else None

    def _halt(self) -> None:
        """A rank is gone: nothing can be computed before it is back."""
        self._abandon()
        self._deserted = self._clock()

    def _rank_back(self, mate: Mate) -> None:
        """A rank is there again. Its seats at attention workers have what they had."""
        self._abandon()
        try:
            back = self._worker.returned(mate)
        except RankLost as loss:
            logger.warning("%s", loss)
            return
        self._fleet.emptied(back.pools)
        if gone := [*back.gone, *self._fleet.torn(back.kept)]:
            self._lose(gone)
        self._tally.returned += 1
        late, self._late = self._late, []
        for join in late:
            self._join(*join)
        self._deserted = self._deserted if self._fleet.halted else None

    def _patience(self) -> float | None:
        """Seconds that requests may still wait for a holder to join; None where there are holders, or no requests."""
        if self._deserted is None or not self._clients.tickets:
            return None
        return max(0.0, self._deserted + self._hope - self._clock())

    def _despair(self) -> None:
        """Nobody has joined in time: whoever waits for that is told."""
        self._full = False
        stranded = {sequence.request.id for sequence in self._scheduler.stranded}
        for ticket in [t for t in self._clients.tickets.values() if self._fleet.halted or t.request.id in stranded]:
            left = "no attention worker is left" if self._fleet.empty else "no holder that is left has room for this"
            if missing := self._worker.missing:
                message = f"model worker {', '.join(map(str, missing))} has not come back for {self._hope:g} s"
                self._clients.fail(ticket, EngineError(message))
                continue
            message = f"{left}, and none has joined for {self._hope:g} s; start an attention worker and try again"
            self._clients.fail(ticket, EngineError(message))

    def _count_the_stranded(self) -> None:
        """Those whom no holder can keep any more wait for one that can, others go on meanwhile."""
        if self._fleet.halted:
            return
        if not self._scheduler.stranded:
            self._deserted = None
        elif self._deserted is None:
            self._deserted = self._clock()
        elif self._clock() > self._deserted + self._hope:
            self._despair()

    def _drain(self, name: str, done: Future[int]) -> None:
        while self._lanes:
            self._advance(self._lanes[0])
        self._tiers.abandon()
        try:
            done.set_result(self._fleet.drain(name))
            self._tiers.changed()
        except HolderFault as fault:
            done.set_exception(EngineError(f"{name} could not be drained: {fault}"))
            self._start_over()
        except LaminaError as error:
            done.set_exception(error)

    # What a batch needs, and what comes of it.

    def _mark_scheduled(self, tickets: Mapping[Sample, Ticket]) -> None:
        for sequence, ticket in tickets.items():
            if ticket.scheduled is None:
                ticket.scheduled, ticket.cached_tokens = self._clock(), sequence.reused

    def _record(self, plan: Plan, sampled: Sampled) -> None:
        rows = [row for row in plan.rows if row.sample]
        for row, token in zip(rows, sampled.tokens, strict=True):
            if token is None:
                self._tally.corrupted += 1
                self._scheduler.end(row.sequence, "abort", keep=False)
                self._clients.forget(row.sequence)
                if ticket := self._clients.of(row.sequence):
                    self._clients.fail(ticket, EngineError("the model's logits are not finite for this request"))
        prompt_tokens = self._clients.follow_prefill(plan)
        reports = dict(zip((row.sequence for row in rows), sampled.logprobs, strict=True))
        now = self._clock()
        outcomes = self._scheduler.record(plan, [token or 0 for token in sampled.tokens])
        self._placement.recorded(plan)
        self._report_rebuild()
        prefill = any(row.count > 1 for row in plan.rows)
        self._tally.complete(sum(row.count for row in plan.rows), prompt_tokens, len(outcomes))
        if self._tiers.all_local:
            self._lane_count.alone()
        else:
            mixed, attended = prefill or not self._tiers.settled, self._worker.attention_seconds
            self._lane_count.completed(len(outcomes), len(self._clients.tickets), mixed, now, attended)
        self._clients.record(plan, outcomes, reports)

    def _report_rebuild(self) -> None:
        if self._rebuild is None:
            return
        before, due = self._rebuild
        done = self._scheduler.counters.rebuilt_tokens - before
        self._on_rebuilt(min(done, due), due)
        if done >= due:
            logger.info("%d tokens of lost KV are computed again", due)
            self._rebuild = None
