"""Messages as frames: a fixed prefix, a msgpack header, then raw aligned tensor bytes.

    prefix   magic "LMNA", version u16, tag u16, header bytes u32, payload bytes u64  (little-endian, 20 bytes)
    header   msgpack array: the message's fields in order, each tensor as (dtype, shape...)
    payload  the tensors' bytes in order, each starting at a multiple of 64 from the payload's start

`encode` gives a list of buffers that share the tensors' memory; `decode` gives a message whose tensors share the
frame's. A frame that is truncated, lies about a size or carries a wrong type raises `ProtocolError` before memory
is taken for what it claims. Knows no channel and no checksum.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack
import torch

from lamina_protocols import messages as m
from lamina_protocols.errors import ProtocolError
from lamina_protocols.tensors import buffer, dtype_name, from_buffer, nbytes, padding

MAGIC = b"LMNA"
MAX_HEADER = 8 << 20  # an announcement of 65,536 rows takes 2 MB
MAX_PAYLOAD = 1 << 30
_PREFIX = struct.Struct("<4sHHIQ")
_MAX_INT = 1 << 62
_ZEROS = bytes(64)


class _Field(NamedTuple):
    """How one field goes into the header and comes back. `unpack` refuses any other type with ProtocolError."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


def _unpack_int(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_INT:
        raise ProtocolError(f"expected an integer from 0 to 2^62, got {value!r:.80}")
    return value


def _unpack_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ProtocolError(f"expected true or false, got {value!r:.80}")
    return value


def _unpack_text(value: Any) -> str:
    if type(value) is not str:
        raise ProtocolError(f"expected text, got {value!r:.80}")
    return value


def _unpack_ints(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple:
        raise ProtocolError(f"expected a list of integers, got {value!r:.80}")
    return tuple(_unpack_int(item) for item in value)


def _unpack_range(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    ends = _unpack_ints(value)
    if len(ends) != 2 or ends[0] > ends[1]:
        raise ProtocolError(f"expected a range [lo, hi], got {ends!r:.80}")
    return ends[0], ends[1]


_INT = _Field(int, _unpack_int)
_BOOL = _Field(bool, _unpack_bool)
_TEXT = _Field(str, _unpack_text)
_INTS = _Field(tuple, _unpack_ints)
_RANGE = _Field(lambda value: value, _unpack_range)


class _Record(NamedTuple):
    """A dataclass and its fields, in the order of its constructor."""

    cls: type
    fields: dict[str, _Field]

    def pack(self, value: Any) -> list[Any]:
        return [field.pack(getattr(value, name)) for name, field in self.fields.items()]

    def unpack(self, values: Any) -> Any:
        if type(values) is not tuple or len(values) != len(self.fields):
            raise ProtocolError(f"{self.cls.__name__} has {len(self.fields)} fields, got {values!r:.80}")
        return self.cls(*(field.unpack(value) for field, value in zip(self.fields.values(), values, strict=True)))


def _list_of(record: _Record) -> _Field:
    def unpack(values: Any) -> tuple[Any, ...]:
        if type(values) is not tuple:
            raise ProtocolError(f"expected a list of {record.cls.__name__}, got {values!r:.80}")
        return tuple(record.unpack(value) for value in values)

    return _Field(lambda values: [record.pack(value) for value in values], unpack)


def _one_of(records: tuple[_Record, ...]) -> _Field:
    """A list whose items are any of `records`, each told apart by its index in front."""
    index = {record.cls: i for i, record in enumerate(records)}

    def pack(values: Any) -> list[Any]:
        return [[index[type(value)], *records[index[type(value)]].pack(value)] for value in values]

    def unpack(values: Any) -> tuple[Any, ...]:
        if type(values) is not tuple or not all(type(value) is tuple and value for value in values):
            raise ProtocolError(f"expected a list of tagged records, got {values!r:.80}")
        for value in values:
            if type(value[0]) is not int or not 0 <= value[0] < len(records):
                raise ProtocolError(f"unknown record {value[0]!r:.80}, allowed: 0 to {len(records) - 1}")
        return tuple(records[value[0]].unpack(value[1:]) for value in values)

    return _Field(pack, unpack)


_OPERATIONS = (
    _Record(m.Open, {"handle": _INT, "heads": _INTS, "lo": _INT, "hi": _INT}),
    _Record(m.Fork, {"handle": _INT, "parent": _INT, "length": _INT}),
    _Record(m.Close, {"handle": _INT}),
)
_ROW = _Record(m.Row, {"handle": _INT, "start": _INT, "count": _INT, "read": _RANGE, "store": _BOOL})
_BATCH = {"epoch": _INT, "batch": _INT}
_LAYER = _BATCH | {"layer": _INT}


class _Layout(NamedTuple):
    """One message: its header fields, then the names of its tensors."""

    cls: type
    fields: dict[str, _Field]
    tensors: tuple[str, ...] = ()


_LAYOUTS: dict[int, _Layout] = {  # the tag is part of the protocol: never reuse one
    1: _Layout(m.Announcement, _BATCH | {"first": _INT, "operations": _one_of(_OPERATIONS), "rows": _list_of(_ROW)}),
    2: _Layout(m.Announced, _BATCH | {"accepted": _BOOL, "free_pages": _INT, "floors": _INTS, "reason": _TEXT}),
    3: _Layout(m.Query, _LAYER, ("q",)),
    4: _Layout(m.Fresh, _LAYER, ("k", "v")),
    5: _Layout(m.Attended, _LAYER, ("out", "lse")),
    6: _Layout(m.Fault, _BATCH | {"reason": _TEXT}),
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
    buffers[0] = _PREFIX.pack(MAGIC, m.PROTOCOL_VERSION, tag, len(packed), payload) + packed
    return buffers


def decode(frame: bytearray | memoryview) -> m.Message:
    """The message of one whole frame, sharing its memory. Raises ProtocolError for anything malformed."""
    view = memoryview(frame)
    if len(view) < _PREFIX.size:
        raise ProtocolError(f"frame of {len(view)} bytes is shorter than its prefix of {_PREFIX.size}")
    magic, version, tag, header_size, payload_size = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise ProtocolError(f"frame starts with {magic!r}, not {MAGIC!r}")
    if version != m.PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {version}, this side speaks {m.PROTOCOL_VERSION}")
    if header_size > MAX_HEADER or payload_size > MAX_PAYLOAD:
        raise ProtocolError(
            f"frame too large: header {header_size} of {MAX_HEADER} bytes, payload {payload_size} of {MAX_PAYLOAD}"
        )
    if len(view) != _PREFIX.size + header_size + payload_size:
        raise ProtocolError(
            f"frame of {len(view)} bytes, its prefix says {_PREFIX.size} + {header_size} + {payload_size}"
        )
    layout = _LAYOUTS.get(tag)
    if layout is None:
        raise ProtocolError(f"unknown message tag {tag}, known: {', '.join(map(str, _LAYOUTS))}")
    payload_start = _PREFIX.size + header_size
    fields = _unpack_header(view[_PREFIX.size : payload_start])
    if len(fields) != len(layout.fields) + len(layout.tensors):
        raise ProtocolError(f"{layout.cls.__name__} header has {len(fields)} fields")
    values = [field.unpack(value) for field, value in zip(layout.fields.values(), fields, strict=False)]
    values += _tensors(fields[len(layout.fields) :], view[payload_start:])
    message: m.Message = layout.cls(*values)
    return message


def _unpack_header(data: memoryview) -> tuple[Any, ...]:
    try:
        fields = msgpack.unpackb(data, use_list=False, raw=False, max_array_len=len(data), max_map_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"header is no msgpack of arrays: {error!r:.200}") from error
    if type(fields) is not tuple:
        raise ProtocolError(f"header is {type(fields).__name__}, not an array")
    return fields


def _tensors(specs: tuple[Any, ...], payload: memoryview) -> list[torch.Tensor]:
    tensors = []
    offset = 0
    for spec in specs:
        if type(spec) is not tuple or not spec or type(spec[0]) is not str or len(spec) > 5:
            raise ProtocolError(f"expected a tensor as [dtype, up to 4 dimensions], got {spec!r:.80}")
        dtype, shape = spec[0], _unpack_ints(spec[1:])
        offset += padding(offset)
        end = offset + nbytes(dtype, shape)
        if end > len(payload):
            raise ProtocolError(f"tensor {dtype} {shape} ends at byte {end} of a payload of {len(payload)}")
        tensors.append(from_buffer(payload[offset:end], dtype, shape))
        offset = end
    if offset != len(payload):
        raise ProtocolError(f"payload of {len(payload)} bytes, its tensors take {offset}")
    return tensors
