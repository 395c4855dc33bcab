"""Which weights stay in few bits, and where they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lamina_kernels.packed.layout import ROWS
from lamina_kernels.packed.matrix import PackedMatrix
from lamina_kernels.packed.pack import bytes_of, can_pack
from lamina_kernels.packed.quantize import quantize
from lamina_kernels.paged import memory
from lamina_workers.decoder.checkpoint import TensorSource
from lamina_workers.decoder.packed_tensors import PackedTensor
from lamina_workers.errors import ModelFileError

ALIGNMENT = 64
"""Of each tensor in memory, in bytes: a cache line."""
QUANTIZE = {"int4": 4, "int8": 8}
"""Bits by the name of what floats become."""
_ARENA = 256 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Packing:
    """packed: matrices that the checkpoint has packed stay so. quantize: one of QUANTIZE, what those that it has as
    floats become; "": they stay floats."""

    packed: bool = False
    quantize: str = ""

    def kind_of(self, tensor: PackedTensor | None, plain: bool = False, wide: bool = False) -> str | None:
        """What becomes of a matrix as the kernels call it; None: floats. `tensor`: where the checkpoint has it packed.
        plain: it is never quantised. wide: it is not quantised to 4 bits: the embedding and the head."""
        if tensor is not None:
            return tensor.kind if self.packed else None
        if plain or not self.quantize:
            return None
        return "int8" if wide else self.quantize


UNPACKED = Packing()


class Arena:
    """Memory of weights on a CPU, which are streamed in every step: few large blocks of huge pages. `room`: the most
    bytes that are taken, which count when they are written."""

    def __init__(self, room: int) -> None:
        self._left = room
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, n_bytes: int) -> torch.Tensor:
        """Uint8 `[n_bytes]`, aligned to a cache line."""
        if n_bytes > len(self._block) - self._used:
            self._block = memory.allocate(max(1, n_bytes, min(_ARENA, self._left)))
            self._left -= len(self._block)
            self._used = 0
        taken = self._block[self._used : self._used + n_bytes]
        self._used += n_bytes + -n_bytes % ALIGNMENT
        return taken


def pack_all(
    arena: Arena, parts: Sequence[tuple[str, PackedTensor | torch.Tensor, str]], bits: int
) -> list[PackedMatrix]:
    """Matrices `(name, what it is, kind)`, the floats among them quantised to `bits`. Neighbours of one format whose
    tiles follow one another become one. Raises ModelFileError naming a tensor that cannot be packed."""
    found: list[PackedMatrix] = []
    room = arena.take(sum(bytes_of(kind, *matrix.shape) for _, matrix, kind in parts))
    first = 0
    for name, matrix, kind in parts:
        n_bytes = bytes_of(kind, *matrix.shape)
        into = room[first : first + n_bytes]
        try:
            made = quantize(matrix, bits, into) if isinstance(matrix, torch.Tensor) else matrix.pack(into)
        except ValueError as error:
            raise ModelFileError(f"tensor {name} cannot be packed: {error}") from error
        before = found[-1] if found else None
        if before is not None and before.format == made.format and before.shape[0] % ROWS == 0:
            rows = before.shape[0] + made.shape[0]
            found[-1] = PackedMatrix(
                (rows, made.shape[1]), made.format, room[first - before.nbytes : first + made.nbytes]
            )
        else:
            found.append(made)
        first += n_bytes
    return found


def packed_kind(source: TensorSource) -> str | None:
    """The kind of a matrix that a checkpoint has packed and that can stay so; None where there is none."""
    for name in source.names():
        tensor = source.packed(name)
        if tensor is not None and can_pack(tensor.kind, *tensor.shape):
            return tensor.kind
    return None


def kept_bytes(source: TensorSource, dtype: torch.dtype, packing: Packing) -> int:
    """Bytes that the weights of a checkpoint take in memory, once they are loaded."""
    total = 0
    for name in source.names():
        tensor, shape = source.packed(name), tuple(source.shape(name))
        kind = packing.kind_of(tensor, plain=len(shape) != 2)
        if kind is not None and len(shape) == 2 and can_pack(kind, *shape):
            total += bytes_of(kind, *shape)
        else:
            total += math.prod(shape) * dtype.itemsize
    return total
