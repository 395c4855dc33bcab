"""The decoder of a converted model (`ConvertedDecoder`): what `Decoder` is to a native one, for the same drivers.

Some slices compute just what Lamina's spans compute: output projection, norm, gated MLP, norm, and heads or logits.
`SpanSlices` recognises them. There a slice of a few rows is one program, as in a native decoder, and the numbers are
those of the slice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lamina_kernels.compile import programs
from lamina_kernels.dense.dense import Weight
from lamina_kernels.dense.steps import MAX_ROWS, Map
from lamina_kernels.dense_spans import Behind, Heads, Span, Spans
from lamina_kernels.states.operands import StateConstants
from lamina_workers.converted.config import ConvertedConfig
from lamina_workers.converted.cuts import Live
from lamina_workers.converted.fusion import RmsNorm, SplitHeads, apply_linear, part, silu_mul
from lamina_workers.converted.recording import Operation, Ref
from lamina_workers.converted.slices import Binding, Key, Slices
from lamina_workers.converted.weights import ConvertedWeights
from lamina_workers.decoder.model import Batch, Decoder, Forward, KeyValueReady, QueryReady
from lamina_workers.decoder.shard import WHOLE

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
        matches = {index: _matched(slices, index) for index in range(1, slices.count)} if programs.can_run() else {}
        self._matches = {index: match for index, match in matches.items() if match is not None}
        eps = {match.eps for match in self._matches.values()}
        if len(eps) != 1:
            self._matches = {}
        self._places = {index: place for place, index in enumerate(self._matches)}
        self._spans = Spans([match.span for match in self._matches.values()], eps.pop() if eps else 0.0)

    def can(self, index: int, rows: int) -> bool:
        return index in self._matches and 0 < rows <= MAX_ROWS

    def run(
        self, index: int, tables: Sequence[Any], live: Sequence[torch.Tensor], attended: torch.Tensor
    ) -> list[torch.Tensor]:
        """What `Slices.run` returns, from what that takes."""
        match = self._matches[index]
        hidden = live[0] if match.residual is None else tables[match.residual]
        rotation = None if match.tables is None else (tables[match.tables[0]], tables[match.tables[1]])
        outputs = attended.view(attended.shape[1], -1)
        leaves, *results = self._spans.run(self._places[index], hidden[0], outputs, rotation)
        return [results[0][None]] if match.tables is None else [*results, leaves[None]]


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
            width = self._binding.operations[operation.args[0].number].shapes[0][-1]
            return bool(operation.args[1:3] == (0, width))
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
        few_rows: Map | None = self._binding.constant(operation.args[1]).few_rows
        if few_rows is None:
            raise LookupError
        return few_rows, operation.args[0]

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


class ConvertedDecoder(Decoder):
    """A decoder whose computation is transformers'.

    `hidden` has what lives across an attention, side by side, `[T, width]`; where that has several dtypes, as bytes. A
    model that is not in slices has none, so its batches cannot go from one worker to another.
    """

    def __init__(self, config: ConvertedConfig, weights: ConvertedWeights) -> None:
        self.config: ConvertedConfig = config
        self.shard = WHOLE
        self.dtype, self.device = weights.dtype, weights.device
        self._collective = None
        self._model, self._slices = weights.model, weights.slices
        self._programs = None if weights.slices is None else SpanSlices(weights.slices)

    @property
    def in_slices(self) -> bool:
        """Whether it runs in slices, not as transformers' module."""
        return self._slices is not None

    @property
    def experts_read(self) -> tuple[int, int]:
        """Nothing is known of them: experts are one operation."""
        return 0, 0

    def state_constants(self) -> dict[int, StateConstants]:
        """None: a model with states is not converted."""
        return {}

    def as_module(self) -> ConvertedDecoder:
        """A decoder of the same weights that runs as transformers' module."""
        other = copy.copy(self)
        other.give_up_slices()
        return other

    def give_up_slices(self) -> None:
        """Run as transformers' module from now on."""
        self._slices = None

    def forward(
        self,
        batch: Batch,
        hidden: torch.Tensor | None = None,
        first_layer: int = 0,
        attended: torch.Tensor | None = None,
        query_first: bool = False,
    ) -> Forward:
        """As `Decoder.forward`, but a run that is given `hidden` begins behind an attention, with `attended`; q never
        goes before k and v."""
        layers = self.config.num_hidden_layers
        if not 0 <= first_layer < layers or (hidden is None) != (attended is None) or (first_layer and hidden is None):
            raise ValueError(
                f"first_layer is {first_layer}, allowed is 0 to {layers - 1}, with hidden and attended or without both"
            )
        if self._slices is not None:
            return self._in_slices(self._slices, batch, hidden, first_layer, attended)
        if hidden is not None:
            raise ValueError(f"{self.config.architecture} is not in slices, so a run of it begins at its start")
        return self._as_module(batch)

    def counted_by_model(self, token_ids: torch.Tensor) -> Forward:
        """A run of one sequence whose positions, and all else, transformers' module counts itself."""
        return self._as_module(Batch(token_ids, token_ids, torch.arange(len(token_ids))), counted=True)

    def _as_module(self, batch: Batch, counted: bool = False) -> Forward:
        from lamina_workers.converted.coroutine import stepwise  # greenlet is needed by such models alone

        scorer, sampled = batch.scorer, batch.sampled
        rows = sampled if scorer is None else torch.cat((sampled, scorer.rows))
        run = stepwise(self._model, batch.token_ids[None], None if counted else batch.positions[None], rows)
        try:
            call = next(run)
            for layer in range(self.config.num_hidden_layers):
                attended = yield from self._attended(layer, call.q, call.k, call.v, call.sinks, None)
                try:
                    call = run.send(attended)
                except StopIteration as stop:
                    logits: torch.Tensor = stop.value
                    if scorer is not None:
                        scorer.score(partial(_float_rows, logits[len(sampled) :]), None)
                    return logits[: len(sampled)].float()
        finally:
            run.close()
        raise RuntimeError(
            f"{self.config.architecture} attends more often than in its dry run, again with q {list(call.q.shape)}"
        )

    def _in_slices(
        self, slices: Slices, batch: Batch, hidden: torch.Tensor | None, layer: int, attended: torch.Tensor | None
    ) -> Forward:
        ids, positions = batch.token_ids[None], batch.positions[None]
        last = self.config.num_hidden_layers
        if hidden is None or attended is None:
            values, tables = slices.first(ids, positions)
            outputs: torch.Tensor | None = None
        else:
            tables = slices.tables(layer + 1, ids, positions)
            values, outputs = unpacked(slices.live(layer), hidden), self._as_called(layer, attended)
        while True:
            if outputs is None:
                count = len(values) - len(slices.live(layer))
                live = values[count:]
                q, k, v, *own_sinks = values[:count]
                sinks = own_sinks[0] if own_sinks else slices.sinks[layer]
                packed = packed_of(slices.live(layer), live, batch.token_ids)
                outputs = yield from self._attended(layer, q, k, v, sinks, packed)
            else:
                live = values
            layer += 1
            if layer == last:
                break
            values, outputs = self._slice(slices, layer, tables, live, outputs), None

        def logits(tokens: torch.Tensor) -> torch.Tensor:
            """Past the last attention, of some of the tokens."""
            if torch.equal(tokens, torch.arange(len(ids[0]), device=tokens.device)):
                values = self._slice(slices, last, tables, live, outputs)
            else:
                parts = zip(slices.live(last - 1), live, strict=True)
                values = self._slice(
                    slices,
                    last,
                    slices.tables(last, ids[:, tokens], positions[:, tokens]),
                    [x.index_select(part.axis, tokens) for part, x in parts],
                    outputs.index_select(1, tokens),
                )
            result: torch.Tensor = values[0][0]
            return result.float()

        if (scorer := batch.scorer) is not None:
            scorer.score(lambda rows: logits(scorer.rows[rows]), None)
        if not len(batch.sampled):
            return torch.empty(0, self.config.vocab_size, device=self.device)
        return logits(batch.sampled)

    def _slice(
        self, slices: Slices, index: int, tables: list[Any], live: list[Any], attended: torch.Tensor
    ) -> list[Any]:
        if self._programs is not None and self._programs.can(index, attended.shape[1]):
            return self._programs.run(index, tables, live, attended)
        return slices.run(index, tables, live, attended)

    def _attended(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        hidden: torch.Tensor | None,
    ) -> Any:
        """Ask for the attention of a layer. All are as the model's code has them, as is what is returned."""
        spec = self.config.attentions.specs[layer]
        yield QueryReady(layer, _by_token(q, spec.heads, spec.d_k))
        attended = yield KeyValueReady(
            layer,
            _by_token(k, spec.kv_heads, spec.d_k),
            _by_token(v, spec.kv_heads, spec.d_v),
            hidden,
            None if sinks is None else sinks.float(),
        )
        if attended is None:
            raise ValueError(f"layer {layer} needs the attention output sent in answer to KeyValueReady, got None")
        return self._as_called(layer, attended)

    def _as_called(self, layer: int, attended: torch.Tensor) -> torch.Tensor:
        """The attention output, `[T, heads * d_v]`, as the model's code wants it: `[1, T, heads, its own d_v]`."""
        spec, (_, _, d_v) = self.config.attentions.specs[layer], self.config.attentions.shapes[layer]
        shaped = attended.view(1, len(attended), spec.heads, spec.d_v)
        return shaped if d_v == spec.d_v else shaped[..., :d_v].contiguous()


