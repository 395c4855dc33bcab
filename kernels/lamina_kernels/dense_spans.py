"""All that a decoder computes between two attentions, for a few rows in bfloat16, as one program.

The steps are those of `dense.steps` and `dense.experts`, so a span gives the numbers that their kernels give one by
one. What it saves is Python between them, and a parallel region for each: 40 % of the time at one row of a small model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from lamina_kernels.compile.programs import Program, Step
from lamina_kernels.dense import gate_loops
from lamina_kernels.dense.dense import Weight
from lamina_kernels.dense.dense_loops import GELU, NORM, SILU, SPLIT
from lamina_kernels.dense.experts import Routed, add_experts
from lamina_kernels.dense.steps import HALF, MAX_ROWS, Builder, LinearSteps, Map, Room, address_of, shape_of
from lamina_kernels.states.advance import Arguments as StateBlock
from lamina_kernels.states.advance import StateWork
from lamina_kernels.states.loops import advance_kernel

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
    give. With `experts` they are in the place of the MLP, and gate_up and down are those of the shared expert, or None.
    """

    output: Map
    norm: torch.Tensor
    gate_up: Map | None
    down: Map | None
    gelu: bool = False
    attended_norm: torch.Tensor | None = None
    mlp_norm: torch.Tensor | None = None
    gate: Gate | None = None
    experts: Routed | None = None


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
        program, address = self._program(range(index, index + 1), len(hidden), states=False), 0
        if program.first.span.behind is not None:
            if attended is None:
                raise ValueError("a span behind an attention needs what that gave, got None")
            attended = attended.contiguous()
            address = address_of("attended", attended, HALF, len(hidden) * program.first.width_in)
        return program.run(hidden, address, rotation)

    def advance(
        self,
        layers: range,
        hidden: torch.Tensor,
        inputs: tuple[torch.Tensor, torch.Tensor],
        work: StateWork,
        rotation: Rotation = None,
    ) -> tuple[torch.Tensor, ...]:
        """As `run`, of the span behind `layers`, which all keep states. hidden, inputs: what enters the first of them,
        as `run` gives it; `work` has them all."""
        program = self._program(range(layers.start + 1, layers.stop + 1), len(hidden), states=True)
        program.fill(work, layers, *(x.data_ptr() for x in inputs))
        return program.run(hidden, program.outs[0], rotation)

    def _program(self, spans: range, rows: int, states: bool) -> _Made:
        key = spans, states, rows, torch.get_num_threads()
        program = self._memory.made.get(key)
        if program is None:
            if not 0 < rows <= MAX_ROWS:
                raise ValueError(f"a span takes 1 to {MAX_ROWS} rows, got {rows}")
            builder = Builder(self._memory.room, rows, key[3], self._eps)
            program = self._memory.made[key] = _Made([self._spans[number] for number in spans], states, builder)
        return program


class _ThreadMemory(threading.local):
    """What one thread has: programs by span, rows and threads, and room for what is inside a span, by name."""

    def __init__(self) -> None:
        self.made: dict[tuple[range, bool, int, int], _Made] = {}
        self.room: Room = {}


