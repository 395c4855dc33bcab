"""All that a decoder computes between two attentions, for a few rows in bfloat16, as one program.

The kernels are those of `few_rows`, `tiles`, `packed` and `dense_loops`, so a span gives the numbers that they give one
by one. What it saves is Python between them, and a parallel region for each: 40 % of the time at one row of a small
model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamina_kernels.compile.programs import Program, Step
from lamina_kernels.dense import dense_loops, few_rows, gate_loops, tiles
from lamina_kernels.dense.dense import Weight
from lamina_kernels.dense.dense_loops import ADD, GELU, NORM, PARALLEL, SILU, SPLIT
from lamina_kernels.packed import activations
from lamina_kernels.packed import multiply as packed
from lamina_kernels.packed.matrix import PackedMatrix

MAX_ROWS = few_rows.MAX_ROWS
_HALF = torch.bfloat16
_SHARES = 2  # of a linear map, for each thread

Map = tuple[Weight, torch.Tensor | None]
"""W `[n_out, n_in]`, one that `few_rows` can multiply with or packed, and a bias `[n_out]`."""

Rotation = tuple[torch.Tensor, torch.Tensor] | None
"""cos and sin, float32 `[n, d / 2]`."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What a mixer's output is multiplied by, as `gate_loops.gate_output` does it: a map of the residual stream that
    entered the layer, normed by `entering`, `[hidden]`. norm: float32, of the output, by `group` numbers, or None."""

    map: Map
    entering: torch.Tensor
    silu: bool
    norm: torch.Tensor | None = None
    group: int = 1
    eps: float = 0.0


@dataclass(frozen=True, slots=True)
class Behind:
    """A layer behind its mixer: its gate, output projection, residual, norm `[hidden]`, MLP (gate first), residual.
    gelu: the MLP's gate is GELU, else SiLU. attended_norm, mlp_norm: `[hidden]`, of what the projection and the MLP
    give."""

    output: Map
    norm: torch.Tensor
    gate_up: Map
    down: Map
    gelu: bool = False
    attended_norm: torch.Tensor | None = None
    mlp_norm: torch.Tensor | None = None
    gate: Gate | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """q, k and v of the normed residual stream. norms: weights `[d]` for q and k, or None."""

    qkv: Map
    heads: int
    kv_heads: int
    norms: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class States:
    """The inputs of a layer that keeps a state: q, k and v, side by side, and the gates of its recurrence, as
    `gate_loops.recurrence_gates` makes them of the map `gates`. rate, offset: float32 `[heads]`."""

    qkv: Map
    gates: Map
    rate: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """From behind a mixer (None: from the embedding) to before the next one, or to the end.

    norm: `[hidden]`, of the residual stream that leaves. then: what the normed stream becomes: q, k and v; the inputs
    of a state; float32 numbers, by W; or None: it stays itself.
    """

    behind: Behind | None
    norm: torch.Tensor
    then: Heads | States | Weight | None


class Spans:
    """The spans of a decoder, one behind the other, for any number of rows up to MAX_ROWS. eps: of all norms.

    Any thread may run them: each has programs and memory of its own.
    """

    def __init__(self, spans: Sequence[Span], eps: float) -> None:
        self._spans = spans
        self._eps = eps
        self._memory = _ThreadMemory()

    def run(
        self, index: int, hidden: torch.Tensor, attended: torch.Tensor | None = None, rotation: Rotation = None
    ) -> tuple[torch.Tensor, ...]:
        """Span `index`. hidden: `[n, hidden]`, the residual stream that entered the layer of its attention, which is
        not changed; attended: what that gave, `n` rows, where the span has one.

        Returns new tensors: the residual stream that leaves (the same, where nothing is behind an attention), and
        q `[n, heads, d]`, k and v `[n, kv_heads, d]`; or what enters a state, `[n, width]`, and its gates, float32
        `[n, heads, 2]`; or float32 `[n, n_out]`; or `[n, hidden]`.
        """
        key = index, len(hidden), torch.get_num_threads()
        program = self._memory.made.get(key)
        if program is None:
            if not 0 < len(hidden) <= MAX_ROWS:
                raise ValueError(f"a span takes 1 to {MAX_ROWS} rows, got {len(hidden)}")
            builder = _Builder(self._memory.room, len(hidden), key[2], self._eps)
            program = self._memory.made[key] = _Made(self._spans[index], builder)
        return program.run(hidden, attended, rotation)


class _ThreadMemory(threading.local):
    """What one thread has: programs by span, rows and threads, and room for what is inside a span, by name."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int, int], _Made] = {}
        self.room: dict[tuple[str, int], torch.Tensor] = {}


