"""Lies in every field of every message, made from the messages' definitions: frames that are nearly right."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from typing import Any

import msgpack
import torch

from lamina_protocols.channels.control import FAREWELL
from lamina_protocols.errors import LaminaError
from lamina_protocols.frames import codec, layer_frames
from lamina_protocols.frames.fields import Record
from lamina_protocols.frames.frames import PREFIX_SIZE, Prefix, pack_prefix, read_prefix
from lamina_protocols.messages.messages import Fault

NUMBERS = (0, 1, 7, 1 << 31, 1 << 32, (1 << 62) - 1, 1 << 63, -1)
OTHERS = (
    None, True, False, 0.5, float("nan"), float("inf"), -1e308, 1e308, "", "x" * 3000, b"\0", [], [[]], [-1],
    [(1 << 62) - 1] * 3, ["f32", 0, 1 << 61], ["f32", 1 << 32, 1 << 32, 0], ["f32", 1 << 40], ["i8", 1, 1], [[0] * 7],
)  # fmt: skip
SHAPES = (0, 1, 3, 255, 65535, (1 << 32) - 1)
BYTES = {
    "nothing": lambda frame: b"",
    "half a frame": lambda frame: frame[: len(frame) // 2],
    "half a prefix": lambda frame: frame[:7],
    "twice": lambda frame: frame * 2,
    "another magic": lambda frame: b"X" + frame[1:],
    "a byte more": lambda frame: frame + b"\0",
    "noise": lambda frame: bytes(range(256)) * 8,
    "a large claim": lambda frame: pack_prefix(Prefix(2, 1 << 19, 1 << 30)),
    "a larger claim": lambda frame: pack_prefix(Prefix(2, 1 << 30, 1 << 60)),
    "an unknown tag": lambda frame: pack_prefix(Prefix(77, 0, 0)),
    "a thousand times": lambda frame: frame * 1000,
}
"""Of the bytes of a frame, what a liar sends instead."""
SILENT = {"nothing", "half a frame", "half a prefix", "a large claim"}


def variants(values: Any, every: int = 1) -> Iterator[tuple[str, Any]]:
    """A header with one value replaced, at any depth: what was replaced by what, and the header. Further in, every
    third lie alone."""
    for at, value in enumerate(values):
        for lie in (*NUMBERS, *OTHERS)[at % every :: every]:
            yield f"{at}={str(lie)[:30]}", [*values[:at], lie, *values[at + 1 :]]
        if isinstance(value, list | tuple) and value:
            for name, inside in variants(list(value)[:2], 3):
                yield f"{at}.{name}", [*values[:at], [*inside, *value[2:]], *values[at + 1 :]]


def some(lies: list[Any], most: int) -> list[Any]:
    """About `most` lies, evenly spread, and all of the first ones, which are about whole frames."""
    first = len(BYTES) + 3
    return lies[:first] + lies[first :: max(1, (len(lies) - first) // most)]


def lies_about(frame: bytes) -> Iterator[tuple[str, bytes]]:
    """What a liar could send in place of a frame: a name, and the bytes."""
    prefix = read_prefix(frame)
    for name, change in BYTES.items():
        yield name, change(frame)
    ids = codec.decode(bytearray(frame))
    for name, fault in (
        ("a fault", (ids.epoch, ids.batch)),
        ("a farewell", FAREWELL),
        ("a fault of another", (1, 9999)),
    ):
        yield name, b"".join(codec.encode(Fault(*fault, "so it says")))
    if prefix.tag in layer_frames.TENSORS:
        yield from _about_a_layer(frame)
        return
    header, payload = frame[PREFIX_SIZE : PREFIX_SIZE + prefix.header], frame[PREFIX_SIZE + prefix.header :]
    names = list(Record.of(codec._MESSAGES[prefix.tag]).fields)
    for name, values in variants(msgpack.unpackb(header)):
        packed = msgpack.packb(values)
        at, _, rest = name.partition("=") if "=" in name.split(".")[0] else name.partition(".")
        field = names[int(at)] if int(at) < len(names) else f"tensor {at}"
        yield f"{field}:{rest}", pack_prefix(Prefix(prefix.tag, len(packed), len(payload))) + packed + payload


def _about_a_layer(frame: bytes) -> Iterator[tuple[str, bytes]]:
    """A layer's frame with another number in its header, whether or not the rest fits, or with other tensors."""
    fields = ("epoch", "batch", "queries", "fresh", "d_k", "d_v", "dtype", "kv_dtype", "d_q", "layer", "seconds")
    values = layer_frames._HEADER.unpack_from(frame, PREFIX_SIZE)
    for at, field in enumerate(fields):
        for lie in (*SHAPES, -1, (1 << 62) - 1, float("nan"), float("inf"), 3e38, -1.0):
            if lie == values[at]:  # no lie; with other numbers behind it one that nobody can see
                continue
            changed = [*values[:at], lie, *values[at + 1 :]]
            try:
                header = layer_frames._HEADER.pack(*changed)
            except (struct.error, OverflowError):
                continue
            yield f"{field}={lie}", frame[:PREFIX_SIZE] + header + frame[layer_frames.HEAD_SIZE :]
            if isinstance(lie, int) and at in range(2, 9):
                whole = _refitted(frame, changed)
                if whole is not None:
                    yield f"{field}={lie}, and the frame fits", whole
    message = codec.decode(bytearray(frame))
    for name in layer_frames.TENSORS[read_prefix(frame).tag]:
        tensor = getattr(message, name)
        for lie in (float("nan"), float("inf"), float("-inf"), 1e30):
            bent = dataclasses.replace(message, **{name: torch.full_like(tensor, lie)})
            yield f"{name} of {lie}", b"".join(codec.encode(bent))


def _refitted(frame: bytes, values: list[Any]) -> bytes | None:
    """A frame of that header, with as much payload as it claims; None above a megabyte."""
    tag = read_prefix(frame).tag
    epoch, batch, queries, fresh, d_k, d_v, dtype, kv_dtype, d_q, layer, seconds = values
    if not (0 <= dtype < len(layer_frames._CODES) and 0 <= kv_dtype < len(layer_frames._CODES)):
        return None
    codes = layer_frames._CODES[dtype], layer_frames._CODES[kv_dtype]
    made = layer_frames.LayerFrame(tag, epoch, batch, queries, fresh, d_q, d_k, d_v, *codes)
    try:
        if made.size > 1 << 20:
            return None
        return made.head(layer, seconds) + bytes(made.size - layer_frames.HEAD_SIZE)
    except LaminaError:  # such a frame cannot be written down
        return None
