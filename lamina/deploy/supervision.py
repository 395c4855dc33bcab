"""Workers that are started, watched and started again, one worker a slot.

A `Slot` has a worker, or the time of its next start, which `Backoff` puts off a little longer after each end. Both are
pure: the caller passes the time of any steady clock, in seconds. `SlotLoop` is the loop of one thread over some slots:
it starts what is due, makes the calls of other threads, and acts on what is late. The supervisor of a server is made
from it, and `SlotSupervisor`, which runs the workers of one engine on a thread of its own. `AttentionSupervisor` and
`ModelSupervisor` add what their engine gets to know. What runs a worker, a child process or a Ray actor, is in the
classes made from these two.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lamina.deploy.worker_events import (
    WAITING,
    MembershipEvents,
    OnEnded,
    OnJoined,
    OnLeft,
    WorkerAddress,
    WorkerStatus,
)
from lamina.errors import EngineError
from lamina.system.child_process import GRACE
from lamina.system.progress import Progress
from lamina_protocols.channels.channels import Credentials

logger = logging.getLogger("lamina")

_STANDBY_AFTER = 5.0  # seconds, in which those that are needed have the cores

Restarted = TypeVar("Restarted")


@dataclass(eq=False)
class Backoff:
    """How long one worker waits for its next start, so that a worker that always fails does not take the machine.

    The first delay is `first` seconds. It doubles with each restart of the last `window` seconds, of which there are
    `limit` at most: one more has to wait until the window has room, where it goes on for `ever`, else there is none.
    """

    first: float = 0.5
    limit: int = 6
    window: float = 60.0
    ever: bool = False
    _restarts: deque[float] = field(default_factory=deque)

    def delay(self, now: float) -> float | None:
        """Seconds from `now` to the next start, which is counted. None: there were too many."""
        while self._restarts and self._restarts[0] <= now - self.window:
            self._restarts.popleft()
        seconds = self.first * 2.0 ** len(self._restarts)
        if len(self._restarts) >= self.limit:
            if not self.ever:
                return None
            seconds = self._restarts.popleft() + self.window - now
        self._restarts.append(now + seconds)
        return seconds


def incarnation(name: str, restarts: int) -> str:
    """The name of a worker after so many restarts."""
    return name if restarts == 0 else f"{name}.{restarts}"


@dataclass(eq=False)
class Slot(Generic[Restarted]):
    """Room for one worker: the worker, and when it is late, or the time of the next start.

    A slot is started while `is_due`, has its worker until `ended`, and is due again after a delay, or never. A `vacant`
    slot is not counted until it is opened: it has no worker, one that is about to end, or a standby.
    """

    base: str  # the name of its first worker
    number: int = 0
    worker: Restarted | None = None
    due: float | None = 0.0  # when the next worker starts, while there is none; None: never
    restarts: int = 0
    vacant: bool = False
    deadline: float | None = None  # when its worker must be up, or must have ended
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def name(self) -> str:
        """Of the worker, or of the next one. No two workers of a slot have the same."""
        return incarnation(self.base, self.restarts)

    @property
    def next_start(self) -> float | None:
        """When a worker is to be started; None: there is one, or there will be none."""
        return self.due if self.worker is None else None

    def is_due(self, now: float) -> bool:
        """Whether a worker is to be started."""
        return self.next_start is not None and self.next_start <= now

    def ended(self, now: float) -> str:
        """The worker has ended, or could not be started: plan the next start. Says when that is, for people."""
        delay = self.backoff.delay(now)
        self.worker = None
        self.restarts += 1
        self.due = None if delay is None else now + delay
        return "too often: it stays down" if delay is None else f"it starts again in {delay:g} s"

    def vacate(self) -> None:
        """Its worker is not needed any more, and no other is started."""
        self.vacant, self.due = True, None

    def open(self) -> None:
        """A worker is needed in a vacant slot."""
        self.vacant, self.due = False, 0.0

    def left(self) -> None:
        """The worker has ended, as it was told to."""
        self.worker = None
        self.restarts += 1

    def give_up(self) -> None:
        """No worker is started here any more."""
        self.worker = self.due = None


@dataclass(eq=False, kw_only=True)
class Worker:
    """What the supervisor knows of a worker; the classes made from it add what runs it."""

    up: bool = False
    address: WorkerAddress | None = None  # of an attention worker that is up
    pid: int | None = None
    given_up: bool = False  # by the engine, which is not notified of its end
    retired: bool = False  # it is empty, and was told to end
    standby: WorkerAddress | None = None  # of an attention worker that is ready, and of which the engine does not know


class SlotLoop(ABC, Generic[Restarted]):
    """A loop over `slots`: each turn is `_start_due`, `_watch`, `_check_deadlines`. `clock` is in seconds.

    One thread runs every method with an underscore; `_calls` is how other threads reach it.
    """

    def __init__(self, slots: Sequence[Slot[Restarted]], clock: Callable[[], float] = time.monotonic) -> None:
        self._slots = slots
        self._clock = clock
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed = threading.Event()  # nothing is started any more

    @abstractmethod
    def _launch(self, slot: Slot[Restarted]) -> Restarted | None:
        """Start a worker; None where none is needed after all. Raises OSError where it cannot be started."""

    @abstractmethod
    def _not_launched(self, slot: Slot[Restarted], error: OSError) -> None:
        """A worker could not be started."""

    @abstractmethod
    def _late(self, slot: Slot[Restarted], worker: Restarted) -> None:
        """A worker's deadline is over."""

    def _turn(self) -> None:
        self._start_due()
        self._watch()
        self._check_deadlines()

    def _start_due(self) -> None:
        now = self._clock()
        for slot in self._slots:
            if slot.is_due(now) and not self._closed.is_set():
                slot.deadline = None
                try:
                    slot.worker = self._launch(slot)
                except OSError as error:
                    self._not_launched(slot, error)

    def _watch(self) -> None:
        """Take what happens until the next start or deadline."""
        times = [time for time in self._times() if time is not None]
        self._take(max(0.0, min(times) - self._clock()) if times else None)

    def _times(self) -> list[float | None]:
        """When there is something to do."""
        starts = [] if self._closed.is_set() else [slot.next_start for slot in self._slots]
        return starts + [slot.deadline for slot in self._slots if slot.worker is not None]

    def _take(self, seconds: float | None) -> None:
        """Make the calls of other threads; wait so long for the first (None: without limit)."""
        with suppress(queue.Empty):
            self._calls.get(timeout=seconds)()
            while not self._closed.is_set():
                self._calls.get_nowait()()

    def _check_deadlines(self) -> None:
        now = self._clock()
        for slot in self._slots:
            if slot.worker is not None and slot.deadline is not None and slot.deadline <= now:
                slot.deadline = None
                self._late(slot, slot.worker)


