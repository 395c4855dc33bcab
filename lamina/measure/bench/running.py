"""A run: requests sent when they are due, as many at once as allowed, until all have ended or Ctrl-C.

The caller gives the function that sends a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lamina.measure.bench.measures import Outcome
from lamina.system.progress import Progress

Clock = Callable[[], float]
Send = Callable[[int, Clock], Awaitable[Outcome]]
"""Sends the request of that number and waits for its answer; the clock gives seconds after the start of the run."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """What became of a run. `seconds`: until the last request ended; `cpu`: seconds of processor time of this process;
    `unfinished`: requests that were not sent, or given up, when it was interrupted."""

    outcomes: tuple[Outcome, ...]
    seconds: float
    cpu: float
    unfinished: int = 0


async def run(
    due: Sequence[float],
    send: Send,
    *,
    max_concurrency: int | None = None,
    stop: asyncio.Event | None = None,
    progress: Progress | None = None,
    what: str = "requests",
) -> Run:
    """Send request i `due[i]` seconds after the start, or when there is room. With `stop` set, what is under way is
    given up."""
    outcomes: list[Outcome] = []
    room = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else None
    cpu, start = time.process_time(), time.perf_counter()
    last_report = 0.0

    def clock() -> float:
        return time.perf_counter() - start

    async def one(number: int) -> None:
        nonlocal last_report
        try:
            outcomes.append(await send(number, clock))
        finally:
            if room is not None:
                room.release()
        if progress is not None and ((now := clock()) > last_report + 0.1 or len(outcomes) == len(due)):
            last_report = now
            progress(what, len(outcomes), len(due))

    if progress is not None:
        progress(what, 0, len(due))
    await _until(_send_all(due, one, clock, room), stop)
    return Run(
        tuple(outcomes),
        max((outcome.ended for outcome in outcomes), default=clock()),
        time.process_time() - cpu,
        len(due) - len(outcomes),
    )


async def _send_all(
    due: Sequence[float], one: Callable[[int], Coroutine[Any, Any, None]], clock: Clock, room: asyncio.Semaphore | None
) -> None:
    """Start `one` for each request when it is due and has room, and wait for all. Raises the first error of one."""
    tasks: set[asyncio.Task[None]] = set()
    faults: list[BaseException] = []

    def ended(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            faults.append(fault)

    try:
        for number, time_due in enumerate(due):
            if (wait := time_due - clock()) > 0:
                await asyncio.sleep(wait)
            if room is not None:
                await room.acquire()
            task = asyncio.ensure_future(one(number))
            tasks.add(task)
            task.add_done_callback(ended)
        await asyncio.gather(*tasks)
        if faults:
            raise faults[0]
    finally:
        remaining = list(tasks)
        for task in remaining:
            task.cancel()
        await asyncio.gather(*remaining, return_exceptions=True)


async def _until(work: Coroutine[Any, Any, None], stop: asyncio.Event | None) -> None:
    """Wait for `work`, or cancel it when `stop` is set."""
    if stop is None:
        await work
        return
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        stopped.cancel()
        task.cancel()


@contextlib.contextmanager
def interruptible(stop: asyncio.Event) -> Iterator[None]:
    """Ctrl-C sets `stop` instead of ending the process; a second one ends it."""
    loop = asyncio.get_running_loop()

    def once() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, once)
    except (NotImplementedError, RuntimeError, ValueError):  # no main thread, or a system without signals
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work` on an event loop of its own: uvloop's where that is installed, which takes less of the
    processor. What lies in memory before is no longer looked at by the garbage collector."""
    try:
        loop: asyncio.AbstractEventLoop = importlib.import_module("uvloop").new_event_loop()
    except ImportError:
        loop = asyncio.new_event_loop()
    gc.freeze()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(work)
    finally:
        gc.unfreeze()
        try:
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
