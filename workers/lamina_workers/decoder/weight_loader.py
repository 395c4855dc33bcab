"""Takes a checkpoint's tensors, or a rank's parts of them, one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lamina_kernels.dense import Linear, repacks
from lamina_kernels.paged import memory
from lamina_workers.decoder.checkpoint import TensorSource
from lamina_workers.errors import ModelFileError

ALIGNMENT = 64
"""Of each tensor in memory, in bytes: a cache line."""
_EVERY = slice(None)
ALL = (_EVERY,)


class Loader:
    """Takes tensors, or parts of them, out of a source one by one; holds no more than one of them twice.

    `rows` of a tensor are slices of its first dimension, side by side in the copy; `columns` is one of its second.
    """

    def __init__(
        self,
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None],
        total: int,
        room: int,
    ) -> None:
        self._source = source
        self._dtype = dtype
        self.device = device
        self._progress = progress
        self._done, self._total = 0, total
        # Weights are streamed in every step, so on a CPU they lie in one block of huge pages.
        self._arena = memory.allocate(room) if device.type == "cpu" else None
        self._used = 0

    def linear(
        self,
        names: Sequence[str],
        bias: bool = False,
        rows: Sequence[Sequence[slice]] | None = None,
        order: torch.Tensor | None = None,
        turned: int = 0,
    ) -> Linear:
        """One map out of those called `names`, their outputs side by side; `rows`: those of each that are kept. The
        first `turned` outputs are heads, each of which is put in that `order`."""
        parts = list(zip(names, rows or [ALL] * len(names), strict=True))
        return self.apart([parts], bias, order, turned)[0]

    def apart(
        self,
        maps: Sequence[Sequence[tuple[str, Sequence[slice]]]],
        bias: bool = False,
        order: torch.Tensor | None = None,
        turned: int = 0,
    ) -> list[Linear]:
        """Maps whose outputs stand in the same tensors: of each, the names of those and its rows in them. `order` and
        `turned` as in `linear`, of the first map."""
        found: list[Linear] = []
        for parts in maps:
            rows = [of for _, of in parts]
            weight = self._join([f"{name}.weight" for name, _ in parts], rows, counts=False)
            biases = self._join([f"{name}.bias" for name, _ in parts], rows, counts=False) if bias else None
            if order is not None and not found:
                _reorder(weight[:turned], order)
                if biases is not None:
                    _reorder(biases[:turned], order)
            found.append(Linear(weight, biases))
        for name in dict.fromkeys(name for parts in maps for name, _ in parts):
            for part in ("weight", "bias") if bias else ("weight",):
                self._count(f"{name}.{part}")
        return found

    def norm(self, name: str, offset: float, order: torch.Tensor | None = None) -> torch.Tensor:
        """A norm's weights plus `offset`; those of heads are put in that `order`."""
        weight = self.copy(f"{name}.weight")
        if order is not None:
            _reorder(weight, order)
        return weight.add_(offset) if offset else weight

    def summed(self, name: str, bias: bool, columns: slice, keeps_bias: bool) -> Linear:
        """A map of which each rank has some inputs, `columns`, and one rank the bias."""
        weight = self._join([f"{name}.weight"], [ALL], columns)
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
        found = []
        for name, rows in parts:
            whole = self._tensor(name)
            found.append(torch.cat([whole[part] for part in rows]).to(self.device, torch.float32, copy=True))
        for name in dict.fromkeys(name for name, _ in parts):
            self._count(name)
        return found

    def view(self, name: str, rows: Sequence[slice] = ALL) -> torch.Tensor:
        """The source's own tensor, in its dtype; `rows`: one slice."""
        tensor = self._tensor(name)[rows[0]]
        self._count(name)
        return tensor

    def skip(self, name: str) -> None:
        """Nothing of this tensor is kept."""
        self._count(name)

    def _join(
        self,
        names: Sequence[str],
        rows: Sequence[Sequence[slice]],
        columns: slice = _EVERY,
        counts: bool = True,
    ) -> torch.Tensor:
        """The tensors `names`, concatenated along their first dimension in a copy of the loader's dtype. `counts`: they
        are not wanted again."""
        shapes = [self._source.shape(name) for name in names]
        n_rows = sum(_length(part, shape[0]) for of, shape in zip(rows, shapes, strict=True) for part in of)
        width = [_length(columns, n) for n in shapes[0][1:]]
        joined = self._empty((n_rows, *width))
        first = 0
        for name, of in zip(names, rows, strict=True):
            tensor = self._tensor(name)
            for part in of:
                piece = tensor[part, columns] if width else tensor[part]
                joined[first : first + len(piece)].copy_(piece)
                first += len(piece)
            if counts:
                self._count(name)
        return joined

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Room for a tensor: for good where it will be kept, for the moment where `Linear` makes its own copy."""
        if self._arena is not None:
            end = self._used + math.prod(shape) * self._dtype.itemsize
            kept = self._arena[self._used : end].view(self._dtype).view(shape)
            if kept.ndim != 2 or not repacks(kept):
                self._used = end + -end % ALIGNMENT
                return kept
        return torch.empty(shape, dtype=self._dtype, device=self.device)

    def _tensor(self, name: str) -> torch.Tensor:
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
    each = heads.view(-1, len(order), *heads.shape[1:])
    each.copy_(each[:, order.to(heads.device)])


def _length(part: slice, of: int) -> int:
    return len(range(*part.indices(of)))


def part_of(things: range, size: int = 1, first: int = 0) -> slice:
    """Where `things` lie, each `size` long, from `first` on."""
    return slice(first + things.start * size, first + things.stop * size)
