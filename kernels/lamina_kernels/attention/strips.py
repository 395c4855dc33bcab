"""Where the keys of a block are: strips of K and V, each of 16 or 32 tokens of a page.

K stands channel by channel, as its products with queries are summed over channels; V token by token, as its products
with weights are summed over tokens. Mostly strips are read where they lie. Three kinds are put together in scratch:
the strips of pieces that list tokens, the ends of V, and V of latents. V of a latent is the front of K, turned from the
order of a K block to that of a V block; all query vectors of a piece read the turned copy, so among many of them
turning costs little. Nothing here is checked: addresses and sizes come from `decode`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit
from numba.core import types
from numba.extending import intrinsic

from lamina_kernels.attention.microkernels import BLOCK, packs
from lamina_kernels.attention.moves import move, value_offset
from lamina_kernels.compile import intrinsics
from lamina_kernels.compile.emitter import I8, I64, LANES, Emitter, Kind, Value
from lamina_kernels.compile.intrinsics import literals, pointer

_LINE = 64  # bytes of a register


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def spread(context: Any, kind: Any, unit: Any, keys: Any, stride: Any, target: Any, d_v: Any) -> Any:
    """The first d_v channels of a strip of 16 * unit keys, a multiple of 16, as a strip of V.

    keys: `[channels / k_pack, stride bytes]`; target: `[tokens / v_pack, d_v, v_pack]`.
    """
    code, width = literals(kind, unit)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        keys, stride, target, d_v = args[2:]
        turn = _Turn(e, code, e.pointer(keys), stride, e.pointer(target), d_v)
        for tokens in range(0, LANES * width, LANES):
            e.loop(builder.lshr(d_v, I64(4)), [], lambda i, tokens=tokens: turn.block(i, tokens))
        return context.get_dummy_value()

    return types.void(kind, unit, *[types.int64] * 4), emit


class _Turn:
    """Turns 16 channels of 16 tokens at a time.

    Rows of a K block are `rows` lines of elements, one of each token, or of as many tokens as a V block packs; an
    element has all channels that the K block packs. Turned, each element's channels are already in V's order.
    """

    def __init__(self, e: Emitter, code: int, keys: Value, stride: Value, target: Value, d_v: Value) -> None:
        self.e, self.b = e, e.b
        self.keys, self.stride, self.target, self.d_v = keys, stride, target, d_v
        self.k_pack, self.v_pack = packs(code)
        self.size = {Kind.FLOAT32: 4, Kind.INT8: 1}.get(Kind(code), 2)  # bytes of a number
        self.element = self.size * self.k_pack * self.v_pack
        self.rows = LANES // self.k_pack
        self.row_bytes = LANES * self.k_pack * self.size

    def block(self, i: Value, tokens: int) -> list[Value]:
        """The channels from 16 * i on of 16 tokens, from number `tokens` of the strip on."""
        e, b = self.e, self.b
        first = b.mul(b.mul(i, I64(self.rows)), self.stride)
        places = [
            e.at(self.keys, b.add(first, b.add(b.mul(self.stride, I64(row)), I64(tokens * self.k_pack * self.size))))
            for row in range(self.rows)
        ]
        registers = self._load(places)
        lanes = _LINE // self.element
        low = [x for lane in range(lanes // 2) for x in (lane, lanes + lane)]
        high = [x for lane in range(lanes // 2, lanes) for x in (lane, lanes + lane)]
        for _ in range(self.rows.bit_length() - 1):  # each round moves one bit of the row's number to the lane's end
            half = len(registers) // 2
            pairs = zip(registers[:half], registers[half:], strict=True)
            registers = [self._shuffle(x, y, order, self.element) for x, y in pairs for order in (low, high)]
        out_bytes = LANES * self.v_pack * self.size  # of 16 channels of as many tokens as are packed
        for number in range(LANES // self.v_pack):
            line, part = divmod(number * out_bytes, _LINE)
            row = b.mul(self.d_v, I64((tokens // self.v_pack + number) * self.v_pack * self.size))
            place = e.at(self.target, b.add(row, b.mul(i, I64(out_bytes))))
            value = registers[line]
            if out_bytes < _LINE:
                value = self._shuffle(value, value, range(part, part + out_bytes), 1)
            e.store(value, place)
        return []

    def _load(self, places: list[Value]) -> list[Value]:
        """Whole registers of rows, each element's numbers in V's order."""
        e, vector = self.e, ir.VectorType(I8, self.row_bytes)
        registers = [e.load(place, vector) for place in places]
        if self.row_bytes < _LINE:
            indices = range(2 * self.row_bytes)
            registers = [self._shuffle(x, y, indices, 1) for x, y in zip(registers[::2], registers[1::2], strict=True)]
        if self.k_pack == 1:
            return registers
        order = [
            start + (token * self.k_pack + channel) * self.size + byte
            for start in range(0, _LINE, self.element)
            for channel in range(self.k_pack)
            for token in range(self.v_pack)
            for byte in range(self.size)
        ]
        return [self._shuffle(x, x, order, 1) for x in registers]

    def _shuffle(self, x: Value, y: Value, order: Any, size: int) -> Value:
        """Elements of `size` bytes of x and y in another order, as bytes."""
        lane = ir.IntType(8 * size)
        bytes_ = x.type.count
        x, y = (self.b.bitcast(z, ir.VectorType(lane, bytes_ // size)) for z in (x, y))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order))
        return self.b.bitcast(self.b.shuffle_vector(x, y, mask), ir.VectorType(I8, len(order) * size))


STRIPS = BLOCK // 16  # at most, of a block
KICK = 256  # bytes of a page that set the hardware's prefetcher going


@njit  # type: ignore[untyped-decorator]
def numbers(address: int, n: int) -> Any:
    return carray(pointer(address), (n,), np.int64)


@njit  # type: ignore[untyped-decorator]
def floats(address: int, n: int) -> Any:
    return carray(pointer(address), (n,), np.float32)


@njit  # type: ignore[untyped-decorator]
def _entry(a: Any, piece: Any, number: int) -> Any:
    """An entry of the piece's table."""
    return carray(pointer(piece.table + a.layer * piece.layer_stride * 4), (number + 1,), np.int32)[number]