W = TypeVar("W", bound=Worker)


class SlotSupervisor(SlotLoop[W]):
    """`kind` workers ("attention", "model"), one for each of `numbers`. `clock` is in seconds."""

    def __init__(self, kind: str, numbers: Iterable[int], clock: Callable[[], float]) -> None:
        super().__init__([Slot(f"{kind}-{number}", number, backoff=Backoff(ever=True)) for number in numbers], clock)
        self._kind = kind
        self._thread = threading.Thread(target=self._supervise, name=f"lamina-{kind}-workers", daemon=True)

    def lost(self, name: str) -> None:
        """The engine has given this worker up: it is ended, if it is still there. Unknown names are ignored."""
        self._calls.put(lambda: self._give_up(name))

    def status(self) -> tuple[WorkerStatus, ...]:
        """Every slot as it stands, in order."""
        return tuple(self._status(slot, slot.worker) for slot in self._slots if not slot.vacant)

    def close(self) -> None:
        """End all. Harmless the second time."""
        self._closed.set()
        self._calls.put(lambda: None)  # wakes the thread
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    @staticmethod
    def _status(slot: Slot[W], worker: W | None) -> WorkerStatus:
        if worker is None:
            return WorkerStatus(slot.name, None, "given up" if slot.due is None else "lost", slot.restarts)
        address = None if worker.address is None else worker.address.address
        return WorkerStatus(slot.name, address, "up" if worker.up else "starting", slot.restarts, worker.pid)

    # How a worker is run.

    @abstractmethod
    def _kill(self, worker: W) -> None:
        """End a worker at once; its end is noticed as any other."""

    @abstractmethod
    def _end(self, workers: Sequence[W]) -> None:
        """End all workers that are there, politely."""

    def _overdue(self, slot: Slot[W], worker: W) -> None:
        """A worker is not up at its deadline."""
        self._kill(worker)

    @abstractmethod
    def _broken(self, error: Exception) -> None:
        """The workers are no longer watched."""

    # The thread.

    def _supervise(self) -> None:
        try:
            while not self._closed.is_set():
                self._turn()
        except Exception as error:  # the workers must end, and a waiting thread must get the error
            logger.exception("the %s workers are no longer watched", self._kind)
            self._broken(error)
        finally:
            self._end([slot.worker for slot in self._slots if slot.worker is not None])
            for slot in self._slots:
                slot.give_up()

    def _not_launched(self, slot: Slot[W], error: OSError) -> None:
        self._ended(slot, f"it cannot be started: {error}")

    def _late(self, slot: Slot[W], worker: W) -> None:
        self._kill(worker) if worker.retired else self._overdue(slot, worker)

    def _give_up(self, name: str) -> None:
        for slot in self._slots:
            if slot.worker is not None and slot.name == name:
                slot.worker.given_up = True
                self._kill(slot.worker)

    def _ended(self, slot: Slot[W], how: str, last_lines: Sequence[str] = ()) -> None:
        """A worker has ended, with these as its last lines of output, or it could not be started."""
        name = slot.name
        then = self._vacate(slot)
        logger.warning("%s", "\n  ".join([f"{name} ended, {how}; {then}", *last_lines]))

    def _vacate(self, slot: Slot[W]) -> str:
        """Plan the next start. Says when that is, for people."""
        return slot.ended(self._clock())


