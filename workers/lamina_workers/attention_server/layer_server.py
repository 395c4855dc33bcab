"""Polls the sockets of a worker, and meanwhile answers the layers of decode batches without Python.

A batch that was announced, and whose work compiled code can do, is offered here: from then on `poll` answers its
frames. It returns as any poll does when something else has come, and when a batch is done.
"""

from __future__ import annotations

import ctypes
import select
from bisect import bisect_left
from collections.abc import Callable

import numpy as np

from lamina_kernels.exchange import exchange_blocks as blocks
from lamina_kernels.exchange.layer_work import LayerWork, functions
from lamina_kernels.exchange.serve_loop import answer_kernel, serve_kernel
from lamina_protocols.channels.channels import Channel
from lamina_protocols.frames.layer_frames import frames_between, set_batch, set_layer
from lamina_protocols.frames.tensors import dtype_name
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.ports.direct import Buffer, DirectChannel, compiled, direct_channel, enabled

_COUNTED_MS = 50  # how late counters may be while a batch is under way
_NOTHING = memoryview(b"")


class ServedBatch:
    """The frames of one offered batch after another, all of the same `work`, in the layers of one pool, whose vectors
    are as wide as `spec` says. `done(number, layers, seconds)` counts what was done of the batch `number`, by numbers
    within the pool."""

    def __init__(self, work: LayerWork, spec: LayerSpec, done: Callable[[int, range, float], None]) -> None:
        block = blocks.Served()
        self.work = work
        self.epoch = self.number = 0
        self._done = done
        self._counted = 0
        self._scratch = np.zeros(2, np.int64)
        self._following = np.zeros(work.layers[-1] + 1, np.int64)
        self._following[list(work.layers)] = (*work.layers[1:], len(self._following))
        reads, stores = work.queries > 0, work.fresh > 0
        names = dtype_name(work.query), dtype_name(work.loaded)
        question, answer = frames_between(work.queries, work.fresh, spec, *names)
        self.frame, self.reply, self._head = Buffer(question.size), Buffer(answer.size), Buffer(blocks.HEAD)
        self._head.bytes[:] = memoryview(question.head(0))
        self.reply.bytes[: blocks.HEAD] = memoryview(answer.head(0))
        for field, place in question.places().items():
            setattr(block, field, self.frame.address + place.at)
        for field, place in answer.places().items():
            setattr(block, field, self.reply.address + place.at)
        block.layers, block.following = len(self._following), self._following.ctypes.data
        block.head = self._head.address
        block.frame, block.size = self.frame.address, question.size
        block.work, block.attends, block.stores = work.address, int(reads), int(stores and not work.block.states)
        block.reply, block.reply_size = self.reply.address, answer.size if reads else 0
        self._block = block
        self.address = ctypes.addressof(block)
        self.largest = max(question.size, answer.size if reads else 0)  # bytes of its frames

    def begin(self, epoch: int, number: int) -> None:
        """A batch, as the first or as the next one."""
        self.epoch, self.number, self._counted = epoch, number, 0
        for head in (self._head.bytes, self.reply.bytes):
            set_batch(head, epoch, number)
        block = self._block
        block.live, block.layer = 1, self.work.layers[0]
        block.arrived = block.claimed = block.by = block.nanoseconds = 0

    @property
    def live(self) -> bool:
        """Whether layers are still due."""
        return bool(self._block.live)

    def count(self) -> None:
        """Tell the worker which layers were done since the last time."""
        block = self._block
        done = bisect_left(self.work.layers, block.layer)
        if done > self._counted:
            self._done(self.number, range(self._counted, done), block.nanoseconds * 1e-9)
            self._counted, block.nanoseconds = done, 0

    def takes(self, frame: memoryview) -> bool:
        """Take the frame of the layer that is due, which Python has received. Whether it was that."""
        block, head = self._block, self._head.bytes
        set_layer(head, block.layer)
        if not block.live or len(frame) != block.size or frame[: blocks.HEAD] != head:
            return False
        self.frame.bytes[:] = frame
        return True

    def answer(self) -> memoryview:
        """Store and attend the layer that was taken. The answer, empty where there is none; it stays until the next."""
        block = self._block
        block.by = self._scratch.ctypes.data
        compiled(answer_kernel())(self.address)
        block.by, block.sent = 0, block.reply_size
        block.nanoseconds = 0  # the caller counts the time of what it received
        return self.reply.bytes[: block.reply_size]

    def unsent(self, direct: DirectChannel) -> memoryview:
        """What is left of an answer that was sent over this channel; from now on that is the channel's."""
        block = self._block
        if block.by != direct.address or block.sent >= block.reply_size:
            return _NOTHING
        unsent = self.reply.bytes[block.sent : block.reply_size]
        block.sent, block.claimed = block.reply_size, 0
        return unsent

    def passed(self, layer: int) -> bool:
        """Python has done this layer. Whether the rest may still be done here."""
        block = self._block
        if layer not in self.work.layers:
            return True
        if layer != block.layer or layer + 1 == block.layers:
            return False
        block.layer = int(self._following[layer])
        self._counted = bisect_left(self.work.layers, block.layer)
        return True


