"""A matrix as a checkpoint has it packed: the rows and columns of it that are wanted, for kernels or as floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from lamina_kernels.packed.layout import BLOCK, ROWS
from lamina_kernels.packed.matrix import PackedMatrix
from lamina_kernels.packed.pack import BLOCKS, CODES, FORMATS, can_pack, pack_blocks, pack_codes, room_for
from lamina_kernels.packed.quantize import quantize
from lamina_workers.errors import ModelFileError, UnsupportedModelError

EVERY = slice(None)
# Kinds that the kernels do not have, and those that have the same numbers; of the others int8 is made.
_SAME = {"MXFP4": "FP4", "Q3_K": "Q6_K"}
_ALONE = {"Q4_K": "Q4_1", "Q5_K": "Q5_1"}  # whose blocks, but for what float16 rounds, can stand in another order
READABLE = (
    *(kind for kind in BLOCKS if kind != "FP4"),
    *_SAME,
    "Q2_K",
    "IQ4_NL",
    "IQ4_XS",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
)
"""ggml's kinds of blocks that can be read."""
MXFP4_BLOCK = 32
"""Numbers of MXFP4 that share a scale."""
E2M1_ZERO = 16
"""The code of 0 in what `e2m1` gives."""
_CHUNK = 16 << 20  # bytes of floats that are unpacked at a time
_E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]) + E2M1_ZERO
# Of each byte the codes of its two numbers, that of the low four bits first, as one int16.
_OF_BYTE = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], 1).to(torch.uint8).view(torch.int16).flatten()
_POWERS = torch.tensor([2.0 ** (power - 128) for power in range(255)])  # of doubled e2m1


