"""The frames of a layer's exchange: fixed headers, so that compiled code can write them and tell what has come.

    prefix   20 bytes, as of every frame
    header   epoch i64, batch i64, vectors of q or out u32, of k u32, width of k u16, of v u16, dtype u8, dtype of k
             and v u8, width of q u16, 4 zeros; then layer u32, seconds f32   (little-endian, 44 bytes)
    tensors  each at a multiple of 64 from the frame's begin

All but the last 8 bytes of the header are the same in every layer of a batch: prefix and header before `LAYER_AT` tell
which batch a frame belongs to and what is in it. This file is the only place of the layout.

A layer with states has x, cut into vectors, for q and gates for k (`LayerSpec.widths`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames.frames import PREFIX_SIZE, Prefix, pack_prefix, padding
from lamina_protocols.frames.tensors import dtype_name, nbytes
from lamina_protocols.messages import messages as m
from lamina_protocols.messages.layers import STATES, LayerSpec

_HEADER = struct.Struct("<qqIIHHBBH4xIf")
HEAD_SIZE = PREFIX_SIZE + _HEADER.size  # 64: where the first tensor begins
_BATCH, _LAYER = struct.Struct("<qq"), struct.Struct("<If")
LAYER_AT, SECONDS_AT = HEAD_SIZE - 8, HEAD_SIZE - 4  # of the layer's number, u32, and of the seconds, f32
_CODES = ("", "f32", "b16", "f16", "i8", "u8")  # a dtype's number is its place here: part of the protocol
_MOST = 1 << 62  # epochs and batches are below it

TENSORS: dict[int, tuple[str, ...]] = {3: ("q",), 4: ("k", "v"), 5: ("out", "lse"), 7: ("q", "k", "v")}
TENSORS |= {22: ("q", "k"), 23: ("out",)}
"""Of each message's tag, its tensors in their order."""
CLASSES: dict[int, Any] = {3: m.Query, 4: m.Fresh, 5: m.Attended, 7: m.Exchange, 22: m.Advance, 23: m.Advanced}
TAGS: dict[type, int] = {cls: tag for tag, cls in CLASSES.items()}
ANSWERS = frozenset({TAGS[m.Attended], TAGS[m.Advanced]})


class Place(NamedTuple):
    """Where a tensor stands in a frame: `size` bytes from `at`."""

    at: int
    size: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerFrame:
    """What the frames of one kind have in common in all layers of a batch.

    `queries` counts the vectors of q or out, `fresh` those of k and of v. Each of q has `d_q` numbers, of k `d_k`, of v
    and out `d_v`. `dtype` is the wire's name of q's or out's, `kv_dtype` of that of k and v. What a kind of frame does
    not have is 0 or "".
    """

    tag: int
    epoch: int
    batch: int
    queries: int = 0
    fresh: int = 0
    d_q: int = 0
    d_k: int = 0
    d_v: int = 0
    dtype: str = ""
    kv_dtype: str = ""

    def only_its_own(self) -> bool:
        """Whether all that this kind of frame does not have is 0 or "" """
        has = set(TENSORS[self.tag])
        return (
            bool(has & {"q", "out"} or not (self.queries or self.dtype))
            and bool(has & {"k"} or not (self.fresh or self.kv_dtype))
            and bool(has & {"q"} or not self.d_q)
            and bool(has & {"k"} or not self.d_k)
            and bool(has & {"v", "out"} or not self.d_v)
        )

    def places(self) -> Mapping[str, Place]:
        """Where each tensor stands, in their order."""
        return _places(self.tag, self.queries, self.fresh, (self.d_q, self.d_k, self.d_v), self.dtype, self.kv_dtype)

    @property
    def size(self) -> int:
        last = list(self.places().values())[-1]
        return last.at + last.size

    def head(self, layer: int, seconds: float = 0.0) -> bytes:
        """The first 64 bytes of a layer's frame. Raises ProtocolError for numbers that its fields do not hold."""
        codes = _CODES.index(self.dtype), _CODES.index(self.kv_dtype)
        counts = self.queries, self.fresh
        try:
            packed = _HEADER.pack(self.epoch, self.batch, *counts, self.d_k, self.d_v, *codes, self.d_q, layer, seconds)
        except (struct.error, OverflowError) as error:
            raise ProtocolError(f"{CLASSES[self.tag].__name__} of layer {layer}, {self}: {error}") from error
        return pack_prefix(Prefix(self.tag, _HEADER.size, self.size - HEAD_SIZE)) + packed


@lru_cache(maxsize=256)  # of the few kinds that a batch has in all its layers
def _places(
    tag: int, queries: int, fresh: int, widths: tuple[int, int, int], dtype: str, kv_dtype: str
) -> Mapping[str, Place]:
    d_q, d_k, d_v = widths
    shapes = {
        "q": (dtype, (queries, d_q)),
        "k": (kv_dtype, (fresh, d_k)),
        "v": (kv_dtype, (fresh, d_v)),
        "out": (dtype, (queries, d_v)),
        "lse": ("f32", (queries,)),
    }
    places, offset = {}, HEAD_SIZE
    for name in TENSORS[tag]:
        offset += padding(offset)
        places[name] = Place(offset, nbytes(*shapes[name]), *shapes[name])
        offset += places[name].size
    return MappingProxyType(places)


