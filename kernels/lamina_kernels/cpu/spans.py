"""All that a decoder computes between two attentions, for a few rows in bfloat16, as one program.

The kernels are those of `few_rows` and `dense_loops`, so a span gives the numbers that they give one by one. What it
saves is Python between them, and a parallel region for each: 40 % of the time at one row of a small model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamina_kernels.cpu import dense_loops, few_rows
from lamina_kernels.cpu.dense_loops import ADD, NORM, PARALLEL, SILU, SPLIT
from lamina_kernels.cpu.programs import Program, Step

MAX_ROWS = few_rows.MAX_ROWS
_HALF = torch.bfloat16
_SHARES = 2  # of a linear map, for each thread

Map = tuple[torch.Tensor, torch.Tensor | None]
"""W `[n_out, n_in]`, one that `few_rows` can multiply with, and a bias `[n_out]`."""

Rotation = tuple[torch.Tensor, torch.Tensor] | None
"""cos and sin, float32 `[n, d / 2]`."""


@dataclass(frozen=True, slots=True)
class Behind:
    """A layer behind its attention: output projection, residual, norm `[hidden]`, MLP (gate first), residual."""

    output: Map
    norm: torch.Tensor
    gate_up: Map
    down: Map


@dataclass(frozen=True, slots=True)
class Heads:
    """q, k and v of the normed residual stream. norms: weights `[d]` for q and k, or None."""

    qkv: Map
    heads: int
    kv_heads: int
    norms: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class Span:
    """From behind an attention (None: from the embedding) to before the next one, or to the end.

    norm: `[hidden]`, of the residual stream that leaves. then: what the normed stream becomes: q, k and v; float32
    numbers, by W; or None: it stays itself.
    """

    behind: Behind | None
    norm: torch.Tensor
    then: Heads | torch.Tensor | None


class Spans:
    """The spans of a decoder, one behind the other, for any number of rows up to MAX_ROWS. eps: of all norms.

    Any thread may run them: each has programs and memory of its own.
    """

    def __init__(self, spans: Sequence[Span], eps: float) -> None:
        self._spans = spans
        self._eps = eps
        self._own = _Own()

    def run(
        self, index: int, hidden: torch.Tensor, attended: torch.Tensor | None = None, rotation: Rotation = None
    ) -> tuple[torch.Tensor, ...]:
        """Span `index`. hidden: `[n, hidden]`, the residual stream that entered the layer of its attention, which is
        not changed; attended: what that gave, `n` rows, where the span has one.

        Returns new tensors: the residual stream that leaves (the same, where nothing is behind an attention), and
        q `[n, heads, d]`, k and v `[n, kv_heads, d]`; or float32 `[n, n_out]`; or `[n, hidden]`.
        """
        key = index, len(hidden), torch.get_num_threads()
        made = self._own.made.get(key)
        if made is None:
            if not 0 < len(hidden) <= MAX_ROWS:
                raise ValueError(f"a span takes 1 to {MAX_ROWS} rows, got {len(hidden)}")
            builder = _Builder(self._own.room, len(hidden), key[2], self._eps)
            made = self._own.made[key] = _Made(self._spans[index], builder)
        return made.run(hidden, attended, rotation)


class _Own(threading.local):
    """What one thread has: programs by span, rows and threads, and room for what is inside a span, by name."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int, int], _Made] = {}
        self.room: dict[tuple[str, int], torch.Tensor] = {}


