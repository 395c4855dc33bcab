"""Slices that are just what Lamina's spans compute: output projection, norm, gated MLP, norm, and heads or logits.

There a slice of a few rows is one program, as in a native decoder, and the numbers are those of the slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamina_kernels.compile import programs
from lamina_kernels.dense.dense import Weight
from lamina_kernels.dense_spans import MAX_ROWS, Behind, Heads, Map, Span, Spans
from lamina_workers.converted.fusion import RmsNorm, SplitHeads, apply_linear, part, silu_mul
from lamina_workers.converted.recording import Operation, Ref
from lamina_workers.converted.slices import Binding, Key, Slices

_SAME = {"reshape", "view", "contiguous", "part"}
_WHOLE = (slice(None), slice(0, None), slice(None))


@dataclass(frozen=True, slots=True)
class _Match:
    """A slice as a span. eps: of its norms. residual: what enters it beside the attention; tables: cos and sin, where
    it ends with heads; both are places among what slices share, `residual` None where it lives across the cut."""

    span: Span
    eps: float
    residual: int | None
    tables: tuple[int, int] | None


class SpanSlices:
    """`run` computes a slice where it `can`."""

    def __init__(self, slices: Slices) -> None:
        found = {index: _matched(slices, index) for index in range(1, slices.count)} if programs.can_run() else {}
        self._kept = {index: match for index, match in found.items() if match is not None}
        eps = {match.eps for match in self._kept.values()}
        if len(eps) != 1:
            self._kept = {}
        self._places = {index: place for place, index in enumerate(self._kept)}
        self._spans = Spans([match.span for match in self._kept.values()], eps.pop() if eps else 0.0)

    def can(self, index: int, rows: int) -> bool:
        return index in self._kept and 0 < rows <= MAX_ROWS

    def run(
        self, index: int, tables: Sequence[Any], live: Sequence[torch.Tensor], attended: torch.Tensor
    ) -> list[torch.Tensor]:
        """What `Slices.run` returns, from what that takes."""
        match = self._kept[index]
        hidden = live[0] if match.residual is None else tables[match.residual]
        rotation = None if match.tables is None else (tables[match.tables[0]], tables[match.tables[1]])
        whole = attended.view(attended.shape[1], -1)
        leaves, *made = self._spans.run(self._places[index], hidden[0], whole, rotation)
        return [made[0][None]] if match.tables is None else [*made, leaves[None]]


def _matched(slices: Slices, index: int) -> _Match | None:
    """A slice as a span; None where it is something else."""
    live, leaves = slices.live(index - 1), () if index == slices.count - 1 else slices.live(index)
    if len(live) > 1 or (index < slices.count - 1 and len(leaves) != 1):
        return None
    walk = _Walk(slices.binding)
    try:
        then, angles, normed, own_eps = _end(slices, walk, index)
        norm, leaving, eps = walk.norm(normed)
        middle, down = walk.add(leaving)
        down_map, gated = walk.rows(down)
        gate_up, normed = walk.rows(walk.at(gated, silu_mul).args[0])
        post_norm, again, post_eps = walk.norm(normed)
        entering, output = walk.add(again)
        output_map, attended = walk.rows(output)
        place = _place(slices, entering, walk.source(entering)) if not live else None
        tables = None if angles is None else (_place(slices, angles[0]), _place(slices, angles[1]))
    except LookupError:
        return None
    pairs = [
        (walk.source(middle), walk.source(again)),
        (walk.source(attended), slices.attention(index - 1)),
        (post_eps, eps),
        (own_eps, eps if own_eps is not None else None),
        *((walk.source(entering), walk.source(part.ref)) for part in live),
        *((walk.source(part.ref), walk.source(leaving)) for part in leaves),
    ]
    if any(one != other for one, other in pairs):
        return None
    return _Match(Span(Behind(output_map, post_norm, gate_up, down_map), norm, then), eps, place, tables)


def _end(slices: Slices, walk: _Walk, index: int) -> tuple[Heads | Weight, tuple[Key, Key] | None, Any, Any]:
    """What a slice ends with, where cos and sin come from, what that is applied to, and the eps of norms of heads.
    Raises LookupError."""
    first = slices.wanted(index)[0]
    if index == slices.count - 1:
        (weight, bias), normed = walk.rows(first)
        if bias is not None:
            raise LookupError
        return weight, None, normed, None
    split = walk.at(first, None)
    if not isinstance(split.function, SplitHeads) or not isinstance(first, Ref):
        raise LookupError
    if slices.wanted(index)[:3] != [Ref(first.number, item) for item in range(3)]:
        raise LookupError
    rows, normed = walk.rows(split.args[0])
    weights = [slices.binding.constant(name) for name in split.args[3:]]
    norms = (weights[0], weights[1]) if weights else None
    heads = Heads(rows, split.function.heads, split.function.kv_heads, norms)
    return heads, (split.args[1], split.args[2]), normed, split.function.eps if weights else None


def _place(slices: Slices, *keys: Any) -> int:
    """Where one of `keys` is among what slices share. Raises LookupError."""
    for key in keys:
        if key in slices.shared:
            return slices.shared.index(key)
    raise LookupError


class _Walk:
    """Follows operations back. Raises LookupError where one is not the expected one."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding

    def source(self, ref: Any) -> Any:
        """Where the numbers of `ref` come from, past operations that keep them all in their order."""
        while isinstance(ref, Ref) and self._keeps(operation := self._binding.operations[ref.number]):
            ref = operation.args[0]
        return ref

    def _keeps(self, operation: Operation) -> bool:
        name = getattr(operation.function, "__name__", "")
        if operation.function is part:
            whole = self._binding.operations[operation.args[0].number].shapes[0][-1]
            return bool(operation.args[1:3] == (0, whole))
        return name in _SAME or (name == "__getitem__" and operation.args[1] == _WHOLE)

    def at(self, ref: Any, function: Any) -> Operation:
        ref = self.source(ref)
        if not isinstance(ref, Ref):
            raise LookupError
        operation = self._binding.operations[ref.number]
        if function is not None and operation.function is not function:
            raise LookupError
        return operation

    def rows(self, ref: Any) -> tuple[Map, Any]:
        """A map for few rows, and what it is applied to."""
        operation = self.at(ref, apply_linear)
        found: Map | None = self._binding.constant(operation.args[1]).few_rows
        if found is None:
            raise LookupError
        return found, operation.args[0]

    def norm(self, ref: Any) -> tuple[torch.Tensor, Any, float]:
        """A norm's weight, what it is applied to, and its eps."""
        operation = self.at(ref, None)
        if not isinstance(operation.function, RmsNorm):
            raise LookupError
        weight: torch.Tensor = self._binding.constant(operation.args[0])
        return weight, operation.args[1], operation.function.eps

    def add(self, ref: Any) -> tuple[Any, Any]:
        """The two sides of a sum."""
        operation = self.at(ref, None)
        if getattr(operation.function, "__name__", "") != "add" or operation.kwargs or len(operation.args) != 2:
            raise LookupError
        return operation.args[0], operation.args[1]
