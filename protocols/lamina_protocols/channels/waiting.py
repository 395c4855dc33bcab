"""One thread waits for many channels: for frames to receive, and for room to send what was posted.

Sockets are polled; other channels call `wake`.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import weakref
from typing import Protocol

from lamina_protocols.channels.channels import Channel, ChannelClosed


class Poller(Protocol):
    """`select.poll`, or what does more while it waits."""

    def register(self, descriptor: int, events: int, /) -> None: ...
    def modify(self, descriptor: int, events: int, /) -> None: ...
    def unregister(self, descriptor: int, /) -> None: ...
    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]: ...


class Waiter:
    """Waits for channels. `wake` may be called from any thread, the rest from one; `close` after the last `wait`,
    which the end of the object does too."""

    def __init__(self, poller: Poller | None = None) -> None:
        self._woken, self._waking = os.pipe()
        self._end = weakref.finalize(self, _close, self._woken, self._waking)
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waking, False)
        self._lock = threading.Lock()  # so that the pipe is not closed while it is written to
        self._poll: Poller = poller or select.poll()
        self._poll.register(self._woken, select.POLLIN)
        self._numbers: dict[Channel, int | None] = {}
        self._channels: dict[int, Channel] = {}
        self._full: set[Channel] = set()  # whose other side does not read what was posted

    def add(self, channel: Channel) -> None:
        number = channel.watch(self.wake)
        if number is not None:
            self._poll.register(number, select.POLLIN)  # raises ValueError for one that is closed
            self._channels[number] = channel
        self._numbers[channel] = number

    def remove(self, channel: Channel) -> None:
        """Wait for it no more. Call this before another channel is added, which may have the same file descriptor."""
        number = self._numbers.pop(channel, None)
        self._full.discard(channel)
        if number is not None and self._channels.get(number) is channel:
            del self._channels[number]
            self._poll.unregister(number)

    def wake(self) -> None:
        """Let `wait` return."""
        with self._lock, contextlib.suppress(BlockingIOError):  # a full pipe wakes too
            if self._end.alive:
                os.write(self._waking, b"\0")

    def wait(self, timeout: float | None = None) -> list[Channel]:
        """The channels whose `receive` would return or raise at once; none where `wake` was called, or after
        `timeout` seconds.

        A channel whose other side does not read what was posted is left out: it gets no further requests served
        before it has read its last reply.
        """
        ready = [
            channel
            for channel, number in self._numbers.items()
            if (number is None or channel.unseen()) and self._ready(channel)
        ]
        for number, _ in self._poll.poll(0 if ready else None if timeout is None else timeout * 1e3):
            if number == self._woken:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, 4096)
                continue
            channel = self._channels[number]
            if channel not in ready and self._ready(channel):
                ready.append(channel)
        return ready

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ready(self, channel: Channel) -> bool:
        try:
            flushed = channel.flush()
        except ChannelClosed:
            return True
        if flushed is (channel in self._full):
            self._turn(channel, flushed)
        return flushed and channel.ready()

    def _turn(self, channel: Channel, flushed: bool) -> None:
        """Poll for incoming bytes again, or for room to send."""
        (self._full.discard if flushed else self._full.add)(channel)
        number = self._numbers[channel]
        if number is not None:
            self._poll.modify(number, select.POLLIN if flushed else select.POLLOUT)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
