"""V of a latent: the front of K, turned from the order of a K block to that of a V block.

K stands channel by channel, as its products with queries are summed over channels; V token by token, as its products
with weights are summed over tokens. The turned copy of a block of keys is read by all query vectors of a piece, so
among many of them turning costs little.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lamina_kernels.cpu.emitter import I8, I64, LANES, Emitter, Kind, Value
from lamina_kernels.cpu.intrinsics import literals
from lamina_kernels.cpu.microkernels import packs

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
        found = [e.load(place, vector) for place in places]
        if self.row_bytes < _LINE:
            both = range(2 * self.row_bytes)
            found = [self._shuffle(x, y, both, 1) for x, y in zip(found[::2], found[1::2], strict=True)]
        if self.k_pack == 1:
            return found
        order = [
            at + (token * self.k_pack + channel) * self.size + byte
            for at in range(0, _LINE, self.element)
            for channel in range(self.k_pack)
            for token in range(self.v_pack)
            for byte in range(self.size)
        ]
        return [self._shuffle(x, x, order, 1) for x in found]

    def _shuffle(self, x: Value, y: Value, order: Any, size: int) -> Value:
        """Elements of `size` bytes of x and y in another order, as bytes."""
        lane = ir.IntType(8 * size)
        bytes_ = x.type.count
        x, y = (self.b.bitcast(z, ir.VectorType(lane, bytes_ // size)) for z in (x, y))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order))
        return self.b.bitcast(self.b.shuffle_vector(x, y, mask), ir.VectorType(I8, len(order) * size))
