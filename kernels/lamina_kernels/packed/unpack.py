"""Tiles to rows of floats: some rows of W one behind the other, or those that are looked up."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types

from lamina_kernels.cpu import emitter, intrinsics
from lamina_kernels.cpu import launch as launching
from lamina_kernels.cpu.intrinsics import pointer, take
from lamina_kernels.cpu.launch import HEADER, TAKEN, launch, source_fingerprint
from lamina_kernels.packed import layout as layouts
from lamina_kernels.packed import unpack_blocks
from lamina_kernels.packed.layout import BLOCK, LAYOUTS, ROWS, Format
from lamina_kernels.packed.unpack_blocks import Unpacked, unpack_block

DTYPES = {torch.bfloat16: 2, torch.float32: 4}
"""What numbers are unpacked to, and their bytes."""

_SHARES = 4  # a thread
_ARGUMENTS = np.dtype([*HEADER, *((name, "i8") for name in ("w", "n_in", "items", "n", "out", "stride"))])
_ITEM = np.dtype([("tile", "i8"), ("first", "i8"), ("end", "i8"), ("row", "i8")])
_WHOLE = np.arange(0)


def unpack_rows(data: torch.Tensor, format: Format, rows: range, out: torch.Tensor) -> None:
    """out `[len(rows), n_in]` = those rows of the W in `data`; its rows may stand at any distance."""
    tiles = np.arange(rows.start // ROWS, -(-rows.stop // ROWS)) if rows else _WHOLE
    items = np.empty(len(tiles), _ITEM)
    items["tile"] = tiles
    items["first"] = np.maximum(rows.start - tiles * ROWS, 0)
    items["end"] = np.minimum(rows.stop - tiles * ROWS, ROWS)
    items["row"] = tiles * ROWS - rows.start
    _run(data, format, items, out)


def look_up(data: torch.Tensor, format: Format, ids: torch.Tensor, out: torch.Tensor) -> None:
    """out `[n, n_in]` = the rows of the W in `data` that ids `[n]`, int64, name."""
    numbers = ids.numpy()
    items = np.empty(len(numbers), _ITEM)
    items["tile"], items["first"] = numbers // ROWS, numbers % ROWS
    items["end"] = items["first"] + 1
    items["row"] = np.arange(len(numbers)) - items["first"]
    _run(data, format, items, out)


def _run(data: torch.Tensor, format: Format, items: Any, out: torch.Tensor) -> None:
    threads, size = torch.get_num_threads(), DTYPES[out.dtype]
    where = (data.data_ptr(), out.shape[1], items.ctypes.data, len(items), out.data_ptr())
    shares = min(threads * _SHARES, len(items))
    arguments = np.array([0, 0, shares, *where, out.stride(0) * size], np.int64)
    launch(load_kernel(format, size), arguments.ctypes.data, threads if shares > 1 else 1)


@cache
def load_kernel(format: Format, size: int) -> int:
    """The address of the kernel of a format, for numbers of `size` bytes. From numba's cache where it is there."""
    fingerprint, layout = source_fingerprint(intrinsics, emitter, launching, layouts, unpack_blocks), LAYOUTS[format]
    number, record, blocks, size = int(format), layout.record, layout.blocks, int(size)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), _ARGUMENTS)[0]
        items = carray(pointer(a.items), (a.n,), _ITEM)
        spare: Any = np.empty(BLOCK, np.float32)
        groups = (a.n_in + blocks * BLOCK - 1) // (blocks * BLOCK)
        share = take(block, TAKEN)
        while fingerprint and share < a.shares:
            for i in range(a.n * share // a.shares, a.n * (share + 1) // a.shares):
                item = items[i]
                w, out = a.w + item.tile * groups * record, a.out + item.row * a.stride
                for b in range(a.n_in // BLOCK):
                    source, where = w + b // blocks * record, out + b * BLOCK * size
                    place = Unpacked(source, b % blocks, where, a.stride, item.first, item.end, spare.ctypes.data)
                    unpack_block(number, size, place)
            share = take(block, TAKEN)

    return int(kernel.address)
