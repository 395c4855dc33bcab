"""A matrix whose numbers stay in 4 to 8 bits, and what is done with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lamina_kernels.compile.emitter import cpu_has
from lamina_kernels.packed import activations, unpack
from lamina_kernels.packed import multiply as few
from lamina_kernels.packed.layout import BLOCK, LAYOUTS, ROWS, Format, packed_bytes, tile_bytes

_ROWS = 256  # of x that are multiplied with all of W before the next
_BUFFER = 1 << 22  # bytes of unpacked rows that are multiplied at once


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """W `[n_out, n_in]` in tiles, as `layout` describes them. data: uint8, `packed_bytes` long, 64-byte aligned."""

    shape: tuple[int, int]
    format: Format
    data: torch.Tensor

    def __post_init__(self) -> None:
        (n_out, n_in), layout = self.shape, LAYOUTS[self.format]
        if n_out < 1 or n_in < 1 or n_in % (BLOCK if layout.d < 0 else layout.group):
            raise ValueError(f"{self.format.name} cannot hold [{n_out}, {n_in}]")
        size, data = packed_bytes(self.format, n_out, n_in), self.data
        if data.dtype != torch.uint8 or data.shape != (size,) or not data.is_cpu or not data.is_contiguous():
            raise ValueError(
                f"data must be uint8 [{size}] on a CPU, got {data.dtype} {list(data.shape)} on {data.device}"
            )
        if data.data_ptr() % 64:
            raise ValueError("data must be 64-byte aligned")

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def multiply(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """x W^T. x: bfloat16 or float32 `[n, n_in]` -> `[n, n_out]` in `dtype`, x's own unless given. n may be 0."""
        return multiply([self], x, dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows that ids, integers of any shape, name: `[*ids.shape, n_in]`, bfloat16 or float32."""
        _check_dtype(dtype)
        numbers = ids.to(torch.int64).reshape(-1).contiguous()
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.shape[0]:
            raise IndexError(
                f"ids must be from 0 to {self.shape[0] - 1}, got {int(numbers.min())} to {int(numbers.max())}"
            )
        out = torch.empty(len(numbers), self.shape[1], dtype=dtype)
        if len(numbers):
            unpack.look_up(self.data, self.format, numbers, out)
        return out.view(*ids.shape, self.shape[1])

    def unpack(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of W, all unless given, as `[n, n_in]`, bfloat16 or float32."""
        _check_dtype(dtype)
        chosen = range(*rows.indices(self.shape[0]))
        if chosen.step != 1:
            raise ValueError(f"rows must follow one another, got a step of {chosen.step}")
        out = torch.empty(len(chosen), self.shape[1], dtype=dtype)
        if chosen:
            unpack.unpack_rows(self.data, self.format, chosen, out)
        return out

    def part(self, rows: slice) -> PackedMatrix:
        """Rows of W, beginning and, unless they are the last, ending at a multiple of 16. It shares the memory."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1 or start % ROWS or (stop % ROWS and stop != self.shape[0]) or stop <= start:
            raise ValueError(
                f"a part of {self.shape[0]} rows must begin and end at multiples of {ROWS}, got {start} to {stop}"
            )
        tile_size = tile_bytes(self.format, self.shape[1])
        data = self.data[start // ROWS * tile_size : -(-stop // ROWS) * tile_size]
        return PackedMatrix((stop - start, self.shape[1]), self.format, data)


def _unpacked_dtype(dtype: torch.dtype) -> torch.dtype:
    """What W is unpacked to for x in `dtype`: a library is slow at bfloat16 where the CPU has no instruction for it."""
    return dtype if cpu_has("amx-bf16") or cpu_has("avx512bf16") else torch.float32


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in unpack.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, unpack.DTYPES))}, got {dtype}")


def multiply(parts: Sequence[PackedMatrix], x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x W^T for the W whose rows are those of the parts, one part behind the other, as `PackedMatrix.multiply` does.

    With AVX512_VNNI the kernel of int8 multiplies any number of rows, faster than a library multiplies bfloat16, and a
    row of y does not depend on how many there are. With AMX, or without either, many rows are multiplied by a library,
    with W unpacked a few rows at a time.
    """
    dtype, n_in = x.dtype if dtype is None else dtype, parts[0].shape[1]
    if x.ndim != 2 or x.shape[1] != n_in or x.dtype not in unpack.DTYPES or dtype not in unpack.DTYPES:
        raise ValueError(
            f"x must be [n, {n_in}], it and the result one of {', '.join(map(str, unpack.DTYPES))}; got {x.dtype} "
            f"{list(x.shape)} and {dtype}"
        )
    y = torch.empty(len(x), sum(part.shape[0] for part in parts), dtype=dtype)
    places = list(zip(parts, y.split([part.shape[0] for part in parts], 1), strict=True))
    if len(x) > few.MAX_ROWS and multiplies_unpacked():
        for part, columns in places:
            _multiply_unpacked(part, x, columns)
        return y
    blocks = max(few.blocks_of(part.format, n_in) for part in parts)
    for first in range(0, len(x), _ROWS):
        batch = slice(first, first + _ROWS)
        lines = activations.round_rows(x[batch], blocks)
        for part, columns in places:
            few.multiply_rounded(lines, n_in, part.data, part.format, part.shape[0], columns[batch])
    return y


def load_kernels(parts: Sequence[PackedMatrix]) -> None:
    """Load what `multiply` runs, so that the first call does not compile it."""
    activations.load_kernel()
    for format in {part.format for part in parts}:
        few.load_kernel(format)
        if multiplies_unpacked():
            unpack.load_kernel(format, unpack.DTYPES[_unpacked_dtype(torch.bfloat16)])


def multiplies_unpacked() -> bool:
    """Whether many rows are multiplied by a library on this CPU."""
    return cpu_has("amx-bf16") or not cpu_has("avx512vnni")


def _multiply_unpacked(part: PackedMatrix, x: torch.Tensor, y: torch.Tensor) -> None:
    """y = x W^T for many rows. y: `[n, n_out]`, rows at any distance."""
    x = x.to(_unpacked_dtype(x.dtype))
    n_out, n_in = part.shape
    step = max(_BUFFER // (n_in * x.element_size()) // ROWS, 1) * ROWS
    buffer = torch.empty(min(step, n_out), n_in, dtype=x.dtype)
    for first in range(0, n_out, step):
        rows = range(first, min(first + step, n_out))
        weight = buffer[: len(rows)]
        unpack.unpack_rows(part.data, part.format, rows, weight)
        y[:, rows.start : rows.stop] = F.linear(x, weight)
