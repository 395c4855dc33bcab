"""Messages as frames: a fixed prefix, a msgpack header, then raw aligned tensor bytes.

    prefix   magic "LMNA", layout u16, tag u16, header bytes u32, payload bytes u64  (little-endian, 20 bytes)
    header   msgpack array: the message's fields in order, each tensor as (dtype, shape...)
    payload  the tensors' bytes in order, each starting at a multiple of 64 from the payload's start

The four messages of a layer's exchange have headers of a fixed layout instead, see `layer_frames`; `Advance` and
`Advanced` have that too where compiled code writes them.

`encode` gives a list of buffers that share the tensors' memory; `decode` gives a message whose tensors share the
frame's. A frame that is truncated, claims a wrong size or carries a wrong type raises `ProtocolError` before memory
is taken for what it claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgpack
import torch

from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames.bounds import MAX_HEADER, MAX_PAYLOAD
from lamina_protocols.frames.fields import Record, shown, unpack_array, unpack_ints
from lamina_protocols.frames.frames import PREFIX_SIZE, Prefix, pack_prefix, padding, read_prefix
from lamina_protocols.frames.layer_frames import ANSWERS, CLASSES, HEAD_SIZE, TAGS, TENSORS, frame_of, read_head
from lamina_protocols.frames.tensors import buffer, dtype_name, from_buffer, nbytes
from lamina_protocols.messages import messages as m
from lamina_protocols.messages.messages import FetchedSample, FetchSample, Sample

_ZEROS = bytes(64)
LAYERED = (m.Query, m.Fresh, m.Exchange, m.Attended)


class Layout(NamedTuple):
    """One message: the record of its header's fields, then the names of its tensors."""

    record: Record
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, message: type) -> Layout:
        record = Record.of(message)
        return cls(record, tuple(name for name in message.__annotations__ if name not in record.fields))


_MESSAGES: dict[int, type] = {  # the tag is part of the protocol: never reuse one
    1: m.Announcement,
    2: m.Announced,
    # 3, 4, 5 and 7 are those of `layer_frames`
    6: m.Fault,
    8: m.Fetch,
    9: m.Fetched,
    10: m.Survey,
    11: m.Surveyed,
    12: m.FetchPages,
    13: m.FetchedPages,
    14: m.FreshPages,
    15: m.Constants,
    16: m.Advance,
    17: m.Advanced,
    18: Sample,
    19: FetchSample,
    20: FetchedSample,
    21: m.BlockTables,
    # 22 and 23 are those of `layer_frames`
}


class Codec:
    """Encodes and decodes one set of messages, given by their tags: dataclasses, laid out by their annotations."""

    def __init__(self, messages: Mapping[int, type]) -> None:
        self._layouts = {tag: Layout.of(cls) for tag, cls in messages.items()}
        self._tags = {cls: tag for tag, cls in messages.items()}

    def encode(self, message: Any) -> list[bytes | memoryview]:
        """The frame of `message` as buffers to send in order; tensor bytes are views, so send before changing them."""
        tag = self._tags[type(message)]
        layout = self._layouts[tag]
        header = layout.record.pack(message)
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
                f"{type(message).__name__} too large: header {len(packed)} of {MAX_HEADER} bytes, "
                f"payload {payload} of {MAX_PAYLOAD}"
            )
        buffers[0] = pack_prefix(Prefix(tag, len(packed), payload)) + packed
        return buffers

    def decode(self, frame: bytearray | memoryview) -> Any:
        """The message of one whole frame, sharing its memory. Raises ProtocolError for anything malformed."""
        view = memoryview(frame)
        prefix = _whole(view)
        layout = self._layouts.get(prefix.tag)
        if layout is None:
            raise ProtocolError(f"unknown message tag {prefix.tag}, known: {', '.join(map(str, self._layouts))}")
        payload_start = PREFIX_SIZE + prefix.header
        fields = unpack_array(view[PREFIX_SIZE:payload_start])
        count = len(fields) - len(layout.tensors)
        values = layout.record.values(fields[: max(0, count)])
        tensors = _tensors(fields[count:], view[payload_start:])
        return layout.record.cls(**values, **dict(zip(layout.tensors, tensors, strict=True)))


_CODEC = Codec(_MESSAGES)


def encode(message: m.Message) -> list[bytes | memoryview]:
    return _encode_layer(message) if isinstance(message, LAYERED) else _CODEC.encode(message)


def decode(frame: bytearray | memoryview) -> m.Message:
    view = memoryview(frame)
    prefix = _whole(view)
    message: m.Message = _decode_layer(view, prefix) if prefix.tag in TENSORS else _CODEC.decode(frame)
    return message


def _encode_layer(message: m.Query | m.Fresh | m.Exchange | m.Attended) -> list[bytes | memoryview]:
    frame = frame_of(message)
    if frame.size - HEAD_SIZE > MAX_PAYLOAD:
        raise ProtocolError(
            f"{type(message).__name__} too large: payload {frame.size - HEAD_SIZE} of {MAX_PAYLOAD} bytes"
        )
    seconds = message.seconds if isinstance(message, m.Attended) else 0.0
    buffers: list[bytes | memoryview] = [frame.head(message.layer, seconds)]
    end = HEAD_SIZE
    for name, place in frame.places().items():
        if place.at > end:
            buffers.append(_ZEROS[: place.at - end])
        buffers.append(buffer(getattr(message, name)))
        end = place.at + place.size
    return buffers


def _decode_layer(view: memoryview, prefix: Prefix) -> m.Message:
    frame, layer, seconds = read_head(view, prefix)
    fields: dict[str, Any] = {"epoch": frame.epoch, "batch": frame.batch, "layer": layer}
    if prefix.tag in ANSWERS:
        fields["seconds"] = seconds
    for name, place in frame.places().items():
        fields[name] = from_buffer(view[place.at : place.at + place.size], place.dtype, place.shape)
    if prefix.tag == TAGS[m.Advance]:
        fields |= {"x": fields.pop("q").view(-1), "gates": fields.pop("k").view(-1)}
    message: m.Message = CLASSES[prefix.tag](**fields)
    return message


def _whole(view: memoryview) -> Prefix:
    """The prefix of a frame. Raises ProtocolError unless the frame is as long as it says."""
    prefix = read_prefix(view)
    if len(view) != prefix.frame:
        raise ProtocolError(
            f"frame of {len(view)} bytes, its prefix says {PREFIX_SIZE} + {prefix.header} + {prefix.payload}"
        )
    return prefix


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