class _Made:
    """Spans that follow one another as a program for a number of rows and of threads. From run to run only the
    addresses of what comes in and of what leaves change. With `states`, a layer's states are advanced before each."""

    def __init__(self, spans: Sequence[Span], states: bool, builder: Builder) -> None:
        self._threads = builder.threads
        self._states: list[Any] = []
        self._inner = 0, 0  # where x and gates are within the program
        self.outs: list[int] = []
        """Where what states give is, before each span."""
        parts: list[_Part] = []
        for span in spans:
            if states:
                self._states.append(StateBlock(shares=1))
                builder.steps.append(Step(advance_kernel(), self._states[-1], True))
            parts.append(part := _Part(span, builder))
            if states:
                self.outs.append(builder.room("states' outputs", part.width_in))
        self.first, self._last = parts[0], parts[-1]
        width = self.first.width
        for number, (part, following) in enumerate(pairwise(parts)):
            hidden = builder.room(f"hidden {number % 2}", width)
            part.leave(hidden)
            following.enter(hidden, self.outs[number + 1])
            self._inner = (
                builder.room("states' inputs", part.inputs.n_out),
                builder.buffer("gates", part.gates.width, 8 * part.gates.width),
            )
            part.inputs.write(self._inner[0])
            part.gates.out = self._inner[1]
        self._program = Program(builder.steps)

    def fill(self, work: StateWork, layers: range, x: int, gates: int) -> None:
        """Begin with the states of these layers, from these inputs of the first of them."""
        for layer, block, out in zip(layers, self._states, self.outs, strict=True):
            work.fill(block, layer, HALF)
            block.x, block.gates, block.out = x, gates, out
            x, gates = self._inner

    def run(self, hidden: torch.Tensor, attended: int, rotation: Rotation) -> tuple[torch.Tensor, ...]:
        """What leaves, where `hidden` has entered and what the mixer gave is at `attended`."""
        leaving = hidden = hidden.contiguous()
        self.first.enter(address_of("hidden", hidden, HALF, len(hidden) * self.first.width), attended)
        if self._last.span.behind is not None:
            leaving = torch.empty_like(hidden)
            self._last.leave(leaving.data_ptr())
        results = self._last.results(rotation)
        self._program.run(self._threads)
        return leaving, *results