class PackedTensor(Protocol):
    """A matrix in a file. kind: as `lamina_kernels.packed.pack` calls it, or ggml's name of one that it does not know;
    bits: of a number there, about; shape: `(n_out, n_in)`."""

    @property
    def kind(self) -> str: ...

    @property
    def bits(self) -> float: ...

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
    """Rows of ggml's blocks of the kind `stored`. raw: uint8 `[n, bytes of a row]`, perhaps views of a file, one below
    the other; n_in: numbers of a row. order: the rows of raw that these are, int64 `[n_out]`; None: all. columns: the
    numbers of a row that these are, in which order; None: all. Whole blocks stay what they are."""

    stored: str
    raw: tuple[torch.Tensor, ...]
    n_in: int
    order: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        kind = _SAME.get(self.stored, self.stored)
        if self.columns is not None:
            kind = _ALONE.get(kind, kind)
            blocks = self.columns.view(-1, BLOCK) if len(self.columns) % BLOCK == 0 else self.columns
            in_blocks = blocks.ndim == 2 and torch.equal(blocks, blocks[:, :1] // BLOCK * BLOCK + torch.arange(BLOCK))
            return kind if in_blocks and kind in BLOCKS and BLOCKS[kind][1] == BLOCK else "int8"
        return kind if kind in BLOCKS else "int8"

    @property
    def bits(self) -> float:
        numbers, size = block_of(self.stored)
        return 8 * size / numbers

    @property
    def shape(self) -> tuple[int, int]:
        n_in = self.n_in if self.columns is None else len(self.columns)
        return sum(map(len, self.raw)) if self.order is None else len(self.order), n_in

    def cut(self, rows: torch.Tensor, columns: slice = EVERY) -> GgmlBlocks | None:
        order = rows if self.order is None else self.order[rows]
        if self.columns is not None:
            return replace(self, order=order, columns=self.columns[columns])
        begin, end, _ = columns.indices(self.n_in)
        numbers, size = block_of(self.stored)
        if begin % numbers or end % numbers:
            return None
        places = slice(begin // numbers * size, end // numbers * size)
        return GgmlBlocks(self.stored, tuple(part[:, places] for part in self.raw), end - begin, order)

    def pack(self, into: torch.Tensor) -> PackedMatrix:
        if self.kind == "int8":
            return quantize(self.floats(), 8, into)
        blocks = self._blocks()
        if self.columns is not None:
            alone = _alone(blocks, self.stored).view(len(blocks), self.n_in // BLOCK, -1)
            blocks = alone[:, self.columns[::BLOCK] // BLOCK].flatten(1)
        return pack_blocks(self.kind, blocks, into)

    def floats(self) -> torch.Tensor:
        if can_pack(_SAME.get(self.stored, self.stored), self.shape[0], self.n_in):
            values = pack_blocks(_SAME.get(self.stored, self.stored), self._blocks()).unpack(torch.float32)
        else:
            values = self._unpacked()
        return values if self.columns is None else values[:, self.columns]

    def _rows(self) -> torch.Tensor:
        raw = self.raw[0] if len(self.raw) == 1 else torch.cat(self.raw)
        return raw if self.order is None else chosen(raw, self.order)

    def _blocks(self) -> torch.Tensor:
        """As blocks that the kernels have, of the same numbers."""
        if self.stored not in _SAME:
            return self._rows()
        blocks = self._rows().reshape(-1, block_of(self.stored)[1])
        return (_from_mxfp4 if self.stored == "MXFP4" else _from_q3)(blocks).view(self.shape[0], -1)

    def _unpacked(self) -> torch.Tensor:
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            with np.errstate(invalid="ignore"):  # it is named below
                values = dequantize(self._rows().contiguous().numpy(), GGMLQuantizationType[self.stored])
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"weights are quantised as {self.stored}, which cannot be read; allowed are {', '.join(READABLE)}"
            ) from error
        floats = torch.from_numpy(values).float().view(-1, self.n_in)
        if not floats.isfinite().all():
            raise ValueError("a row has a scale that is not finite")
        return floats


def _alone(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """Rows of blocks of 32: those of Q4_K or Q5_K as Q4_1 or Q5_1.

    The former have d and dmin, 8 scales and 8 minima of 6 bits in 12 bytes, with Q5_K 32 bytes of fifth bits, and 32
    bytes for each pair of blocks.
    """
    if kind not in _ALONE:
        return rows
    blocks = rows.reshape(-1, BLOCKS[kind][2])
    first, second, third = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), 1)
    mins = torch.cat((second & 63, third >> 4 | second >> 6 << 4), 1)
    factors = blocks[:, :4].contiguous().view(torch.float16).float()
    pair = torch.stack((factors[:, :1] * scales, -factors[:, 1:] * mins), -1).half().view(torch.uint8)  # [n, 8, 4]
    codes = blocks[:, -128:].reshape(-1, 4, 1, 32)
    codes = torch.cat((codes & 15, codes >> 4), 2).view(-1, 8, 32)
    parts = [pair, codes[..., :16] | codes[..., 16:] << 4]
    if kind == "Q5_K":
        bits = (blocks[:, 16:48].unsqueeze(1) >> torch.arange(8).view(8, 1) & 1).view(-1, 8, 4, 8)
        parts.insert(1, (bits << torch.arange(8)).sum(-1).byte())
    return torch.cat(parts, -1)


def _from_mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """FP4 of MXFP4's blocks, uint8 `[n, 17]`: a power of two, then 16 bytes of two codes."""
    return torch.cat((torch.exp2(blocks[:, :1].float() - 128).half().view(torch.uint8), blocks[:, 1:]), 1)


def _from_q3(blocks: torch.Tensor) -> torch.Tensor:
    """Q6_K of Q3_K's blocks, uint8 `[n, 110]`: 256 third bits, 256 pairs of lower bits, 16 scales of 6 bits, a factor.

    Both have 16 scales, of 16 numbers each; 128 numbers stand in 32 bytes of pairs, or of third bits.
    """
    shifts = torch.arange(0, 8, 2).view(1, 1, 4, 1)
    pairs = blocks[:, 32:96].view(-1, 2, 1, 32) >> shifts & 3
    third = (blocks[:, None, :32] >> torch.arange(8).view(1, 8, 1) & 1).view(-1, 2, 4, 32)
    codes = (pairs.int() + 4 * third.int() - 4 + 32).view(-1, 2, 4, 32)  # Q6_K takes 32 off
    low, high = codes & 15, codes >> 4
    lower = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    upper = (high << shifts).sum(2).reshape(-1, 64)
    packed = blocks[:, 96:108].int()
    scales = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    scales = (scales | ((packed[:, None, 8:] >> torch.arange(0, 8, 2).view(1, 4, 1) & 3) << 4).reshape(-1, 16)) - 32
    return torch.cat((lower.byte(), upper.byte(), scales.to(torch.int8).view(torch.uint8), blocks[:, 108:]), 1)


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
            return codes.sub_(1 << (self.bits - 1)).mul_(scales).flatten(1)
        return codes.mul_(scales).add_(self.mins.unsqueeze(-1)).flatten(1)

    def _codes(self) -> torch.Tensor:
        return self.read(torch.arange(len(self.scales)))


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """Numbers for which kernels have no tiles: they become 8 bits there, each block of 32 by its largest number, which
    is a smaller error than that of rounding to what the file has. read: rows by their numbers, float32 `[n, n_in]`."""

    shape: tuple[int, int]
    read: Callable[[torch.Tensor], torch.Tensor]
    bits: float = 8

    @property
    def kind(self) -> str:
        return CODES[8, False]

    def cut(self, rows: torch.Tensor, columns: slice = EVERY) -> Rounded:
        begin, end, _ = columns.indices(self.shape[1])
        return Rounded((len(rows), end - begin), lambda wanted: self.read(rows[wanted])[:, begin:end])

    def pack(self, into: torch.Tensor) -> PackedMatrix:
        n_out, n_in = self.shape
        matrix = room_for(FORMATS[self.kind], n_out, n_in, into)
        step = max(1, _CHUNK // (4 * n_in * ROWS)) * ROWS
        for first in range(0, n_out, step):
            rows = slice(first, min(first + step, n_out))
            quantize(self.read(torch.arange(rows.start, rows.stop)), 8, matrix.part(rows).data)
        return matrix

    def floats(self) -> torch.Tensor:
        return self.read(torch.arange(self.shape[0]))


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4:
    """MXFP4; for kernels a block's scale below 2^-24 becomes 0.

    name: of the scales; codes: uint8 `[n_out, n_in / 2]`, two numbers in a byte; powers: uint8 `[n_out, n_in / 32]`,
    each block's power of two plus 127 (255: NaN, which is refused when it is read).
    """

    name: str
    codes: torch.Tensor
    powers: torch.Tensor
    bits: float = 4.25

    @property
    def kind(self) -> str:
        return "FP4"

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), 2 * self.codes.shape[1]

    def cut(self, rows: torch.Tensor, columns: slice = EVERY) -> Mxfp4 | None:
        begin, end, _ = columns.indices(self.shape[1])
        if begin % MXFP4_BLOCK or end % MXFP4_BLOCK:
            return None
        codes, powers = chosen(self.codes, rows), chosen(self.powers, rows)
        return Mxfp4(self.name, codes[:, begin // 2 : end // 2], powers[:, begin // MXFP4_BLOCK : end // MXFP4_BLOCK])

    def pack(self, into: torch.Tensor) -> PackedMatrix:
        self._check()
        codes = self.codes.reshape(-1, MXFP4_BLOCK // 2)  # neighbours in a byte
        codes = torch.stack((codes & 15, codes >> 4), -1).view(-1, 2, MXFP4_BLOCK // 2)
        blocks = torch.cat((self.powers.reshape(-1, 1), codes[:, 0] | codes[:, 1] << 4), 1)
        return pack_blocks(self.kind, _from_mxfp4(blocks).view(len(self.codes), -1), into)

    def floats(self) -> torch.Tensor:
        self._check()
        read, scales = (lambda rows: e2m1(chosen(self.codes, rows))), _POWERS[self.powers.int()]
        return Codes(5, self.shape[1], read, scales, None).floats()

    def _check(self) -> None:
        if bool((self.powers == 255).any()):
            raise ModelFileError(f"tensor {self.name} has scales that are no numbers")


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Of numbers in e2m1, two in a byte, twice each plus `E2M1_ZERO`. packed: uint8 `[n, m]` -> uint8 `[n, 2m]`."""
    return _OF_BYTE.index_select(0, packed.flatten().int()).view(torch.uint8).view(len(packed), -1)


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
