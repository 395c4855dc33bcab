"""A matrix as a checkpoint has it packed: the rows and columns of it that are wanted, for kernels or as floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from lamina_kernels.packed.layout import BLOCK
from lamina_kernels.packed.matrix import PackedMatrix
from lamina_kernels.packed.pack import BLOCKS, CODES, can_pack, pack_blocks, pack_codes
from lamina_workers.errors import UnsupportedModelError

EVERY = slice(None)
_CHUNK = 16 << 20  # bytes of floats that are unpacked at a time


class PackedTensor(Protocol):
    """A matrix in a file. kind: as `lamina_kernels.packed.pack` calls it, or ggml's name of one that it does not know;
    shape: `(n_out, n_in)`."""

    @property
    def kind(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def cut(self, rows: torch.Tensor, columns: slice = EVERY) -> PackedTensor | None:
        """Some rows, by their numbers, int64 `[n]`, of some columns; None where blocks would be cut."""

    def pack(self, into: torch.Tensor) -> PackedMatrix:
        """For the kernels, in `into`, uint8. ValueError names a row that cannot be."""

    def floats(self) -> torch.Tensor:
        """Float32 `[n_out, n_in]`."""


@dataclass(frozen=True, slots=True, eq=False)
class GgmlBlocks:
    """Rows of ggml's blocks. raw: uint8 `[n, bytes of a row]`, perhaps a view of a file; n_in: numbers of a row. order:
    the rows of raw that these are, int64 `[n_out]`; None: all."""

    kind: str
    raw: torch.Tensor
    n_in: int
    order: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.raw if self.order is None else self.order), self.n_in

    def cut(self, rows: torch.Tensor, columns: slice = EVERY) -> GgmlBlocks | None:
        begin, end, _ = columns.indices(self.n_in)
        numbers, size = block_of(self.kind)
        if begin % numbers or end % numbers:
            return None
        raw = self.raw[:, begin // numbers * size : end // numbers * size]
        return GgmlBlocks(self.kind, raw, end - begin, rows if self.order is None else self.order[rows])

    def pack(self, into: torch.Tensor) -> PackedMatrix:
        return pack_blocks(self.kind, self._rows(), into)

    def _rows(self) -> torch.Tensor:
        return self.raw if self.order is None else chosen(self.raw, self.order)

    def floats(self) -> torch.Tensor:
        if can_pack(self.kind, *self.shape):
            return pack_blocks(self.kind, self._rows()).unpack(torch.float32)
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            values = dequantize(self._rows().contiguous().numpy(), GGMLQuantizationType[self.kind])
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"weights are quantised as {self.kind}, which cannot be read; allowed are {', '.join(BLOCKS)}, and "
                "what the gguf package dequantises"
            ) from error
        return torch.from_numpy(values).float().view(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """scale * code + min for groups of columns, or without minima scale * (code - 2 ** (bits - 1)).

    read: the codes of rows by their numbers, uint8 `[n, n_in]`. scales, mins: float32 `[n_out, groups]`. `columns` and
    `rows`, where given, are what is left of them.
    """

    bits: int
    n_in: int
    read: Callable[[torch.Tensor], torch.Tensor]
    scales: torch.Tensor
    mins: torch.Tensor | None

    @property
    def kind(self) -> str:
        group = self.n_in // self.scales.shape[1]
        if group % BLOCK and group < self.n_in:
            return f"int{self.bits} in groups of {group}"
        return CODES.get((self.bits, self.mins is not None), f"int{self.bits} with minima")

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.scales), self.n_in

    def cut(self, rows: torch.Tensor, columns: slice = EVERY) -> Codes | None:
        begin, end, _ = columns.indices(self.n_in)
        group = self.n_in // self.scales.shape[1]
        tables = [self.scales] if self.mins is None else [self.scales, self.mins]
        if end - begin < self.n_in:
            if begin % BLOCK or end % BLOCK or (group % BLOCK and group < self.n_in):
                return None
            blocks = slice(begin // BLOCK, end // BLOCK)
            tables = [_by_block(x, self.n_in)[:, blocks] for x in tables]

        def read(wanted: torch.Tensor) -> torch.Tensor:
            return self.read(rows[wanted])[:, begin:end]

        scales, *mins = (chosen(x, rows) for x in tables)
        return Codes(self.bits, end - begin, read, scales, mins[0] if mins else None)

    def pack(self, into: torch.Tensor) -> PackedMatrix:
        return pack_codes(self._codes().contiguous(), self.scales, self.mins, into, self.bits)

    def floats(self) -> torch.Tensor:
        codes: torch.Tensor = self._codes().float().view(len(self.scales), self.scales.shape[1], -1)
        scales = self.scales.unsqueeze(-1)
        if self.mins is None:
            return ((codes - (1 << (self.bits - 1))) * scales).flatten(1)
        return (codes * scales + self.mins.unsqueeze(-1)).flatten(1)

    def _codes(self) -> torch.Tensor:
        return self.read(torch.arange(len(self.scales)))


def _by_block(x: torch.Tensor, n_in: int) -> torch.Tensor:
    """Of groups' numbers those of each block of columns."""
    return x.repeat_interleave(n_in // x.shape[1] // BLOCK, 1)


def block_of(kind: str) -> tuple[int, int]:
    """The numbers of a block of ggml's `kind`, and its bytes."""
    if kind in BLOCKS:
        return BLOCKS[kind][1:]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # only for kinds that are seldom met

    block: tuple[int, int] = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return block


def chosen(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows]: a view where the rows follow one another."""
    n = len(rows)
    if n and bool((rows[1:] - rows[:-1] == 1).all()):
        first = int(rows[0])
        return x[first : first + n]
    return x[rows]


def unpack_into(out: torch.Tensor, tensor: PackedTensor, rows: torch.Tensor, columns: slice) -> None:
    """Write rows and columns of a packed matrix to out, `[n, columns]` of any dtype and device, some rows at a time."""
    step = max(1, _CHUNK // (4 * tensor.shape[1]))
    for first in range(0, len(rows), step):
        numbers = rows[first : first + step]
        part = tensor.cut(numbers, columns)
        floats = part.floats() if part is not None else _floats_of(tensor.cut(numbers))[:, columns]
        out[first : first + len(numbers)].copy_(floats)


def _floats_of(part: PackedTensor | None) -> torch.Tensor:
    if part is None:
        raise ValueError("a whole row has no block that is cut")
    return part.floats()