def frames_between(
    queries: int, fresh: int, spec: LayerSpec, dtype: str, kv_dtype: str
) -> tuple[LayerFrame, LayerFrame]:
    """The frames of a layer between the model and a holder that gets so many vectors of q and of k, and the answers;
    of batch 0. A holder that is sent no q has no answer. Of a layer with states, k is gates in float32, and as many
    vectors are answered."""
    state = spec.kind in STATES
    kind = m.Advance if state else m.Exchange if queries and fresh else m.Query if queries else m.Fresh
    d_q, d_k, own_v = spec.widths
    d_q, q_type = (d_q, dtype) if queries else (0, "")
    d_k, own_v, kv_type = (d_k, own_v, "f32" if state else kv_dtype) if fresh else (0, 0, "")
    request = LayerFrame(TAGS[kind], 0, 0, queries, fresh, d_q, d_k, own_v, q_type, kv_type)
    answer, vectors = (m.Advanced, fresh) if state else (m.Attended, queries)
    return request, LayerFrame(TAGS[answer], 0, 0, queries=vectors, d_v=spec.d_v, dtype=dtype)


def set_batch(head: memoryview, epoch: int, batch: int) -> None:
    """Make a head that of another batch, whose frames have the same tensors."""
    _BATCH.pack_into(head, PREFIX_SIZE, epoch, batch)


def set_layer(head: memoryview, layer: int, seconds: float = 0.0) -> None:
    """Make a head that of another layer."""
    _LAYER.pack_into(head, LAYER_AT, layer, seconds)


def seconds_stand(head: memoryview) -> bool:
    """Whether the seconds of a head are a number that an answer may have."""
    seconds = _LAYER.unpack_from(head, LAYER_AT)[1]
    return math.isfinite(seconds) and seconds >= 0


def frame_of(message: m.Query | m.Fresh | m.Exchange | m.Attended) -> LayerFrame:
    """The frame that carries a message. Raises ProtocolError for tensors that do not fit together."""
    tensors = {name: getattr(message, name) for name in TENSORS[TAGS[type(message)]]}
    q, k, v = (tensors.get(name) for name in ("q", "k", "v"))
    out = tensors.get("out")
    frame = LayerFrame(
        TAGS[type(message)],
        message.epoch,
        message.batch,
        queries=next((len(x) for x in (q, out) if x is not None), 0),
        fresh=0 if k is None else len(k),
        d_q=0 if q is None else q.shape[-1],
        d_k=0 if k is None else k.shape[-1],
        d_v=next((x.shape[-1] for x in (v, out) if x is not None), 0),
        dtype=next((dtype_name(x.dtype) for x in (q, out) if x is not None), ""),
        kv_dtype="" if k is None else dtype_name(k.dtype),
    )
    for name, place in frame.places().items():
        got = dtype_name(tensors[name].dtype), tuple(tensors[name].shape)
        if got != (place.dtype, place.shape):
            raise ProtocolError(
                f"{type(message).__name__}'s {name} is {got[0]} {got[1]}, beside its other tensors it must be "
                f"{place.dtype} {place.shape}"
            )
    return frame


def read_head(view: memoryview, prefix: Prefix) -> tuple[LayerFrame, int, float]:
    """What a frame has, its layer and seconds. Raises ProtocolError where the header is malformed, or its tensors do
    not fill the frame exactly."""
    name = CLASSES[prefix.tag].__name__
    if prefix.header != _HEADER.size:
        raise ProtocolError(f"{name} header of {prefix.header} bytes, it has {_HEADER.size}")
    epoch, batch, queries, fresh, d_k, d_v, code, kv_code, d_q, layer, seconds = _HEADER.unpack_from(view, PREFIX_SIZE)
    for number in (epoch, batch):
        if not 0 <= number < _MOST:
            raise ProtocolError(f"{name} header: expected an integer from 0 to 2^62, got {number}")
    if code >= len(_CODES) or kv_code >= len(_CODES):
        raise ProtocolError(f"unknown dtype {max(code, kv_code)}, allowed: up to {len(_CODES) - 1}")
    if not (math.isfinite(seconds) and seconds >= 0) or (seconds and prefix.tag not in ANSWERS):
        raise ProtocolError(f"{name} header: expected a number of seconds, 0 but in an answer, got {seconds}")
    frame = LayerFrame(prefix.tag, epoch, batch, queries, fresh, d_q, d_k, d_v, _CODES[code], _CODES[kv_code])
    if frame.head(layer, seconds) != view[:HEAD_SIZE] or not frame.only_its_own():
        raise ProtocolError(f"{name} header does not describe its frame of {prefix.frame} bytes: {frame}")
    return frame, layer, seconds