class AttentionSupervisor(SlotSupervisor[W]):
    """`count` attention workers at first, and `most` at most (None: `count`): an `AttentionWorkers`.

    A worker that ends before it was up ends the start of all. Where there may be more, one that `keeps_standby` has a
    standby worker ready for the next time that more are asked for.
    """

    keeps_standby = False

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic, *, most: int | None = None) -> None:
        super().__init__("attention", range(max(count, most or 0)), clock)
        for slot in self._slots[count:]:
            slot.vacate()
        self.optional = count == 0
        self._membership = MembershipEvents()
        self._progress: Progress | None = None
        self._started = threading.Event()  # all are up, or one has failed
        self._failure: EngineError | None = None

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        self._progress = progress
        self._thread.start()
        try:
            self._started.wait()
            if self._failure is not None:
                raise self._failure
        except BaseException:  # Ctrl-C included
            self.close()
            raise
        return tuple(address for address, _ in self.described() if address is not None)

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        self._membership.listen(on_joined, on_left)
        self._calls.put(self._membership.deliver)

    def grow(self, count: int) -> None:
        self._calls.put(lambda: self._open(count))

    def retire(self, name: str) -> None:
        self._calls.put(lambda: self._let_go(name))

    def drained(self, name: str) -> None:
        """Nothing to do: the end of a process that was started here is noticed."""

    def described(self) -> tuple[tuple[WorkerAddress | None, WorkerStatus], ...]:
        """The status of every slot, and the address of its worker, if one is up."""
        workers = [(slot, slot.worker) for slot in self._slots if not slot.vacant]
        return tuple(
            (None if worker is None else worker.address, self._status(slot, worker)) for slot, worker in workers
        )

    # More and fewer.

    @property
    def _count(self) -> int:
        """How many workers there are, or are to be."""
        return sum(not slot.vacant for slot in self._slots)

    def _open(self, count: int) -> None:
        vacant = [slot for slot in self._slots if slot.vacant]
        vacant.sort(key=lambda slot: slot.worker is None or slot.worker.retired)  # a standby first
        for slot in vacant[: max(0, count - self._count)]:
            slot.open()
            if (worker := slot.worker) is not None and worker.standby is not None:
                self._joined(worker, worker.standby)
        self._prepare()

    def _let_go(self, name: str) -> None:
        for slot in self._slots:
            worker = slot.worker
            if worker is not None and slot.name == name and not worker.retired:
                slot.vacate()
                worker.retired, slot.deadline = True, self._clock() + GRACE
                self._dismiss(worker)

    def _prepare(self) -> None:
        """Have a standby worker soon, if there is none."""
        vacant = [slot for slot in self._slots if slot.vacant]
        has_standby = any(slot.due is not None or (slot.worker and not slot.worker.retired) for slot in vacant)
        empty = next((slot for slot in vacant if slot.worker is None), None)
        if self.keeps_standby and not has_standby and empty is not None:
            empty.due = self._clock() + _STANDBY_AFTER

    @abstractmethod
    def _dismiss(self, worker: W) -> None:
        """Have a worker that keeps nothing end in order; its end is noticed as any other."""

    # The start.

    def _supervise(self) -> None:
        if not self._count:
            self._all_up()
        super()._supervise()
        self._fail("closed while the attention workers were starting")

    def _all_up(self) -> None:
        self._started.set()
        self._prepare()

    def _fail(self, why: str, cause: Exception | None = None) -> None:
        """End the start of all; no effect after it."""
        if not self._started.is_set():
            self._failure = EngineError(why)
            self._failure.__cause__ = cause
            self._closed.set()
            self._started.set()

    def _broken(self, error: Exception) -> None:
        self._fail(f"cannot run the attention workers: {error}", error)

    def _not_launched(self, slot: Slot[W], error: OSError) -> None:
        if self._started.is_set():
            super()._not_launched(slot, error)
        else:
            self._fail(f"cannot start {slot.name}: {error}", error)

    def _joined(self, worker: W, address: WorkerAddress) -> None:
        """A worker is up. No effect the second time."""
        if worker.up:
            return
        slot = next((slot for slot in self._slots if slot.worker is worker), None)
        if slot is not None:
            slot.deadline = None
            if slot.vacant:
                worker.standby = address
                return
        worker.up, worker.address = True, address
        logger.info("%s: process %s at %s", address.name, worker.pid, address.address)
        if self._started.is_set():
            self._membership.joined(address)
            return
        up = sum(slot.worker is not None and slot.worker.up for slot in self._slots)
        if self._progress is not None:
            self._progress(WAITING, up, self._count)
        if up == self._count:
            self._all_up()

    def _ended(self, slot: Slot[W], how: str, last_lines: Sequence[str] = ()) -> None:
        name, worker = slot.name, slot.worker
        if worker is not None and worker.retired:
            logger.info("%s is not needed any more, and has ended", name)
            slot.left()
            self._prepare()
            return
        if not self._started.is_set() and (worker is None or not worker.up):
            self._fail("\n  ".join([f"{name} did not start, {how}", *last_lines]))
            return
        super()._ended(slot, how, last_lines)  # a standby is started again as others are
        if self._started.is_set() and worker is not None and worker.up and not worker.given_up:
            self._membership.left(name)


class ModelSupervisor(SlotSupervisor[W]):
    """The processes of model workers 1 to `count` - 1 of one engine.

    Model worker 0 listens for them at `host` and shows `credentials`. `host` None: it listens at a Unix socket.
    """

    host: str | None = None
    credentials: Credentials | None = None

    def __init__(self, count: int) -> None:
        super().__init__("model", range(1, count), time.monotonic)

    def start(self, address: str, invite: Callable[[int, str], bytes], on_ended: OnEnded) -> None:
        """Have all started, each to connect to `address` with the secret that `invite(rank, name)` gives. An ended
        process is reported to `on_ended`, and started again after a delay under another name. Both are called on one
        thread. Returns at once."""
        self._address, self._invite, self._on_ended = address, invite, on_ended
        self._thread.start()

    def _ended(self, slot: Slot[W], how: str, last_lines: Sequence[str] = ()) -> None:
        name = slot.name
        super()._ended(slot, how, last_lines)
        self._on_ended(slot.number, name, "\n  ".join([how, *last_lines]), False)

    def _broken(self, error: Exception) -> None:
        for slot in self._slots:
            self._on_ended(slot.number, slot.name, f"it is no longer watched: {error}", True)
