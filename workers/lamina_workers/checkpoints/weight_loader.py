"""The loader of weights: it takes a checkpoint's tensors, or a rank's parts of them, one by one.

`Packing` says which weights stay in few bits or become so, and an `Arena` is where they lie on a CPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lamina_kernels.dense.dense import Linear, repacks
from lamina_kernels.packed.layout import ROWS
from lamina_kernels.packed.matrix import PackedMatrix
from lamina_kernels.packed.pack import bytes_of, can_pack
from lamina_kernels.packed.quantize import quantize
from lamina_kernels.paged import memory
from lamina_workers.checkpoints.checkpoint import TensorSource
from lamina_workers.checkpoints.packed_tensors import EVERY, PackedTensor, chosen, unpack_into
from lamina_workers.errors import ModelFileError

logger = logging.getLogger("lamina")

ALL = (EVERY,)
"""All rows of a tensor."""
ALIGNMENT = 64
"""Of each tensor in memory, in bytes: a cache line."""
QUANTIZE = {"int4": 4, "int8": 8}
"""Bits by the name of what floats become."""
_ARENA = 256 << 20  # bytes
_WIDE = ("embed_tokens.weight", "lm_head.weight")
_CUT = ("kv_b_proj.weight",)  # its heads are laid out anew, as floats


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
        self._room = room
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, n_bytes: int) -> torch.Tensor:
        """Uint8 `[n_bytes]`, aligned to a cache line."""
        if n_bytes > len(self._block) - self._used:
            self._block = memory.allocate(max(1, n_bytes, min(_ARENA, self._room)))
            self._room -= len(self._block)
            self._used = 0
        piece = self._block[self._used : self._used + n_bytes]
        self._used += n_bytes + -n_bytes % ALIGNMENT
        return piece


def pack_all(
    arena: Arena, parts: Sequence[tuple[str, PackedTensor | torch.Tensor, str]], bits: int
) -> list[PackedMatrix]:
    """Matrices `(name, what it is, kind)`, the floats among them quantised to `bits`. Neighbours of one format whose
    tiles follow one another become one. Raises ModelFileError naming a tensor that cannot be packed."""
    matrices: list[PackedMatrix] = []
    room = arena.take(sum(bytes_of(kind, *matrix.shape) for _, matrix, kind in parts))
    first = 0
    for name, matrix, kind in parts:
        n_bytes = bytes_of(kind, *matrix.shape)
        into = room[first : first + n_bytes]
        with _naming(name, "packed"):
            result = quantize(matrix, bits, into) if isinstance(matrix, torch.Tensor) else matrix.pack(into)
        before = matrices[-1] if matrices else None
        if before is not None and before.format == result.format and before.shape[0] % ROWS == 0:
            rows = before.shape[0] + result.shape[0]
            matrices[-1] = PackedMatrix(
                (rows, result.shape[1]), result.format, room[first - before.nbytes : first + result.nbytes]
            )
        else:
            matrices.append(result)
        first += n_bytes
    return matrices


@contextmanager
def _naming(name: str, what: str) -> Iterator[None]:
    """Raise ModelFileError for numbers of the tensor `name` that are not allowed."""
    try:
        yield
    except ValueError as error:
        raise ModelFileError(f"tensor {name} cannot be {what}: {error}") from error


def packed_kind(source: TensorSource) -> str | None:
    """The kind of a matrix that a checkpoint has packed and that can stay so; None where there is none."""
    for name in source.names():
        tensor = source.packed(name)
        if tensor is not None and can_pack(tensor.kind, *tensor.shape):
            return tensor.kind
    return None


def kept_bytes(source: TensorSource, dtype: torch.dtype, packing: Packing) -> int:
    """Bytes that the weights of a checkpoint take in memory, once they are loaded. None are read."""
    total = 0
    for name in source.names():
        shape = tuple(source.shape(name))
        plain = len(shape) < 2 or name.endswith(_CUT)
        kind = packing.kind_of(None if plain else source.packed(name), plain, name.endswith(_WIDE))
        matrix = math.prod(shape[:-1]), (shape or (1,))[-1]  # stacked experts one below the other
        if kind is not None and can_pack(kind, *matrix):
            total += bytes_of(kind, *matrix)
        else:
            total += math.prod(shape) * dtype.itemsize
    return total


class Loader:
    """Takes tensors, or parts of them, out of a source one by one; holds no more than one of them twice.

    `rows` of a tensor are slices of its first dimension, side by side in the copy; `columns` is one of its second.
    Maps stay packed, or become so, as `packing` says, where all of their tensors can.
    """

    def __init__(
        self,
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None],
        total: int,
        room: int,
        packing: Packing = UNPACKED,
    ) -> None:
        self._source = source
        self._dtype = dtype
        self.device = device
        self._progress = progress
        self._done, self._total = 0, total
        self._arena = Arena(room) if device.type == "cpu" else None
        self._packing = packing
        self._unpacked, self._stored, self._reason = 0, 0, ""  # bytes, in the file too, and why the first are so

    def linear(
        self,
        names: Sequence[str],
        bias: bool = False,
        rows: Sequence[Sequence[slice]] | None = None,
        order: torch.Tensor | None = None,
        turned: int = 0,
        plain: bool = False,
    ) -> Linear:
        """One map out of those called `names`, their outputs side by side; `rows`: those of each that are kept. The
        first `turned` outputs are heads, each of which is put in that `order`. plain: what it gives is chosen by, so
        floats are not quantised."""
        parts = list(zip(names, rows or [ALL] * len(names), strict=True))
        return self.apart([parts], bias, order, turned, plain)[0]

    def apart(
        self,
        maps: Sequence[Sequence[tuple[str, Sequence[slice]]]],
        bias: bool = False,
        order: torch.Tensor | None = None,
        turned: int = 0,
        plain: bool = False,
    ) -> list[Linear]:
        """Maps whose outputs stand in the same tensors: of each, the names of those and its rows in them. `order` and
        `turned` as in `linear`, of the first map."""
        linears: list[Linear] = []
        for parts in maps:
            rows, own_order = [slices for _, slices in parts], order if not linears else None
            biases = self._join([f"{name}.bias" for name, _ in parts], rows, counts=False) if bias else None
            if own_order is not None and biases is not None:
                _reorder(biases[:turned], own_order)
            weight: torch.Tensor | list[PackedMatrix] | None
            weight = self._packed(
                [f"{name}.weight" for name, _ in parts], rows, order=own_order, turned=turned, plain=plain
            )
            if weight is None:
                weight = self._join([f"{name}.weight" for name, _ in parts], rows, counts=False)
                if own_order is not None:
                    _reorder(weight[:turned], own_order)
            linears.append(Linear(weight, biases))
        for name in dict.fromkeys(name for parts in maps for name, _ in parts):
            for part in ("weight", "bias") if bias else ("weight",):
                self._count(f"{name}.{part}")
        return linears

    def matrix(self, name: str, rows: Sequence[slice] = ALL) -> PackedMatrix | None:
        """The embedding, where it stays packed or becomes so, for its rows to be looked up."""
        matrices = self._packed([name], [rows], wide=True)
        if matrices is None:
            return None
        self._count(name)
        return matrices[0]

    def head(self, name: str, rows: Sequence[slice]) -> Linear:
        """The map to logits."""
        weight = self._packed([f"{name}.weight"], [rows], wide=True)
        if weight is None:
            return self.linear([name], rows=[rows], plain=True)
        self._count(f"{name}.weight")
        return Linear(weight)

    def lookup(self, name: str, rows: Sequence[slice], counts: bool = True) -> torch.Tensor:
        """Rows of a table that is only looked up: on a CPU the source's own tensor, in its dtype, where that has
        floats, so that only rows which occur take memory; else a copy. rows: one slice."""
        if self.device.type != "cpu" or self._source.packed(name) is not None:
            return self._join([name], [rows], counts=counts)
        tensor = self._tensor(name)[rows[0]]
        if counts:
            self._count(name)
        return tensor

    def norm(self, name: str, offset: float, order: torch.Tensor | None = None) -> torch.Tensor:
        """A norm's weights plus `offset`; those of heads are put in that `order`."""
        weight = self.copy(f"{name}.weight")
        if order is not None:
            _reorder(weight, order)
        return weight.add_(offset) if offset else weight

    def summed(self, name: str, bias: bool, columns: slice, keeps_bias: bool) -> Linear:
        """A map of which each rank has some inputs, `columns`, and one rank the bias."""
        weight: torch.Tensor | list[PackedMatrix] | None = self._packed([f"{name}.weight"], [ALL], columns)
        if weight is None:
            weight = self._join([f"{name}.weight"], [ALL], columns, counts=False)
        self._count(f"{name}.weight")
        if bias and not keeps_bias:
            self.skip(f"{name}.bias")
        return Linear(weight, self.copy(f"{name}.bias") if bias and keeps_bias else None)

    def copy(self, name: str, rows: Sequence[slice] = ALL) -> torch.Tensor:
        return self._join([name], [rows])

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor, in memory that is given back with them: for what is laid out anew and kept."""
        tensor = self._tensor(name)[rows].to(self.device, self._dtype, copy=True)
        self._count(name)
        return tensor

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of x, among the other weights."""
        return self._empty(tuple(x.shape)).copy_(x)

    def float32(self, name: str, rows: Sequence[slice] = ALL) -> torch.Tensor:
        """A tensor that is not rounded to the loader's dtype."""
        return self.pieces([(name, rows)])[0]

    def pieces(self, parts: Sequence[tuple[str, Sequence[slice]]]) -> list[torch.Tensor]:
        """As `float32`, rows of tensors of which one may have several."""
        tensors = []
        for name, rows in parts:
            tensor = self._tensor(name)
            tensors.append(torch.cat([tensor[part] for part in rows]).to(self.device, torch.float32, copy=True))
        for name in dict.fromkeys(name for name, _ in parts):
            self._count(name)
        return tensors

    def skip(self, name: str) -> None:
        """Nothing of this tensor is kept."""
        self._count(name)

    def _packed(
        self,
        names: Sequence[str],
        rows: Sequence[Sequence[slice]],
        columns: slice = EVERY,
        order: torch.Tensor | None = None,
        turned: int = 0,
        plain: bool = False,
        wide: bool = False,
    ) -> list[PackedMatrix] | None:
        """The matrices `names`, one behind the other, packed; None where one of them is to be floats."""
        if self._arena is None or self._packing == UNPACKED:
            return None
        shapes = [tuple(self._source.shape(name)) for name in names]
        if any(len(shape) != 2 for shape in shapes):
            return None
        parts: list[tuple[str, PackedTensor | torch.Tensor, str]] = []
        for name, numbers in zip(names, _numbers(shapes, rows, order, turned), strict=True):
            tensor = self._source.packed(name)
            kind = self._packing.kind_of(tensor, plain, wide)
            if kind is None:
                return None
            part: PackedTensor | torch.Tensor | None
            part = chosen(self._tensor(name), numbers)[:, columns] if tensor is None else tensor.cut(numbers, columns)
            if part is None or not can_pack(kind, *part.shape):
                self._refuse(name, kind, columns)
                return None
            parts.append((name, part, kind))
        bits = QUANTIZE["int8" if wide else self._packing.quantize or "int8"]
        return pack_all(self._arena, parts, bits)

    def report(self) -> None:
        """Say how much was unpacked, and why."""
        if self._unpacked or self._reason:
            level = logging.WARNING if self._reason else logging.INFO
            bytes_now, dtype, before = self._unpacked / 2**20, self._dtype, self._stored / 2**20
            logger.log(level, "unpacked, %.1f MiB as %s instead of %.1f%s", bytes_now, dtype, before, self._reason)

    def _refuse(self, name: str, kind: str, columns: slice) -> None:
        """Keep the first reason why something is unpacked."""
        if not self._reason:
            shape = list(self._source.shape(name))
            where = "" if columns == EVERY else f" cut at {columns.start} and {columns.stop} of its inputs"
            self._reason = f", since kernels cannot keep it as {kind}: {name} {shape}{where} is the first"

    def _join(
        self, names: Sequence[str], rows: Sequence[Sequence[slice]], columns: slice = EVERY, counts: bool = True
    ) -> torch.Tensor:
        """The tensors `names`, concatenated along their first dimension in a copy of the loader's dtype. `counts`: they
        are not wanted again."""
        shapes = [self._source.shape(name) for name in names]
        n_rows = sum(_length(part, shape[0]) for slices, shape in zip(rows, shapes, strict=True) for part in slices)
        width = [_length(columns, n) for n in shapes[0][1:]]
        joined = self._empty((n_rows, *width))
        first = 0
        for name, slices in zip(names, rows, strict=True):
            packed = self._source.packed(name)
            tensor = self._tensor(name) if packed is None else None
            for part in slices:
                n = _length(part, self._source.shape(name)[0])
                into = joined[first : first + n]
                if packed is not None:
                    self._unpacked += into.nbytes
                    self._stored += int(into.numel() * packed.bits / 8)
                    with _naming(name, "unpacked"):
                        unpack_into(into, packed, torch.arange(packed.shape[0])[part], columns)
                elif tensor is not None:
                    into.copy_(tensor[part, columns] if width else tensor[part])
                first += n
            if counts:
                self._count(name)
        return joined

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Room for a tensor: for good where it will be kept, for the moment where `Linear` makes its own copy."""
        empty = torch.empty(shape, dtype=self._dtype, device=self.device)  # takes no memory before it is written
        if self._arena is None or (len(shape) == 2 and repacks(empty)):
            return empty
        return self._arena.take(empty.nbytes).view(self._dtype).view(shape)

    def _tensor(self, name: str) -> torch.Tensor:
        with _naming(name, "read"):
            tensor = self._source.tensor(name)
        if not tensor.is_floating_point():
            raise ModelFileError(f"tensor {name} holds {tensor.dtype}, expected floating point")
        return tensor

    def _count(self, name: str) -> None:
        self._source.release(name)
        self._done += 1
        self._progress(self._done, self._total)


def _reorder(heads: torch.Tensor, order: torch.Tensor) -> None:
    """Put the rows of each head in another order."""
    by_head = heads.view(-1, len(order), *heads.shape[1:])
    by_head.copy_(by_head[:, order.to(heads.device)])


def _numbers(
    shapes: Sequence[tuple[int, ...]], rows: Sequence[Sequence[slice]], order: torch.Tensor | None, turned: int
) -> list[torch.Tensor]:
    """The numbers of the rows that are kept of each tensor, heads in their `order`."""
    numbers = [
        torch.cat([torch.arange(n)[part] for part in parts]) for (n, *_), parts in zip(shapes, rows, strict=True)
    ]
    if order is None:
        return numbers
    starts = [sum(shape[0] for shape in shapes[:i]) for i in range(len(shapes))]
    joined = torch.cat([in_tensor + start for in_tensor, start in zip(numbers, starts, strict=True)])
    _reorder(joined[:turned], order.cpu())
    split = joined.split([len(in_tensor) for in_tensor in numbers])  # a head is in one tensor
    return [in_joined - start for in_joined, start in zip(split, starts, strict=True)]


def _length(part: slice, of: int) -> int:
    return len(range(*part.indices(of)))


def part_of(things: range, size: int = 1, first: int = 0) -> slice:
    """Where `things` lie, each `size` long, from `first` on."""
    return slice(first + things.start * size, first + things.stop * size)