class _Builder:
    """Collects the steps of a program."""

    def __init__(self, room: dict[tuple[str, int], torch.Tensor], rows: int, threads: int, eps: float) -> None:
        self.rows, self.threads = rows, threads
        self.steps: list[Step] = []
        self._room, self._eps = room, eps
        self._few, self._loops = few_rows.load_kernel(), dense_loops.load_kernel(True)[0]

    def room(self, name: str, width: int) -> int:
        """Where `[rows, width]` inside a span are, for all spans of the thread."""
        found = self._room.get((name, width))
        if found is None:
            found = self._room[name, width] = torch.empty(MAX_ROWS, width, dtype=_HALF)
        return found.data_ptr()

    def linear(self, x: int, by: Map, y: int = 0, size: int = 2) -> Any:
        """y = x W^T + b, for addresses; size: bytes of a number of y. Returns the argument block."""
        weight, bias = by
        n_out, n_in = weight.shape
        shares = self.threads * _SHARES
        block = few_rows.Arguments(
            shares=shares, x=x, w=weight.data_ptr(), y=y, rows=self.rows, n_in=n_in, n_out=n_out, size=size
        )
        self.steps.append(Step(self._few, block, True))
        if bias is not None:
            self.small(ADD, n_out, n_out, x=y, y=_address("bias", bias, _HALF, n_out))
        return block

    def small(self, operation: int, width: int, numbers: int, **fields: int) -> Any:
        """An operation of `dense_loops`. numbers: in a row of x. Returns the argument block."""
        shared = not self.steps or self.rows * numbers >= PARALLEL
        shares = min(self.threads, self.rows) if self.rows * numbers >= PARALLEL else 1
        block = dense_loops.Arguments(
            operation=operation, size=2, shares=shares, rows=self.rows, width=width, eps=self._eps, **fields
        )
        self.steps.append(Step(self._loops, block, shared))
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
            self._output, self._residual = _behind(builder, span.behind, width)
            delta, total = builder.room("delta", width), builder.room("total", width)
            self._norm = builder.small(NORM, width, width, x=delta, y=total, out=normed, weight=norm)
        if isinstance(span.then, Heads):
            self._heads = _heads(builder, span.then, normed)
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
            self._output.x = _address("attended", attended, _HALF, rows * self._output.n_in)
        results: tuple[torch.Tensor, ...]
        if isinstance(span.then, Heads):
            results = self._place_heads(span.then, rotation)
        elif span.then is not None:
            results = (torch.empty(rows, len(span.then), dtype=torch.float32),)
            self._last.y = results[0].data_ptr()
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


def _behind(builder: _Builder, layer: Behind, width: int) -> tuple[Any, Any]:
    """The steps up to the last residual, "delta" + "total". The blocks of the output projection and of what follows."""
    inner = layer.down[0].shape[1]
    normed, total, delta = (builder.room(name, width) for name in ("normed", "total", "delta"))
    gate_up, gated = builder.room("gate_up", 2 * inner), builder.room("gated", inner)
    norm = _address("norm", layer.norm, _HALF, width)
    output = builder.linear(0, layer.output, delta)
    residual = builder.small(NORM, width, width, x=delta, second=total, out=normed, weight=norm)
    builder.linear(normed, layer.gate_up, gate_up)
    builder.small(SILU, inner, 2 * inner, x=gate_up, out=gated)
    builder.linear(gated, layer.down, delta)
    return output, residual


def _heads(builder: _Builder, to: Heads, normed: int) -> Any:
    """The steps to q, k and v. The block of the last."""
    n_out = len(to.qkv[0])
    width = n_out // (to.heads + 2 * to.kv_heads)
    if width % 2:
        raise ValueError(f"rotation turns pairs, but a head has {width} numbers")
    qkv = builder.room("qkv", n_out)
    builder.linear(normed, to.qkv, qkv)
    fields = {"heads": to.heads, "kv_heads": to.kv_heads}
    if to.norms is not None:
        fields["weight"], fields["k_weight"] = (_address("norm", x, _HALF, width) for x in to.norms)
    return builder.small(SPLIT, width, n_out, x=qkv, **fields)


def _address(name: str, x: torch.Tensor, dtype: torch.dtype, numbers: int) -> int:
    """Where the numbers of `x` are, once it is certain that as many of that kind may be read there."""
    if x.dtype != dtype or x.numel() != numbers or not x.is_cpu or not x.is_contiguous():
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)} on {x.device} with strides {x.stride()}, expected {numbers} numbers "
            f"of {dtype}, contiguous, on a CPU"
        )
    return x.data_ptr()
