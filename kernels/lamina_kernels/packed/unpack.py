"""Tiles to rows of floats: some rows of W one behind the other, or those that are looked up.

`unpack_block` is the inner loop, in LLVM IR: a block of a tile, 32 columns of 16 rows, from codes to rows of floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.emitter import I8, I32, I64, LANES, VB, VF, VH, VI, VY, Emitter, Value, cpu_has
from lamina_kernels.compile.intrinsics import Address, literals, pointer, take, to_half, unpack
from lamina_kernels.compile.launch import HEADER, TAKEN, launch, source_fingerprint
from lamina_kernels.packed import layout as layouts
from lamina_kernels.packed.layout import BLOCK, LAYOUTS, ROWS, Format, Layout

_V32 = ir.VectorType(ir.IntType(16), 32)
_QUADS = BLOCK // 4


class Unpacked(NamedTuple):
    """Where block `block` of a record goes: row r of the tile to out + r * stride bytes, for first <= r < end.

    Other rows go to `spare`, `BLOCK` numbers."""

    record: Address
    block: int
    out: Address
    stride: int
    first: int
    end: int
    spare: Address


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def unpack_block(context: Any, format: Any, size: Any, operands: Any) -> Any:
    """A block as rows of numbers of `size` bytes: bfloat16 or float32. The first two are compile-time constants."""
    number, out_bytes = literals(format, size)
    layout = LAYOUTS[Format(number)]

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        o = unpack(Unpacked, context, e, operands, args[2])
        rows = []
        for row in range(ROWS):
            selection = builder.and_(
                builder.icmp_signed("<=", o.first, I64(row)), builder.icmp_signed(">", o.end, I64(row))
            )
            rows.append(builder.select(selection, e.at(o.out, builder.mul(o.stride, I64(row))), o.spare))
        columns = _columns(e, layout, o.record, o.block)
        if out_bytes == 2:
            pairs = [half_pairs(e, *columns[i : i + 2]) for i in range(0, BLOCK, 2)]
            parts = [pairs]
        else:
            parts = [[builder.bitcast(x, VI) for x in columns[i : i + LANES]] for i in (0, LANES)]
        for part, vectors in enumerate(parts):
            for row, vector in zip(rows, _transpose(e, vectors), strict=True):
                e.store(vector, e.at(row, 64 * part), out_bytes)
        return context.get_dummy_value()

    return types.void(format, size, operands), emit


def _columns(e: Emitter, layout: Layout, record: Value, block: Value) -> list[Value]:
    """The numbers of each column of a block, float32, row r in lane r."""
    factors = _factors(e, layout, record, block)
    columns = []
    for quad, word in enumerate(_codes(e, layout, e.at(record, e.b.mul(block, I64(layout.block))))):
        scale, least = factors[quad * len(factors) // _QUADS]
        for j in range(4):
            code = e.b.and_(e.b.lshr(word, e.bits(8 * j)), e.bits(255))
            columns.append(e.fma(scale, e.b.sitofp(code, VF), least))
    return columns


def _codes(e: Emitter, layout: Layout, at: Value) -> list[Value]:
    """The quads of a block: in lane r the four codes of row r, a byte each."""
    if layout.bits == 8:
        return [e.load(e.at(at, 64 * q), VI) for q in range(_QUADS)]
    stored, nibbles = [e.load(e.at(at, 64 * q), VI) for q in range(4)], e.bits(0x0F0F0F0F)
    quads = [e.b.and_(x, nibbles) for x in stored] + [e.b.and_(e.b.lshr(x, e.bits(4)), nibbles) for x in stored]
    if layout.table:
        quads = [e.e2m1(quad) for quad in quads]
    elif layout.bits == 5:
        bits = ir.VectorType(ir.IntType(1), 64)
        bytes_ = ir.VectorType(I8, 64)
        ones, zeros = (ir.Constant(bytes_, [x] * 64) for x in (16, 0))
        for q in range(_QUADS):
            mask = e.b.bitcast(e.load(e.at(at, layout.high + 8 * q), I64), bits)
            quads[q] = e.b.or_(quads[q], e.b.bitcast(e.b.select(mask, ones, zeros), VI))
    if layout.bits == 6:
        for q in range(_QUADS):
            high = e.load(e.at(at, layout.high + 64 * (q // 4)), VI)
            high = e.b.and_(e.b.lshr(high, e.bits(2 * (q % 4))), e.bits(0x03030303))
            quads[q] = e.b.or_(quads[q], e.b.shl(high, e.bits(4)))
    return quads


def _factors(e: Emitter, layout: Layout, record: Value, block: Value) -> list[tuple[Value, Value]]:
    """Scale and minimum of the rows, for a whole block or for each of its halves."""

    def halves(offset: int, number: Value | None = None) -> Value:
        place = I64(offset) if number is None else e.b.add(e.b.mul(number, I64(2 * ROWS)), I64(offset))
        return e.b.fpext(e.load(e.at(record, place), VH, 2), VF)

    def whole(offset: int, number: Value, signed: bool) -> Value:
        x = e.load(e.at(record, e.b.add(e.b.mul(number, I64(ROWS)), I64(offset))), VY, 1)
        return e.b.sitofp(e.b.sext(x, VI) if signed else e.b.zext(x, VI), VF)

    if layout.d < 0:
        scale = halves(layout.scale, block)
        return [(scale, halves(layout.min, block) if layout.zero < 0 else e.b.fmul(scale, e.number(-layout.zero)))]
    d = halves(layout.d)
    if layout.dmin >= 0:
        least = e.b.fmul(halves(layout.dmin), whole(layout.min, block, False))
        return [(e.b.fmul(d, whole(layout.scale, block, False)), e.b.fneg(least))]
    first = e.b.mul(block, I64(2))
    scales = [e.b.fmul(d, whole(layout.scale, e.b.add(first, I64(half)), True)) for half in range(2)]
    return [(scale, e.b.fmul(scale, e.number(-layout.zero))) for scale in scales]


def half_pairs(e: Emitter, low: Value, high: Value) -> Value:
    """Two vectors of float32 as pairs of bfloat16, the first in the lower half of each lane."""
    if cpu_has("avx512bf16"):
        name, kind = "llvm.x86.avx512bf16.cvtne2ps2bf16.512", VB
        halves = e.b.bitcast(e.call(name, kind, high, low), _V32)
        order = [i // 2 + LANES * (i % 2) for i in range(2 * LANES)]
        return e.b.bitcast(e.b.shuffle_vector(halves, halves, ir.Constant(ir.VectorType(I32, 32), order)), VI)
    lower, upper = (e.b.zext(to_half(e, x), VI) for x in (low, high))
    return e.b.or_(lower, e.b.shl(upper, e.bits(16)))


def _transpose(e: Emitter, vectors: Sequence[Value]) -> list[Value]:
    """16 vectors of 16 words: row i of what comes out has word i of each."""
    vectors = list(vectors)
    for width in (1, 2, 4, 8):  # lanes that go together
        new = [*vectors]
        for i in range(LANES):
            if i & width:
                continue
            first, second = vectors[i], vectors[i + width]
            low = [lane if not lane & width else LANES + lane - width for lane in range(LANES)]
            high = [lane + width if not lane & width else LANES + lane for lane in range(LANES)]
            new[i] = e.b.shuffle_vector(first, second, ir.Constant(VI, low))
            new[i + width] = e.b.shuffle_vector(first, second, ir.Constant(VI, high))
        vectors = new
    return vectors


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
    fingerprint, layout = source_fingerprint(intrinsics, emitter, launching, layouts), LAYOUTS[format]
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
