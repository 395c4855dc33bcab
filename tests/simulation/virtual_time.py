"""Virtual time in one thread: what is due next happens next, and nothing else takes time.

A `Process` is the life of one process of the cluster. Its threads are tasks: greenlets that run until they wait, so
code that blocks runs here as it is. A process that is killed does nothing any more, whatever it was about to do; one
that stands still goes on where it was.
"""

from __future__ import annotations

import heapq
import itertools
import sys
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet


class Killed(BaseException):
    """The process is gone. It unwinds a task; whatever the task then tries to do outside has no effect."""


def ignore_killed() -> None:
    """Report no `Killed` that nothing could catch. A killed process leaves generators; they end where they are
    collected, maybe in a test of something else, at edges that refuse what a killed process does."""
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Killed):
            report(unraisable)

    sys.unraisablehook = hook


class Time:
    """What is due, by second. `stop` ends `run` at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._hub = getcurrent()
        self.stopped = False

    def at(self, second: float, do: Callable[..., None], *arguments: Any) -> None:
        """Call `do` at a second, or next where that is past."""
        heapq.heappush(self.due, (max(second, self.now), next(self._order), do, arguments))

    def after(self, seconds: float, do: Callable[..., None], *arguments: Any) -> None:
        """Call `do` in so many seconds."""
        heapq.heappush(self.due, (self.now + seconds, next(self._order), do, arguments))

    def run(self, end: float) -> None:
        """Let time pass until there is nothing due, `end` is over, or something calls `stop`."""
        self._hub = getcurrent()
        due = self.due
        while due and not self.stopped:
            second, _, do, arguments = heapq.heappop(due)
            if second > end:
                self.now = end
                return
            self.now = second
            do(*arguments)

    def switch_out(self) -> bool:
        """Let other things happen; returns what the task is resumed with."""
        resumed: bool = self._hub.switch()
        return resumed

    def stop(self) -> None:
        """Let `run` return."""
        self.stopped = True


class Task:
    """A thread of a process. `join` waits for its end."""

    def __init__(self, process: Process, do: Callable[[], None], name: str) -> None:
        self.name = name
        self.over = False
        self.process = process
        self.ended = Wake(process)
        self.waits = 0  # numbers its waits, so that what wakes an earlier one does nothing
        self._do = do
        self.greenlet = greenlet(self._run)

    def join(self) -> None:
        if not self.over and getcurrent() is not self.greenlet:
            self.ended.wait()

    def _run(self, started: bool) -> None:
        try:
            self._do()
        except Killed:
            pass
        except Exception as error:  # noqa: BLE001  # any error of a thread is the process's to report
            self.process.failed(self, error)
        finally:
            self.over = True
            self.process.tasks.discard(self)
            self.ended.set()


class Wake:
    """As `threading.Event`, for the tasks of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._set = False
        self._waiting: list[tuple[Task, int]] = []

    def set(self) -> None:
        self._set = True
        self.notify()

    def clear(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def notify(self) -> None:
        """Wake whoever waits, without being set."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for task, number in waiting:
                self._process.resume(task, number, True)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is set, or was notified, within `timeout` seconds."""
        process = self._process
        process.check()
        if self._set:
            return True
        return process.park(self, timeout)

    def add(self, task: Task, number: int) -> None:
        self._waiting.append((task, number))


class Process:
    """One process. It implements `lamina_workers.process.runtime.Runtime`. `failed` is told of a thread that ended by
    an error."""

    def __init__(self, time: Time, name: str, failed: Callable[[Task, Exception], None]) -> None:
        self.time = time
        self.name = name
        self.alive = True
        self.frozen_until = 0.0
        self.tasks: set[Task] = set()
        self.failed = failed
        self._by_greenlet: dict[Any, Task] = {}

    # As a `Runtime`.

    def monotonic(self) -> float:
        return self.time.now

    def sleep(self, seconds: float) -> None:
        self.check()
        self.park(None, seconds)

    def signal(self) -> Wake:
        return Wake(self)

    def start(self, do: Callable[[], None], name: str, daemon: bool = True) -> Task:
        task = Task(self, do, name)
        self.tasks.add(task)
        self._by_greenlet[task.greenlet] = task
        self.time.after(0.0, self._switch, task, 0, True)
        return task

    # Life.

    def check(self) -> None:
        """Raise Killed where the process is gone, or the caller belongs to none of its tasks."""
        if not self.alive:
            raise Killed

    def kill(self) -> None:
        """The process is gone at once. Its tasks unwind, and can do nothing more."""
        if not self.alive:
            return
        self.alive = False
        current = getcurrent()
        for task in sorted(self.tasks, key=lambda each: each.name):
            if task.greenlet is not current and not task.over:
                if task.greenlet:  # it has begun
                    self.time.after(0.0, self._throw, task)
                else:
                    self.tasks.discard(task)
        self._by_greenlet.clear()

    def freeze(self, until: float) -> None:
        """Stand still until that second."""
        self.frozen_until = max(self.frozen_until, until)

    # Waiting.

    def park(self, wake: Wake | None, timeout: float | None) -> bool:
        """Wait for that, or for so many seconds. Whether it came."""
        task = self._by_greenlet.get(getcurrent())
        if task is None:
            raise RuntimeError(f"a wait of {self.name} outside of its tasks")
        task.waits += 1
        if wake is not None:
            wake.add(task, task.waits)
        if timeout is not None:
            self.time.after(max(0.0, timeout), self._switch, task, task.waits, False)
        came = self.time.switch_out()
        self.check()
        return came

    def resume(self, task: Task, number: int, came: bool) -> None:
        """Go on with a task that has not gone on since the wait of that number."""
        if self.alive and task.waits == number:
            self.time.after(0.0, self._switch, task, number, came)

    def _switch(self, task: Task, number: int, came: bool) -> None:
        if not self.alive or task.waits != number or task.over:
            return
        if self.time.now < self.frozen_until:
            self.time.at(self.frozen_until, self._switch, task, number, came)
            return
        task.waits += 1
        task.greenlet.parent = getcurrent()
        task.greenlet.switch(came)

    def _throw(self, task: Task) -> None:
        if not task.over:
            task.greenlet.parent = getcurrent()
            task.greenlet.throw(Killed)
