"""Layers' frames that compiled code receives and sends, without Python: the channel's side of it.

A `DirectChannel` lends a socket channel to compiled code for the time of one call. Whatever the call leaves half done,
a frame that has begun to arrive or to leave, goes back to the channel, so between two calls nothing is half read here.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from lamina_kernels.exchange import exchange_blocks
from lamina_kernels.exchange.layer_work import functions
from lamina_protocols.channels.channels import Channel
from lamina_protocols.channels.sockets import SocketChannel
from lamina_protocols.frames.frames import padding

SWITCH = "LAMINA_EXCHANGE"  # "python": layers are exchanged and computed from Python, as where nothing else is possible
_NOTHING = memoryview(b"")


@cache
def enabled() -> bool:
    """Whether layers may be exchanged by compiled code in this process. Raises ValueError for an unknown choice."""
    choice = os.environ.get(SWITCH, "compiled")
    if choice not in ("compiled", "python"):
        raise ValueError(f"{SWITCH} is {choice!r}, allowed: compiled, python")
    return choice == "compiled" and functions() is not None


def direct_channel(channel: Channel | None) -> DirectChannel | None:
    """The compiled side of a channel; None where its frames need Python."""
    return DirectChannel(channel) if isinstance(channel, SocketChannel) and channel.plain and enabled() else None


class Buffer:
    """Memory for frames, at a multiple of 64. `bytes` views it."""

    __slots__ = ("address", "bytes")

    def __init__(self, size: int) -> None:
        memory = np.empty(size + 64, np.uint8)
        start = padding(memory.ctypes.data)
        self.bytes: memoryview = memory.data[start : start + size]
        self.address: int = memory.ctypes.data + start

    def tensor(self, at: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """`size` bytes from `at` on, as a flat tensor."""
        return torch.frombuffer(self.bytes[at : at + size], dtype=dtype) if size else torch.empty(0, dtype=dtype)


class DirectChannel:
    """For one thread, which is that of the channel. Blocks of EXPECTED frames are registered by their addresses."""

    def __init__(self, channel: SocketChannel) -> None:
        self.channel = channel
        addresses = functions()
        self._scratch = np.zeros(16, np.int64)
        self._frames: dict[int, memoryview] = {}  # by block: where its frame goes
        self._addresses = np.zeros(1, np.int64)
        self._block = exchange_blocks.Channel(functions=addresses.ctypes.data, scratch=self._scratch.ctypes.data)
        self.address = ctypes.addressof(self._block)

    def expect(self, block: int, frame: memoryview) -> None:
        """The frames of a block may come, into that memory. The block must live until `forget`."""
        self._frames[block] = frame
        self._list()

    def forget(self, block: int) -> None:
        """They may come no more: whoever reads the channel gets them."""
        if self._frames.pop(block, None) is not None:
            self._list()

    def _list(self) -> None:
        self._addresses = np.array([*self._frames, 0], np.int64)
        self._block.expected, self._block.n_expected = self._addresses.ctypes.data, len(self._frames)

    def lend(self) -> bool:
        """Take the channel for one compiled call. Whether that is possible now."""
        descriptor = self.channel.lend()
        if descriptor is None:
            return False
        self._block.descriptor = descriptor
        return True

    def reclaim(self, unsent: memoryview = _NOTHING) -> None:
        """The compiled call is over. `unsent`: what is left of the frame that it was sending."""
        block, partial = self._block, _NOTHING
        if block.current:
            partial = self._frames[block.current][: block.have]
            exchange_blocks.Expected.from_address(block.current).claimed = 0
            block.current = block.have = 0
        received, sent = block.received, block.sent
        block.received = block.sent = 0
        self.channel.reclaim(received, sent, partial, unsent)


@cache
def compiled(address: int) -> Callable[[int], None]:
    """A compiled loop as a call that releases the interpreter's lock."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