def _by_token(x: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """`[1, own heads, T, own width]`, or by token already, as `[T, heads, width]`: zeros are added where kernels
    keep wider vectors."""
    if x.ndim == 4:
        x = x[0].transpose(0, 1)
    if x.shape[2] != width:
        x = torch.nn.functional.pad(x, (0, width - x.shape[2]))
    return x.contiguous()


def packed_of(parts: Sequence[Live], live: Sequence[torch.Tensor], token_ids: torch.Tensor) -> torch.Tensor:
    """What lives across a cut beside `token_ids`, `[T]`, as one tensor, `[T, width]`."""
    tokens = len(token_ids)
    if not parts:
        return torch.empty(tokens, 0, device=token_ids.device)
    flat = [x.movedim(part.axis, 0).reshape(tokens, part.width) for part, x in zip(parts, live, strict=True)]
    if len(flat) == 1:
        return flat[0]
    if len({x.dtype for x in flat}) > 1:
        flat = [x.contiguous().view(torch.uint8) for x in flat]
    return torch.cat(flat, 1)


def unpacked(parts: Sequence[Live], hidden: torch.Tensor) -> list[torch.Tensor]:
    """What `packed_of` has put together."""
    mixed = len({part.dtype for part in parts}) > 1
    widths = [part.bytes if mixed else part.width for part in parts]
    pieces: list[torch.Tensor] = []
    if not parts:
        return pieces
    for piece, x in zip(parts, hidden.split(widths, 1), strict=True):
        values = x.contiguous().view(piece.dtype) if mixed else x
        shape = [size for axis, size in enumerate(piece.shape) if axis != piece.axis]
        pieces.append(values.reshape(len(hidden), *shape).movedim(0, piece.axis))
    return pieces


def _float_rows(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return logits[rows].float()
