"""Messages as frames: a fixed prefix, a msgpack header, then raw aligned tensor bytes.

    prefix   magic "LMNA", version u16, tag u16, header bytes u32, payload bytes u64  (little-endian, 20 bytes)
    header   msgpack array: the message's fields in order, each tensor as (dtype, shape...)
    payload  the tensors' bytes in order, each starting at a multiple of 64 from the payload's start

`encode` gives a list of buffers that share the tensors' memory; `decode` gives a message whose tensors share the
frame's. A frame that is truncated, lies about a size or carries a wrong type raises `ProtocolError` before memory
is taken for what it claims. Knows no channel and no checksum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack
import torch

from lamina_protocols import messages as m
from lamina_protocols.alignment import padding
from lamina_protocols.errors import ProtocolError
from lamina_protocols.fields import (
    BOOL,
    FLOAT,
    INT,
    INTS,
    RANGE,
    TEXT,
    Field,
    Record,
    list_of,
    one_of,
    shown,
    unpack_array,
    unpack_ints,
)
from lamina_protocols.frames import MAX_HEADER, MAX_PAYLOAD, PREFIX_SIZE, Prefix, pack_prefix, read_prefix
from lamina_protocols.tensors import buffer, dtype_name, from_buffer, nbytes

_ZEROS = bytes(64)

_OPERATIONS = (
    Record(m.Open, {"handle": INT, "heads": INTS, "lo": INT, "hi": INT}),
    Record(m.Fork, {"handle": INT, "parent": INT, "length": INT}),
    Record(m.Close, {"handle": INT}),
)
_ROW = Record(m.Row, {"handle": INT, "start": INT, "count": INT, "read": RANGE, "store": BOOL, "chooses": BOOL})
_USAGE = Record(
    m.Usage,
    {"read": INT, "whole": INT, "missed": FLOAT, "queries": INT, "worst": FLOAT, "held": INT, "kept": INT},
)
_BATCH = {"epoch": INT, "batch": INT}
_LAYER = _BATCH | {"layer": INT}


class _Layout(NamedTuple):
    """One message: its header fields, then the names of its tensors."""

    cls: type
    fields: dict[str, Field]
    tensors: tuple[str, ...] = ()


_LAYOUTS: dict[int, _Layout] = {  # the tag is part of the protocol: never reuse one
    1: _Layout(m.Announcement, _BATCH | {"first": INT, "operations": one_of(_OPERATIONS), "rows": list_of(_ROW)}),
    2: _Layout(
        m.Announced,
        _BATCH | {"accepted": BOOL, "free_pages": INT, "floors": INTS, "reason": TEXT, "usages": list_of(_USAGE)},
    ),
    3: _Layout(m.Query, _LAYER, ("q",)),
    4: _Layout(m.Fresh, _LAYER, ("k", "v")),
    5: _Layout(m.Attended, _LAYER, ("out", "lse")),
    6: _Layout(m.Fault, _BATCH | {"reason": TEXT}),
    7: _Layout(m.Exchange, _LAYER, ("q", "k", "v")),
    8: _Layout(m.Fetch, _LAYER | {"handle": INT, "lo": INT, "hi": INT}),
    9: _Layout(m.Fetched, _LAYER, ("k", "v")),
}
_TAGS = {layout.cls: tag for tag, layout in _LAYOUTS.items()}


def encode(message: m.Message) -> list[bytes | memoryview]:
    """The frame of `message` as buffers to send in order; tensor bytes are views, so send before changing them."""
    tag = _TAGS[type(message)]
    layout = _LAYOUTS[tag]
    header: list[Any] = [field.pack(getattr(message, name)) for name, field in layout.fields.items()]
    buffers: list[bytes | memoryview] = [b""]
    payload = 0
    for name in layout.tensors:
        tensor: torch.Tensor = getattr(message, name)
        if pad := padding(payload):
            buffers.append(_ZEROS[:pad])
            payload += pad
        header.append([dtype_name(tensor.dtype), *tensor.shape])
        data = buffer(tensor)
        buffers.append(data)
        payload += len(data)
    packed: bytes = msgpack.packb(header)
    if len(packed) > MAX_HEADER or payload > MAX_PAYLOAD:
        raise ProtocolError(
            f"{layout.cls.__name__} too large: header {len(packed)} of {MAX_HEADER} bytes, "
            f"payload {payload} of {MAX_PAYLOAD}"
        )
    buffers[0] = pack_prefix(Prefix(tag, len(packed), payload)) + packed
    return buffers


def decode(frame: bytearray | memoryview) -> m.Message:
    """The message of one whole frame, sharing its memory. Raises ProtocolError for anything malformed."""
    view = memoryview(frame)
    prefix = read_prefix(view)
    if len(view) != prefix.frame:
        raise ProtocolError(
            f"frame of {len(view)} bytes, its prefix says {PREFIX_SIZE} + {prefix.header} + {prefix.payload}"
        )
    layout = _LAYOUTS.get(prefix.tag)
    if layout is None:
        raise ProtocolError(f"unknown message tag {prefix.tag}, known: {', '.join(map(str, _LAYOUTS))}")
    payload_start = PREFIX_SIZE + prefix.header
    fields = unpack_array(view[PREFIX_SIZE:payload_start])
    if len(fields) != len(layout.fields) + len(layout.tensors):
        raise ProtocolError(f"{layout.cls.__name__} header has {len(fields)} fields")
    values = [field.unpack(value) for field, value in zip(layout.fields.values(), fields, strict=False)]
    values += _tensors(fields[len(layout.fields) :], view[payload_start:])
    message: m.Message = layout.cls(*values)
    return message


def _tensors(specs: tuple[Any, ...], payload: memoryview) -> list[torch.Tensor]:
    tensors = []
    offset = 0
    for spec in specs:
        if type(spec) is not tuple or not spec or type(spec[0]) is not str or len(spec) > 5:
            raise ProtocolError(f"expected a tensor as [dtype, up to 4 dimensions], got {shown(spec)}")
        dtype, shape = spec[0], unpack_ints(spec[1:])
        offset += padding(offset)
        end = offset + nbytes(dtype, shape)
        if end > len(payload):
            raise ProtocolError(f"tensor {dtype} {shape} ends at byte {end} of a payload of {len(payload)}")
        tensors.append(from_buffer(payload[offset:end], dtype, shape))
        offset = end
    if offset != len(payload):
        raise ProtocolError(f"payload of {len(payload)} bytes, its tensors take {offset}")
    return tensors
