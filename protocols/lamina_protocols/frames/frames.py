"""The fixed prefix of a frame: what a channel must read to know how much follows.

    prefix   magic "LMNA", layout u16, tag u16, header bytes u32, payload bytes u64  (little-endian, 20 bytes)

Tensors inside a payload begin at multiples of `ALIGNMENT`. Importing this loads no torch: code that only reads frames
needs none.
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames.bounds import MAX_HEADER, MAX_PAYLOAD

ALIGNMENT = 64  # of every tensor inside a payload: one cache line, the widest SIMD register


def padding(offset: int) -> int:
    """Bytes from `offset` to the next multiple of the alignment."""
    return -offset % ALIGNMENT


MAGIC = b"LMNA"
LAYOUT = 7  # of frames: the first version of the protocol that lays them out like this
_PREFIX = struct.Struct("<4sHHIQ")
PREFIX_SIZE = _PREFIX.size
_SMALL = 1 << 20  # bytes up to which frames are not counted
MAX_FRAME = PREFIX_SIZE + MAX_HEADER + MAX_PAYLOAD


class Prefix(NamedTuple):
    """The first bytes of a frame: the message's tag, and the sizes of header and payload in bytes."""

    tag: int
    header: int
    payload: int

    @property
    def frame(self) -> int:
        """The size of the whole frame in bytes, including the prefix."""
        return PREFIX_SIZE + self.header + self.payload


def pack_prefix(prefix: Prefix) -> bytes:
    return _PREFIX.pack(MAGIC, LAYOUT, *prefix)


def read_prefix(data: bytes | bytearray | memoryview, max_frame: int = MAX_FRAME) -> Prefix:
    """The prefix at the start of `data`. Raises ProtocolError where it is short, of another layout, or too large."""
    if len(data) < PREFIX_SIZE:
        raise ProtocolError(f"frame of {len(data)} bytes is shorter than its prefix of {PREFIX_SIZE}")
    magic, layout, tag, header, payload = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError(f"frame starts with {magic!r}, not {MAGIC!r}")
    if layout != LAYOUT:
        raise ProtocolError(f"frame of layout {layout}, this side reads {LAYOUT}")
    if header > MAX_HEADER or payload > MAX_PAYLOAD:
        raise ProtocolError(
            f"frame too large: header {header} of {MAX_HEADER} bytes, payload {payload} of {MAX_PAYLOAD}"
        )
    if PREFIX_SIZE + header + payload > max_frame:
        raise ProtocolError(f"frame of {PREFIX_SIZE + header + payload} bytes, this side takes up to {max_frame}")
    return Prefix(tag, header, payload)


class Arriving:
    """The large frames that are arriving over several channels: `most` bytes together. For one reading thread; any may
    call `end`."""

    def __init__(self, most: int) -> None:
        self._limit = most
        self._sizes: WeakKeyDictionary[object, int] = WeakKeyDictionary()  # by channel

    def begin(self, channel: object, size: int) -> None:
        """A frame of `size` bytes begins. Raises ProtocolError where there is no room for it."""
        if size <= _SMALL:
            return
        others = sum(list(self._sizes.values()))
        if others + size > self._limit:
            raise ProtocolError(f"a frame of {size} bytes beside others of {others}; allowed together: {self._limit}")
        self._sizes[channel] = size

    def end(self, channel: object) -> None:
        self._sizes.pop(channel, None)


def blank_frame(prefix: Prefix, trailer: int = 0) -> memoryview:
    """Writable memory for a frame and `trailer` bytes after it, its payload at a multiple of 64.

    The system provides pages as they are written, so a large claim takes no memory before its bytes arrive.
    Raises ProtocolError where there is no memory.
    """
    size = prefix.frame + trailer
    try:
        memory = np.empty(size + ALIGNMENT, np.uint8)
    except MemoryError as error:  # a reader of many channels can go on with the others
        raise ProtocolError(f"no memory for a frame of {size} bytes") from error
    shift = padding(memory.__array_interface__["data"][0] + PREFIX_SIZE + prefix.header)
    return memory.data[shift : shift + size]
