"""y = x W^T for a few rows of x and a packed W, at the speed of reading W.

x is rounded to int8 by `activations`. Each thread streams its tiles of W once; a block of a tile is unpacked in
registers and multiplied with up to GROUP rows of x. Sums are float32, in an order that depends on n_in alone, so a row
of y depends neither on the rows beside it nor on the threads.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types

from lamina_kernels.compile import emitter, groups, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.intrinsics import take
from lamina_kernels.compile.launch import FINISHED, HEADER, TAKEN, block_type, launch, source_fingerprint
from lamina_kernels.packed import activations, layout, micro
from lamina_kernels.packed.layout import LAYOUTS, Format, packed_bytes
from lamina_kernels.packed.micro import GROUP, multiply_tile

MAX_ROWS = 32
"""Rows of x up to which this is worth while: beyond, unpacking for a library's multiplication is faster."""

_SHARES = 8  # a thread, so that one that is held up leaves work to the others
_FIELDS = ("x", "w", "y", "rows", "records", "record", "blocks", "n_out", "stride", "size", *groups.FIELDS)
_ARGUMENTS = np.dtype([*HEADER, *((name, "i8") for name in _FIELDS)])
Arguments = block_type(_ARGUMENTS)
"""The kernel's argument block. x: lines of `round_rows`, `blocks` a row; w: tiles of `records` records of `record`
bytes; stride: bytes from a row of y to the next; size: bytes of a number of y."""

_OUT_BYTES = {torch.bfloat16: 2, torch.float32: 4}


def multiply(x: torch.Tensor, data: torch.Tensor, format: Format, n_out: int, y: torch.Tensor) -> None:
    """y `[n, n_out]` = x `[n, n_in]` times W^T. data: W as `layout` has it, uint8 [bytes], 64-byte aligned.

    x, y: bfloat16 or float32, each its own; the rows of y may stand apart, its columns not. n is at most MAX_ROWS.
    """
    multiply_rounded(activations.round_rows(x, blocks_of(format, x.shape[1])), x.shape[1], data, format, n_out, y)


def multiply_rounded(
    lines: torch.Tensor, n_in: int, data: torch.Tensor, format: Format, n_out: int, y: torch.Tensor
) -> None:
    """`multiply` for what `activations.round_rows` gave for x `[n, n_in]`, with at least `blocks_of` blocks."""
    n, blocks, _ = lines.shape
    if blocks < blocks_of(format, n_in):
        raise ValueError(f"{format.name} with {n_in} columns needs {blocks_of(format, n_in)} blocks of x, got {blocks}")
    if data.dtype != torch.uint8 or data.data_ptr() % 64 or data.numel() != packed_bytes(format, n_out, n_in):
        raise ValueError(
            f"data must be uint8 [{packed_bytes(format, n_out, n_in)}], 64-byte aligned, got {data.dtype} "
            f"{list(data.shape)} at {data.data_ptr() % 64} bytes from a line"
        )
    if y.dtype not in _OUT_BYTES or y.shape != (n, n_out) or y.stride(1) != 1 or not y.is_cpu:
        raise ValueError(f"y must be bfloat16 or float32 [{n}, {n_out}] on a CPU, got {y.dtype} {list(y.shape)}")
    threads = torch.get_num_threads()
    block = arguments(format, n, n_in, n_out, _OUT_BYTES[y.dtype], threads * _SHARES)
    block.x, block.w, block.y, block.blocks = lines.data_ptr(), data.data_ptr(), y.data_ptr(), blocks
    block.stride = y.stride(0) * y.element_size()
    launch(load_kernel(format), ctypes.addressof(block), threads)


def arguments(format: Format, rows: int, n_in: int, n_out: int, size: int, shares: int) -> Any:
    """An argument block; addresses, and where rows stand apart strides, are for the caller to set."""
    layout = LAYOUTS[format]
    return Arguments(
        shares=shares,
        rows=rows,
        records=layout.groups(n_in),
        record=layout.record,
        blocks=blocks_of(format, n_in),
        n_out=n_out,
        stride=n_out * size,
        size=size,
        identity=groups.IDENTITY,
    )


def blocks_of(format: Format, n_in: int) -> int:
    """Blocks of a row of x that the kernel reads."""
    return LAYOUTS[format].groups(n_in) * LAYOUTS[format].blocks


@cache
def load_kernel(format: Format) -> int:
    """The kernel's address. From numba's cache on disk where it is there."""
    number, arguments = int(format), _ARGUMENTS  # closed over, so parts of the cache's key
    fingerprint = source_fingerprint(emitter, groups, intrinsics, launching, layout, micro, activations)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), arguments)[0]
        tiles = (a.n_out + 15) // 16
        total = groups.count_of(a) * tiles
        share = take(block, TAKEN)
        while fingerprint and share < a.shares:
            for place in range(total * share // a.shares, total * (share + 1) // a.shares):
                first, end, w = groups.group_of(a, place // tiles)
                tile = place % tiles
                column, w = tile * 16, w + tile * a.records * a.record
                columns = min(16, a.n_out - column)
                for row in range(first, end, GROUP):
                    rows, y = min(GROUP, end - row), a.y + row * a.stride + column * a.size
                    x, order = groups.rows_from(a, row, a.blocks * 64)
                    multiply_tile(number, rows, x, order, w, y, a.records, a.blocks, a.stride, columns, a.size)
            take(block, FINISHED)
            share = take(block, TAKEN)

    return int(kernel.address)