class LayerServer:
    """As `select.poll`, for one thread, but that it may return early with nothing. The sockets of attached channels may
    bring offered layers."""

    def __init__(self) -> None:
        self._events: dict[int, int] = {}
        self._plain = select.poll()
        self._channels: dict[int, DirectChannel] = {}  # by descriptor
        self._batches: dict[DirectChannel, list[ServedBatch]] = {}
        self._block = blocks.Server(functions=functions().ctypes.data if functions() is not None else 0)
        self._call = compiled(serve_kernel() if enabled() else 0)

    def register(self, descriptor: int, events: int) -> None:
        """As of `select.poll`."""
        self._plain.register(descriptor, events)
        self._events[descriptor] = events

    def attach(self, channel: Channel) -> None:
        """A channel, registered already, that may bring offered layers."""
        direct = direct_channel(channel)
        if direct is None:
            return  # and do not ask it for a descriptor: a channel without one has its callback already
        descriptor = channel.watch(lambda: None)
        if descriptor in self._events:
            self._channels[descriptor] = direct
            self._batches[direct] = []

    def modify(self, descriptor: int, events: int) -> None:
        """As of `select.poll`."""
        self._plain.modify(descriptor, events)
        self._events[descriptor] = events

    def unregister(self, descriptor: int) -> None:
        """As of `select.poll`."""
        self._plain.unregister(descriptor)
        del self._events[descriptor]
        direct = self._channels.pop(descriptor, None)
        if direct is not None:
            for batch in self._batches.pop(direct):
                direct.forget(batch.address)

    def offer(self, batch: ServedBatch, channels: set[Channel]) -> None:
        """Answer the frames of this batch from now on, over any of these channels that takes frames as large."""
        for direct, batches in self._batches.items():
            if direct.channel in channels and batch.largest <= direct.channel.max_frame:
                direct.expect(batch.address, batch.frame.bytes)
                batches.append(batch)

    def withdraw(self, batch: ServedBatch) -> None:
        """Answer them no more."""
        for direct, batches in self._batches.items():
            if batch in batches:
                batches.remove(batch)
                direct.forget(batch.address)

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        """As of `select.poll`; also returns, perhaps with nothing, once a batch is done or some time is over."""
        lent = {number: direct for number, direct in self._channels.items() if self._batches[direct] and direct.lend()}
        if not lent:
            return self._plain.poll(timeout)
        served = {batch: direct for direct in lent.values() for batch in self._batches[direct]}
        try:
            return self._serve(lent, timeout)
        finally:
            for direct in lent.values():
                unsent = (batch.unsent(direct) for batch in self._batches[direct])
                direct.reclaim(next((x for x in unsent if len(x)), _NOTHING))
            for batch in served:
                batch.count()
                if not batch.live:
                    self.withdraw(batch)

    def _serve(self, lent: dict[int, DirectChannel], timeout: float | None) -> list[tuple[int, int]]:
        polls = np.array([n | events << 32 for n, events in self._events.items()], np.int64)
        addresses = np.array([lent[n].address if n in lent else 0 for n in self._events], np.int64)
        block = self._block
        block.polls, block.channels, block.n = polls.ctypes.data, addresses.ctypes.data, len(polls)
        block.timeout_ms = _COUNTED_MS if timeout is None else min(_COUNTED_MS, int(timeout))
        self._call(ctypes.addressof(block))
        if block.result != 0:
            return []
        events = (polls >> 48) & 0xFFFF
        return [(n, int(e)) for n, e in zip(self._events, events.tolist(), strict=True) if e]
