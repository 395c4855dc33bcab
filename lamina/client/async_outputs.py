"""Outputs that an engine's thread hands to an asyncio event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from contextlib import suppress
from typing import ClassVar
from weakref import WeakKeyDictionary

from lamina.client.interface import Delivery


class AsyncOutputs:
    """A queue of the running event loop that other threads fill. One task takes from it.

    `get` raises asyncio.TimeoutError once `seconds` have passed since the queue was made and it is empty. A queue with
    `seconds` must be closed.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._waker = _Waker.of(self._loop)
        self._items: deque[Delivery] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._late = False
        self._timer = None if seconds is None else self._loop.call_later(max(0.0, seconds), self._expire)

    def put(self, item: Delivery) -> None:
        self._items.append(item)
        self._waker.wake_for(self)

    async def get(self) -> Delivery:
        while not self._items and not self._late:
            self._waiting = self._loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        if not self._items:
            raise asyncio.TimeoutError
        return self._items.popleft()

    def get_nowait(self) -> Delivery | None:
        return self._items.popleft() if self._items else None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def wake(self) -> None:
        """Wake the task that waits in `get`, if there is one. For the event loop's thread."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _expire(self) -> None:
        self._late = True
        self.wake()


class _Waker:
    """Wakes an event loop once for all queues that are filled in a row: a batch fills one for each of its requests."""

    _known: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._filled: deque[AsyncOutputs] = deque()
        self._called = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _Waker:
        """The waker of that loop. For the loop's thread."""
        waker = cls._known.get(loop)
        if waker is None:
            waker = cls._known[loop] = cls(loop)
        return waker

    def wake_for(self, queue: AsyncOutputs) -> None:
        """Wake the loop because `queue` was filled. For any thread."""
        self._filled.append(queue)
        if not self._called and (loop := self._loop()) is not None:
            self._called = True
            with suppress(RuntimeError):  # the loop was closed, so no task waits
                loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._called = False  # first, so that a thread that fills a queue from now on calls again
        while self._filled:
            self._filled.popleft().wake()