class _Part:
    """The steps of one span in a program."""

    def __init__(self, span: Span, builder: Builder) -> None:
        self.span, self._rows = span, builder.rows
        self.width = width = len(span.norm)
        norm = address_of("norm", span.norm, HALF, width)
        normed = builder.room("normed", width)
        if span.behind is None:
            self._norm = builder.small(NORM, width, width, out=normed, weight=norm)
        else:
            self._gate = None if span.behind.gate is None else _gate(builder, span.behind.gate, width)
            self._output, self._residual = _behind(builder, span.behind, width)
            self.width_in = self._output.n_in
            delta, total = builder.room("delta", width), builder.room("total", width)
            self._norm = builder.small(NORM, width, width, x=delta, y=total, out=normed, weight=norm)
        if isinstance(span.then, Heads):
            self._heads = _heads(builder, span.then, normed)
        elif isinstance(span.then, States):
            self.inputs, self.gates = _states(builder, span.then, normed)
        elif span.then is not None:
            self._logits = builder.linear(normed, (span.then, None), size=4)

    def enter(self, hidden: int, attended: int) -> None:
        """Where the residual stream is that entered the layer, and what its mixer gave."""
        if self.span.behind is None:
            self._norm.x = hidden
            return
        self._residual.y = hidden
        if self._gate is None:
            self._output.read(attended)
        else:
            entering, gate = self._gate
            entering.x, gate.x = hidden, attended

    def leave(self, hidden: int) -> None:
        """Where the residual stream goes that leaves."""
        self._norm.second = hidden

    def results(self, rotation: Rotation) -> tuple[torch.Tensor, ...]:
        """Tensors for what the span ends with."""
        span, rows = self.span, self._rows
        results: tuple[torch.Tensor, ...]
        if isinstance(span.then, Heads):
            results = self._place_heads(span.then, rotation)
        elif isinstance(span.then, States):
            x = torch.empty(rows, self.inputs.n_out, dtype=HALF)
            gates = torch.empty(rows, self.gates.width, 2, dtype=torch.float32)
            self.inputs.write(x.data_ptr())
            self.gates.out = gates.data_ptr()
            results = x, gates
        elif span.then is not None:
            results = (torch.empty(rows, self._logits.n_out, dtype=torch.float32),)
            self._logits.write(results[0].data_ptr())
        else:
            results = (torch.empty(rows, self.width, dtype=HALF),)
            self._norm.out = results[0].data_ptr()
        return results

    def _place_heads(self, to: Heads, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block, rows = self._heads, self._rows
        q = torch.empty(rows, to.heads, block.width, dtype=HALF)
        k = torch.empty(rows, to.kv_heads, block.width, dtype=HALF)
        v = torch.empty_like(k)
        block.out, block.second, block.third = q.data_ptr(), k.data_ptr(), v.data_ptr()
        block.cos = block.sin = 0
        if rotation is not None:
            angles = rows * (block.width // 2)
            block.cos, block.sin = (address_of("rotation", x, torch.float32, angles) for x in rotation)
        return q, k, v


def _gate(builder: Builder, gate: Gate, width: int) -> tuple[Any, Any]:
    """The steps to "mixed", the gated output. The blocks of the norm of what entered the layer, and of the gate."""
    n_out, _ = shape_of(gate.map[0])
    size = n_out if gate.norm is None else gate.group
    if n_out % size:
        raise ValueError(f"a norm by {size} of {n_out} numbers, allowed: a divisor")
    weight = 0 if gate.norm is None else address_of("norm", gate.norm, torch.float32, n_out)
    entered, gate_address = builder.room("entered", width), builder.room("gate", n_out)
    norm = builder.small(NORM, width, width, out=entered, weight=address_of("norm", gate.entering, HALF, width))
    builder.linear(entered, gate.map, gate_address)
    operation = gate_loops.SILU if gate.silu else gate_loops.SIGMOID
    where = {"gate": gate_address, "out": builder.room("mixed", n_out), "weight": weight}
    return norm, builder.gates(operation, size, n_out // size, gate.eps, **where)


def _states(builder: Builder, to: States, normed: int) -> tuple[LinearSteps, Any]:
    """The steps to the inputs of a state. Their map, and the block of the gates."""
    heads = len(to.rate)
    raw = builder.room("raw", 2 * heads)
    builder.linear(normed, to.gates, raw)
    where = {"x": raw, "weight": address_of("rate", to.rate, torch.float32, heads)}
    where["offset"] = address_of("offset", to.offset, torch.float32, heads)
    gates = builder.gates(gate_loops.RECURRENCE, heads, 1, **where)
    return builder.linear(normed, to.qkv), gates


def _behind(builder: Builder, layer: Behind, width: int) -> tuple[LinearSteps, Any]:
    """The steps up to the last residual, "delta" + "total". The output projection, and the block of what follows."""
    normed, total, delta = (builder.room(name, width) for name in ("normed", "total", "delta"))
    norm = address_of("norm", layer.norm, HALF, width)

    def norm_delta(weight: torch.Tensor | None) -> None:
        if weight is not None:
            builder.small(NORM, width, width, x=delta, out=delta, weight=address_of("norm", weight, HALF, width))

    mixed = 0 if layer.gate is None else builder.room("mixed", shape_of(layer.output[0])[1])
    output = builder.linear(mixed, layer.output, delta)
    norm_delta(layer.attended_norm)
    residual = builder.small(NORM, width, width, x=delta, second=total, out=normed, weight=norm)
    shared = 0
    if layer.gate_up is not None and layer.down is not None:
        shared = delta if layer.experts is None else builder.room("shared", width)
        _, inner = shape_of(layer.down[0])
        gate_up, gated = builder.room("gate_up", 2 * inner), builder.room("gated", inner)
        builder.linear(normed, layer.gate_up, gate_up)
        builder.small(GELU if layer.gelu else SILU, inner, 2 * inner, x=gate_up, out=gated)
        builder.linear(gated, layer.down, shared)
    if layer.experts is not None:
        if (router := layer.experts.router) is None:
            raise ValueError("experts of a span need a router that kernels can multiply with, got None")
        logits = builder.room("logits", shape_of(router[0])[0])
        builder.linear(normed, router, logits)
        add_experts(builder, layer.experts, normed, logits, out=delta, shared=shared)
    norm_delta(layer.mlp_norm)
    return output, residual


def _heads(builder: Builder, to: Heads, normed: int) -> Any:
    """The steps to q, k and v. The block of the last."""
    n_out, _ = shape_of(to.qkv[0])
    width = n_out // (to.heads + 2 * to.kv_heads)
    if width % 2:
        raise ValueError(f"rotation turns pairs, but a head has {width} numbers")
    qkv = builder.room("qkv", n_out)
    builder.linear(normed, to.qkv, qkv)
    fields = {"heads": to.heads, "kv_heads": to.kv_heads}
    if to.norms is not None:
        fields["weight"], fields["k_weight"] = (address_of("norm", x, HALF, width) for x in to.norms)
    return builder.small(SPLIT, width, n_out, x=qkv, **fields)
