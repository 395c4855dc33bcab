"""Tensors as raw little-endian bytes, and back without a copy.

Both directions share memory: `buffer` views the tensor, `from_buffer` views the bytes.
"""

from __future__ import annotations

import functools
import math
import sys

import torch

from lamina_protocols.errors import ProtocolError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
FLOAT_NAMES = {dtype: name for name, dtype in DTYPES.items() if dtype.is_floating_point}
_WIRE = {  # names in a header: short, because each layer's message has a header
    "f32": torch.float32,
    "b16": torch.bfloat16,
    "f16": torch.float16,
    "i8": torch.int8,
    "u8": torch.uint8,  # whole pages, as raw bytes
    "i32": torch.int32,  # block tables
}
_MOST_ELEMENTS = 1 << 40
_NAMES = {dtype: name for name, dtype in _WIRE.items()}

if sys.byteorder != "little":
    raise ImportError("lamina sends tensors as little-endian bytes and runs on little-endian machines only")


def dtype_name(dtype: torch.dtype) -> str:
    """The wire name of a dtype. Raises ProtocolError where the wire has none."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ProtocolError(f"dtype {dtype} cannot be sent, only {', '.join(DTYPES)}") from None


def buffer(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor (made contiguous first), sharing its memory."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


@functools.lru_cache(maxsize=1024)  # of what is the same in each layer and step
def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size in bytes of a tensor as a header describes it. Raises ProtocolError for an unknown dtype or a bad shape."""
    if dtype not in _WIRE:
        raise ProtocolError(f"unknown dtype {dtype!r}, allowed: {', '.join(_WIRE)}")
    if any(dim < 0 for dim in shape):
        raise ProtocolError(f"negative dimension in tensor shape {shape}")
    if math.prod(dim or 1 for dim in shape) > _MOST_ELEMENTS:  # torch counts strides of an empty tensor too
        raise ProtocolError(f"tensor of shape {shape}, allowed: {_MOST_ELEMENTS} elements, a dimension of 0 as 1")
    return math.prod(shape) * _WIRE[dtype].itemsize


def from_buffer(data: memoryview, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that views `data`, which must be exactly as long as dtype and shape say and writable."""
    if len(data) != nbytes(dtype, shape):
        raise ProtocolError(f"{len(data)} bytes for a {dtype} tensor {shape} of {nbytes(dtype, shape)}")
    if not len(data):
        return torch.empty(shape, dtype=_WIRE[dtype])
    return torch.frombuffer(data, dtype=_WIRE[dtype]).view(shape)
