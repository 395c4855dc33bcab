"""Threads that prepare requests: they parse, render, tokenise and compile. Each API key has its share of the threads
and of the places in the queue.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from lamina.server.http.errors import overloaded
from lamina.server.shares import KeyShares

T = TypeVar("T")

_under_way = threading.local()


class Abandoned(BaseException):
    """Nobody waits for this work any more. No error: nothing that handles errors may take it for one."""


def go_on() -> None:
    """For work on a `PreparationPool`, between its parts: raises Abandoned where its client has left."""
    abandoned: threading.Event | None = getattr(_under_way, "abandoned", None)
    if abandoned is not None and abandoned.is_set():
        raise Abandoned


class PreparationPool:
    """`threads` threads, for which at most `waiting` requests wait, of `keys` keys. For one event loop."""

    def __init__(self, name: str, threads: int, waiting: int, keys: int) -> None:
        self._executor = ThreadPoolExecutor(threads, name)
        self._threads = KeyShares(threads, keys)
        self._places = KeyShares(waiting, keys)
        self._queue: list[tuple[int, int, str, asyncio.Future[None]]] = []  # a heap by turn, then arrival
        self._arrivals = 0

    def close(self) -> None:
        """Let the threads end, without waiting for them."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def run(self, key: str, work: Callable[[], T]) -> T:
        """The result of `work`, which runs on a thread when it is its key's turn. Where this is cancelled, work that
        has not begun never does, and work under way ends at its next `go_on`; its thread counts until then. Raises
        ApiError where the key has too many requests in the queue."""
        if not self._places.fits(key):
            raise overloaded(f"{self._places.held(key)} requests are being prepared; come back in a moment")
        with self._places.taken(key):
            await self._thread(key)
            abandoned = threading.Event()
            future = asyncio.get_running_loop().run_in_executor(self._executor, _run, work, abandoned)
            future.add_done_callback(lambda _: self._free(key))
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                abandoned.set()
                future.add_done_callback(_retrieved)
                raise

    async def _thread(self, key: str) -> None:
        """Wait for a thread, which counts as the key's from then on."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        heapq.heappush(self._queue, (self._places.turn(key), self._arrivals, key, ready))
        self._deal()
        try:
            await ready
        except asyncio.CancelledError:
            if ready.done() and not ready.cancelled():
                self._free(key)
            raise

    def _deal(self) -> None:
        """Deal free threads to those who wait. A key that has all it may have lets others go first."""
        passed = []
        while self._queue:
            entry = heapq.heappop(self._queue)
            turn, _, key, ready = entry
            if ready.cancelled():
                continue
            if not self._threads.fits(key):
                passed.append(entry)
                continue
            self._threads.take(key)
            self._places.served(turn)
            ready.set_result(None)
        for entry in passed:
            heapq.heappush(self._queue, entry)

    def _free(self, key: str) -> None:
        self._threads.give(key)
        self._deal()


def _run(work: Callable[[], T], abandoned: threading.Event) -> T:
    _under_way.abandoned = abandoned
    try:
        go_on()
        return work()
    finally:
        _under_way.abandoned = None


def _retrieved(future: asyncio.Future[T]) -> None:
    """Work that nobody waits for may end with an error, which asyncio would log."""
    with suppress(asyncio.CancelledError):
        future.exception()