class _Linear:
    """A linear map within a program: where it reads and writes may be changed from run to run."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.n_out, self.n_in = shape
        self.reader: Any = None
        """The block of the step that reads x."""
        self.writers: list[tuple[Any, str, int]] = []
        """Blocks with the address of y in a field, so many bytes from where y begins."""

    def read(self, x: int) -> None:
        self.reader.x = x

    def write(self, y: int) -> None:
        for block, field, offset in self.writers:
            setattr(block, field, y + offset)


class _Builder:
    """Collects the steps of a program."""

    def __init__(self, room: dict[tuple[str, int], torch.Tensor], rows: int, threads: int, eps: float) -> None:
        self.rows, self.threads = rows, threads
        self.steps: list[Step] = []
        self._room, self._eps = room, eps
        self._loops = dense_loops.load_kernel(True)[0]

    def room(self, name: str, width: int) -> int:
        """Where `[rows, width]` inside a span are, for all spans of the thread."""
        return self._buffer(name, width, width * _HALF.itemsize)

    def _buffer(self, name: str, width: int, row_bytes: int) -> int:
        """Where MAX_ROWS rows of so many bytes are, by name and width."""
        buffer = self._room.get((name, width))
        if buffer is None:
            buffer = self._room[name, width] = torch.empty(MAX_ROWS, row_bytes, dtype=torch.uint8)
        return buffer.data_ptr()

    def linear(self, x: int, by: Map, y: int = 0, size: int = 2) -> _Linear:
        """y = x W^T + b, for addresses; size: bytes of a number of y."""
        weight, bias = by
        linear = _Linear(shape_of(weight))
        if not isinstance(weight, torch.Tensor):
            self._packed(linear, weight, size)
        elif self.rows >= tiles.MIN_ROWS and tiles.can_multiply(weight):
            self._tiles(linear, weight, size)
        else:
            block = few_rows.Arguments(
                shares=self.threads * _SHARES,
                w=weight.data_ptr(),
                rows=self.rows,
                n_in=linear.n_in,
                n_out=linear.n_out,
                size=size,
            )
            linear.reader, linear.writers = block, [(block, "y", 0)]
            self.steps.append(Step(few_rows.load_kernel(), block, True))
        if bias is not None:
            added = self.small(ADD, linear.n_out, linear.n_out, y=_address("bias", bias, _HALF, linear.n_out))
            linear.writers.append((added, "x", 0))
        linear.read(x)
        linear.write(y)
        return linear

    def _tiles(self, to: _Linear, weight: torch.Tensor, size: int) -> None:
        """The steps of a map by tiles: x is written in lines, then multiplied."""
        write_lines, multiply_lines = tiles.load_kernels()
        lines = self._buffer("tiles", to.n_in, tiles.lines_size(MAX_ROWS, to.n_in) // MAX_ROWS)
        shared = self.rows * to.n_in >= tiles.PARALLEL
        to.reader = tiles.writing_arguments(self.rows, to.n_in, self.threads if shared else 1, lines)
        block = tiles.multiplying_arguments(weight, self.rows, size, self.threads * _SHARES, lines)
        to.writers = [(block, "y", 0)]
        self.steps.append(Step(write_lines, to.reader, shared or not self.steps))
        self.steps.append(Step(multiply_lines, block, True))

    def _packed(self, to: _Linear, parts: Sequence[PackedMatrix], size: int) -> None:
        """The steps of a packed map: x is rounded once, then each part writes beside the one before."""
        blocks = max(packed.blocks_of(part.format, to.n_in) for part in parts)
        lines = self._buffer("lines", blocks, blocks * activations.LINE)
        shared = self.rows * to.n_in >= activations.PARALLEL
        shares = self.threads if shared else 1
        to.reader = activations.arguments(self.rows, to.n_in, blocks, 2, shares)
        to.reader.out = lines
        self.steps.append(Step(activations.load_kernel(), to.reader, shared or not self.steps))
        column = 0
        for part in parts:
            n_out, _ = part.shape
            block = packed.arguments(part.format, self.rows, to.n_in, n_out, size, self.threads * _SHARES)
            block.x, block.blocks, block.w = lines, blocks, part.data.data_ptr()
            block.stride = to.n_out * size
            to.writers.append((block, "y", column * size))
            self.steps.append(Step(packed.load_kernel(part.format), block, True))
            column += n_out

    def small(self, operation: int, width: int, numbers: int, **fields: int) -> Any:
        """An operation of `dense_loops`. numbers: in a row of x. Returns the argument block."""
        shared = not self.steps or self.rows * numbers >= PARALLEL
        shares = min(self.threads, self.rows) if self.rows * numbers >= PARALLEL else 1
        block = dense_loops.Arguments(
            operation=operation, size=2, shares=shares, rows=self.rows, width=width, eps=self._eps, **fields
        )
        self.steps.append(Step(self._loops, block, shared))
        return block

    def gates(self, operation: int, width: int, groups: int, eps: float = 0.0, **fields: int) -> Any:
        """An operation of `gate_loops`. Returns the argument block."""
        shared = self.rows * width * groups >= PARALLEL
        block = gate_loops.Arguments(
            operation=operation,
            size=2,
            shares=min(self.threads, self.rows) if shared else 1,
            rows=self.rows,
            width=width,
            groups=groups,
            eps=eps,
            **fields,
        )
        self.steps.append(Step(gate_loops.load_kernel(True), block, shared))
        return block


class _Made:
    """A span as a program for a number of rows and of threads. From run to run only the addresses of what comes in
    and of what leaves change."""

    def __init__(self, span: Span, builder: _Builder) -> None:
        self._span, self._rows, self._threads = span, builder.rows, builder.threads
        self._width = width = len(span.norm)
        norm = _address("norm", span.norm, _HALF, width)
        normed = builder.room("normed", width)
        if span.behind is None:
            self._norm = builder.small(NORM, width, width, out=normed, weight=norm)
        else:
            self._gate = None if span.behind.gate is None else _gate(builder, span.behind.gate, width)
            self._output, self._residual = _behind(builder, span.behind, width)
            delta, total = builder.room("delta", width), builder.room("total", width)
            self._norm = builder.small(NORM, width, width, x=delta, y=total, out=normed, weight=norm)
        if isinstance(span.then, Heads):
            self._heads = _heads(builder, span.then, normed)
        elif isinstance(span.then, States):
            self._inputs, self._gates = _states(builder, span.then, normed)
        elif span.then is not None:
            self._last = builder.linear(normed, (span.then, None), size=4)
        self._program = Program(builder.steps)

    def run(self, hidden: torch.Tensor, attended: torch.Tensor | None, rotation: Rotation) -> tuple[torch.Tensor, ...]:
        span, rows, hidden = self._span, self._rows, hidden.contiguous()
        leaving, entered = hidden, _address("hidden", hidden, _HALF, rows * self._width)
        if span.behind is None:
            self._norm.x = entered
        else:
            if attended is None:
                raise ValueError("a span behind an attention needs what that gave, got None")
            attended = attended.contiguous()
            leaving = torch.empty_like(hidden)
            self._residual.y, self._norm.second = entered, leaving.data_ptr()
            attended_address = _address("attended", attended, _HALF, rows * self._output.n_in)
            if self._gate is None:
                self._output.read(attended_address)
            else:
                entering, gate = self._gate
                entering.x, gate.x = entered, attended_address
        results: tuple[torch.Tensor, ...]
        if isinstance(span.then, Heads):
            results = self._place_heads(span.then, rotation)
        elif isinstance(span.then, States):
            x = torch.empty(rows, self._inputs.n_out, dtype=_HALF)
            gates = torch.empty(rows, self._gates.width, 2, dtype=torch.float32)
            self._inputs.write(x.data_ptr())
            self._gates.out = gates.data_ptr()
            results = x, gates
        elif span.then is not None:
            results = (torch.empty(rows, self._last.n_out, dtype=torch.float32),)
            self._last.write(results[0].data_ptr())
        else:
            results = (torch.empty_like(hidden),)
            self._norm.out = results[0].data_ptr()
        self._program.run(self._threads)
        return leaving, *results

    def _place_heads(self, to: Heads, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block, rows = self._heads, self._rows
        q = torch.empty(rows, to.heads, block.width, dtype=_HALF)
        k = torch.empty(rows, to.kv_heads, block.width, dtype=_HALF)
        v = torch.empty_like(k)
        block.out, block.second, block.third = q.data_ptr(), k.data_ptr(), v.data_ptr()
        block.cos = block.sin = 0
        if rotation is not None:
            angles = rows * (block.width // 2)
            block.cos, block.sin = (_address("rotation", x, torch.float32, angles) for x in rotation)
        return q, k, v


def _gate(builder: _Builder, gate: Gate, width: int) -> tuple[Any, Any]:
    """The steps to "mixed", the gated output. The blocks of the norm of what entered the layer, and of the gate."""
    n_out, _ = shape_of(gate.map[0])
    size = n_out if gate.norm is None else gate.group
    if n_out % size:
        raise ValueError(f"a norm by {size} of {n_out} numbers, allowed: a divisor")
    weight = 0 if gate.norm is None else _address("norm", gate.norm, torch.float32, n_out)
    entered, gate_address = builder.room("entered", width), builder.room("gate", n_out)
    norm = builder.small(NORM, width, width, out=entered, weight=_address("norm", gate.entering, _HALF, width))
    builder.linear(entered, gate.map, gate_address)
    operation = gate_loops.SILU if gate.silu else gate_loops.SIGMOID
    where = {"gate": gate_address, "out": builder.room("mixed", n_out), "weight": weight}
    return norm, builder.gates(operation, size, n_out // size, gate.eps, **where)


def _states(builder: _Builder, to: States, normed: int) -> tuple[_Linear, Any]:
    """The steps to the inputs of a state. Their map, and the block of the gates."""
    heads = len(to.rate)
    raw = builder.room("raw", 2 * heads)
    builder.linear(normed, to.gates, raw)
    where = {"x": raw, "weight": _address("rate", to.rate, torch.float32, heads)}
    where["offset"] = _address("offset", to.offset, torch.float32, heads)
    gates = builder.gates(gate_loops.RECURRENCE, heads, 1, **where)
    return builder.linear(normed, to.qkv), gates


def _behind(builder: _Builder, layer: Behind, width: int) -> tuple[_Linear, Any]:
    """The steps up to the last residual, "delta" + "total". The output projection, and the block of what follows."""
    _, inner = shape_of(layer.down[0])
    normed, total, delta = (builder.room(name, width) for name in ("normed", "total", "delta"))
    gate_up, gated = builder.room("gate_up", 2 * inner), builder.room("gated", inner)
    norm = _address("norm", layer.norm, _HALF, width)

    def norm_delta(weight: torch.Tensor | None) -> None:
        if weight is not None:
            builder.small(NORM, width, width, x=delta, out=delta, weight=_address("norm", weight, _HALF, width))

    mixed = 0 if layer.gate is None else builder.room("mixed", shape_of(layer.output[0])[1])
    output = builder.linear(mixed, layer.output, delta)
    norm_delta(layer.attended_norm)
    residual = builder.small(NORM, width, width, x=delta, second=total, out=normed, weight=norm)
    builder.linear(normed, layer.gate_up, gate_up)
    builder.small(GELU if layer.gelu else SILU, inner, 2 * inner, x=gate_up, out=gated)
    builder.linear(gated, layer.down, delta)
    norm_delta(layer.mlp_norm)
    return output, residual


def _heads(builder: _Builder, to: Heads, normed: int) -> Any:
    """The steps to q, k and v. The block of the last."""
    n_out, _ = shape_of(to.qkv[0])
    width = n_out // (to.heads + 2 * to.kv_heads)
    if width % 2:
        raise ValueError(f"rotation turns pairs, but a head has {width} numbers")
    qkv = builder.room("qkv", n_out)
    builder.linear(normed, to.qkv, qkv)
    fields = {"heads": to.heads, "kv_heads": to.kv_heads}
    if to.norms is not None:
        fields["weight"], fields["k_weight"] = (_address("norm", x, _HALF, width) for x in to.norms)
    return builder.small(SPLIT, width, n_out, x=qkv, **fields)


def shape_of(weight: Weight) -> tuple[int, int]:
    """n_out and n_in of W."""
    if isinstance(weight, torch.Tensor):
        n_out, n_in = weight.shape
        return n_out, n_in
    return sum(part.shape[0] for part in weight), weight[0].shape[1]


def _address(name: str, x: torch.Tensor, dtype: torch.dtype, numbers: int) -> int:
    """Where the numbers of `x` are, once it is certain that as many of that kind may be read there."""
    if x.dtype != dtype or x.numel() != numbers or not x.is_cpu or not x.is_contiguous():
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)} on {x.device} with strides {x.stride()}, expected {numbers} numbers "
            f"of {dtype}, contiguous, on a CPU"
        )
    return x.data_ptr()
