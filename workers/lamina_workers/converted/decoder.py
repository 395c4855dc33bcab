"""The decoder of a converted model: what `Decoder` is to a native one, for the same drivers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lamina_kernels.states.layout import StateConstants
from lamina_workers.converted.attention_calls import AttentionCall
from lamina_workers.converted.config import ConvertedConfig
from lamina_workers.converted.cuts import Live
from lamina_workers.converted.slices import Slices
from lamina_workers.converted.span_slices import SpanSlices
from lamina_workers.converted.weights import ConvertedWeights
from lamina_workers.decoder.model import Batch, Decoder, Forward, KeyValueReady, QueryReady
from lamina_workers.decoder.shard import WHOLE


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
        wanted = sampled if scorer is None else torch.cat((sampled, scorer.rows))
        run = stepwise(self._model, batch.token_ids[None], None if counted else batch.positions[None], wanted)
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
            f"{self.config.architecture} attends more often than in its dry run, again with {_said(call)}"
        )

    def _in_slices(
        self, slices: Slices, batch: Batch, hidden: torch.Tensor | None, layer: int, attended: torch.Tensor | None
    ) -> Forward:
        ids, positions = batch.token_ids[None], batch.positions[None]
        last = self.config.num_hidden_layers
        if hidden is None or attended is None:
            found, tables = slices.first(ids, positions)
            whole: torch.Tensor | None = None
        else:
            tables = slices.tables(layer + 1, ids, positions)
            found, whole = unpacked(slices.live(layer), hidden), self._as_called(layer, attended)
        while True:
            if whole is None:
                *own, live = _split(found, len(slices.live(layer)))
                q, k, v = own[0][:3]
                sinks = own[0][3] if len(own[0]) > 3 else slices.sinks[layer]
                packed = packed_of(slices.live(layer), live, batch.token_ids)
                whole = yield from self._attended(layer, q, k, v, sinks, packed)
            else:
                live = found
            layer += 1
            if layer == last:
                break
            found, whole = self._slice(slices, layer, tables, live, whole), None

        def logits(kept: torch.Tensor) -> torch.Tensor:
            """Past the last attention, of some of the tokens."""
            if len(kept) == len(ids[0]) and _in_order(kept):
                found = self._slice(slices, last, tables, live, whole)
            else:
                parts = zip(slices.live(last - 1), live, strict=True)
                found = self._slice(
                    slices,
                    last,
                    slices.tables(last, ids[:, kept], positions[:, kept]),
                    [x.index_select(part.axis, kept) for part, x in parts],
                    whole.index_select(1, kept),
                )
            left: torch.Tensor = found[0][0]
            return left.float()

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
    found: list[torch.Tensor] = []
    if not parts:
        return found
    for part, x in zip(parts, hidden.split(widths, 1), strict=True):
        own = x.contiguous().view(part.dtype) if mixed else x
        shape = [size for axis, size in enumerate(part.shape) if axis != part.axis]
        found.append(own.reshape(len(hidden), *shape).movedim(0, part.axis))
    return found


def _split(found: list[Any], live: int) -> tuple[list[Any], list[Any]]:
    return found[: len(found) - live], found[len(found) - live :]


def _float_rows(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return logits[rows].float()


def _in_order(sampled: torch.Tensor) -> bool:
    return torch.equal(sampled, torch.arange(len(sampled), device=sampled.device))


def _said(call: AttentionCall) -> str:
    return f"q {list(call.q.shape)}"