@njit  # type: ignore[untyped-decorator]
def locate(a: Any, piece: Any, slot: int) -> tuple[int, int]:
    """Addresses of a slot's page, and its place in the page."""
    if piece.listed:
        entry = np.int64(_entry(a, piece, slot))
        return a.arena + entry // a.page_size * a.page_bytes, entry % a.page_size
    return a.arena + np.int64(_entry(a, piece, slot // a.page_size)) * a.page_bytes, slot % a.page_size


@njit  # type: ignore[untyped-decorator]
def _blocks(a: Any, piece: Any, slot: int) -> tuple[int, int]:
    """Addresses of K and V from a slot on, for pieces that list no slots."""
    page, offset = locate(a, piece, slot)
    return page + offset * a.k_pack * a.itemsize, page + a.k_bytes + offset * a.d_v * a.itemsize


@njit  # type: ignore[untyped-decorator]
def _trim(a: Any, values: int, scratch: int, begin: int, end: int, width: int) -> int:
    """A copy of a strip of V with zeros outside tokens [begin, end): there memory may hold anything, even NaN."""
    size = a.d_v * a.itemsize // 2
    pack = a.v_pack
    source = carray(pointer(values), (width // pack, size, pack), np.uint16)
    target = carray(pointer(scratch), (width // pack, size, pack), np.uint16)
    target[:] = 0
    for token in range(begin, end):
        target[token // pack, :, token % pack] = source[token // pack, :, token % pack]
    return scratch


@njit  # type: ignore[untyped-decorator]
def _gather(a: Any, piece: Any, slot: int, width: int, scratch: int) -> tuple[int, int]:
    """Strips of K and V, of latents of K alone, of the listed slots from `slot` on, and zeros outside the piece."""
    values = scratch + width * a.d_k * a.itemsize
    carray(pointer(scratch), (width * (a.d_k + a.own_v) * a.itemsize,), np.uint8)[:] = 0
    word, channels = a.k_pack * a.itemsize, a.d_k // a.k_pack
    for token in range(max(piece.lo - slot, 0), min(piece.hi - slot, width)):
        page, offset = locate(a, piece, slot + token)
        move(page + offset * word, a.page_size, scratch + token * word, width, channels, word)
        if not a.own_v:
            continue
        place = page + a.k_bytes + value_offset(a, offset)
        move(place, a.v_pack, values + value_offset(a, token), a.v_pack, a.d_v, a.itemsize)
    return scratch, values


@njit  # type: ignore[untyped-decorator]
def collect_scales(a: Any, piece: Any, begin: int, strips: int, width: int, shift: int) -> None:
    """Lay out the scales of K and of V of a block, 0 outside the piece."""
    behind = a.page_size if a.own_v else 0  # scales from those of K to those of V: of a latent they are the same
    for strip in range(strips):
        slot = begin + strip * width
        of_k = floats(a.slots + shift + strip * width * 4, width)
        of_v = floats(a.slots + shift + (BLOCK + strip * width) * 4, width)
        if slot >= piece.lo and slot + width <= piece.hi and not piece.listed:
            page, offset = locate(a, piece, slot)
            scales = floats(page + a.kv_bytes, behind + a.page_size)
            for token in range(width):
                of_k[token], of_v[token] = scales[offset + token], scales[behind + offset + token]
            continue
        of_k[:] = 0
        of_v[:] = 0
        for token in range(max(piece.lo - slot, 0), min(piece.hi - slot, width)):
            page, offset = locate(a, piece, slot + token)
            scales = floats(page + a.kv_bytes, behind + a.page_size)
            of_k[token], of_v[token] = scales[offset], scales[behind + offset]


@njit  # type: ignore[untyped-decorator]
def strip_of(kind: int, unit: int, a: Any, piece: Any, slot: int, strip: int, shift: int) -> Any:
    """Where K and V of a strip of the piece are: in the page, or in scratch what has to be put together first."""
    width, stride = 16 * unit, a.page_size
    if piece.listed:
        stride = width
        k, v = _gather(a, piece, slot, width, a.gathered + shift + strip * width * (a.d_k + a.own_v) * a.itemsize)
    else:
        k, v = _blocks(a, piece, slot)
    if not a.own_v:
        v = a.spread + shift + strip * width * a.d_v * a.itemsize
        spread(kind, unit, k, stride * a.k_pack * a.itemsize, v, a.d_v)
    if piece.listed:
        return k, v
    if kind != Kind.INT8 and (slot < piece.lo or slot + width > piece.hi):  # integers times weights of 0 are 0
        place = a.tails + shift + (0 if slot < piece.lo else width * a.d_v * a.itemsize)
        v = _trim(a, v, place, max(piece.lo - slot, 0), min(piece.hi - slot, width), width)
    return k, v


@njit  # type: ignore[untyped-decorator]
def look_ahead(a: Any, target: Any, ahead: int, end: int, width: int, strips: int, near: Any, far: Any) -> None:
    """Have the slots of `target` from `ahead` to `end` fetched: by the loops over the current block, which has `strips`
    strips, through their list `far`; what is more, or not in strips, now."""
    if target.listed:
        for slot in range(max(ahead, target.lo), min(target.hi, end)):
            page, offset = locate(a, target, slot)
            for channel in range(a.d_k // a.k_pack):
                intrinsics.prefetch(page + (channel * a.page_size + offset) * a.k_pack * a.itemsize, 1)
            if a.own_v:
                intrinsics.prefetch(page + a.k_bytes + value_offset(a, offset), a.d_v * a.v_pack * a.itemsize)
        return
    for strip in range((min(target.hi, end) - ahead + width - 1) // width):
        k, v = _blocks(a, target, ahead + strip * width)
        if a.scaled:
            page, offset = locate(a, target, ahead + strip * width)
            intrinsics.prefetch(page + a.kv_bytes + offset * 4, width * 4)
            if a.own_v:
                intrinsics.prefetch(page + a.kv_bytes + (a.page_size + offset) * 4, width * 4)
        if not a.own_v:
            if strip < strips:
                far[strip] = k
            continue
        if strips == 1 and strip == 0 and k - near[0] == a.page_bytes:
            intrinsics.prefetch(k, KICK)  # the hardware goes on from there
            intrinsics.prefetch(v, KICK)
        elif strip < strips:
            far[strip], far[STRIPS + strip] = k, v
        else:
            intrinsics.prefetch(k, width * a.itemsize * a.d_k)
            intrinsics.prefetch(v, width * a.itemsize * a.d_v)
