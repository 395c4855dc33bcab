"""The decoder: a forward pass that is a coroutine, cut at mixers: attention, or a layer that keeps a state.

It yields queries, keys and values, or the inputs of a state, and its driver sends back what comes of them. Layers are
numbered as holders do, by their mixers: an MLP alone belongs to the mixer before it, and a layer with two is two.

Between two yields stands one plain function of tensors: `_before_attention`, or `_after_attention`. Where a batch has
few rows and the machine can, both are one compiled program, a span from one attention to the next (`decoder_spans`).
Else `project` makes q, k and v of the residual stream: as heads, normed as the model's family does it, and rotated.

A rank of several has a decoder of its own heads, columns, experts and tokens. Its driver attends those heads only, and
the sums over ranks are made inside `_after_attention`. All ranks run the same batches in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lamina_kernels.compile import programs
from lamina_kernels.dense.dense import (
    Linear,
    Weight,
    add_rms_norm,
    gelu_tanh_mul,
    layer_norm,
    rms_norm,
    silu_mul,
    soft_cap,
    split_heads,
)
from lamina_kernels.dense.steps import MAX_ROWS
from lamina_kernels.dense_spans import Behind, Gate, Heads, Span, Spans, States
from lamina_kernels.states.advance import StateWork
from lamina_kernels.states.operands import StateConstants
from lamina_workers.checkpoints.checkpoint import TensorSource
from lamina_workers.checkpoints.weight_loader import UNPACKED, Packing
from lamina_workers.decoder.choices import LatentAttention, Rotation, beside, query_rows
from lamina_workers.decoder.decoder_weights import DecoderWeights, MixerWeights, load_weights
from lamina_workers.decoder.moe import Experts, Mlp
from lamina_workers.decoder.rope import LayerRotations
from lamina_workers.decoder.shard import WHOLE, Shard, local, rank_shape
from lamina_workers.decoder.state_layers import OutputGate
from lamina_workers.model_config.config import ModelConfig, Residuals

if TYPE_CHECKING:
    from lamina_workers.decoder.prompt_scores import PromptScorer
    from lamina_workers.decoder.shard import Collective


def decoder_spans(config: ModelConfig, weights: DecoderWeights, query_first: bool = False) -> Spans | None:
    """Span i ends before the mixer of layer i, with the inputs of a state, or with q, k and v (`query_first`: with the
    normed residual stream); the one past the last layer ends with the logits, or with the normed stream where the head
    has to be applied to that. None where a map is neither packed nor multiplied by `few_rows`, or a layer is not built
    as those of Llama, Qwen3-Next or gpt-oss."""
    family = config.family
    if family.norm != "rms" or family.qk_norm not in ("", "head") or config.residuals != Residuals():
        return None
    plain = not (family.norms.parallel or family.normed_stream)
    if not plain or config.v_head_dim != config.head_dim:
        return None
    if not programs.can_run() or weights.norm.dtype != torch.bfloat16:  # packed maps take float32 too
        return None
    behind: list[Behind | None] = [None]
    ends: list[Heads | States | Weight | None] = []
    for layer in weights.layers:
        span, inputs = _behind(layer), _inputs(config, layer)
        if span is None or inputs is None:
            return None
        behind.append(span)
        ends.append(None if query_first and isinstance(inputs, Heads) else inputs)
    norms = [*(layer.input_norm for layer in weights.layers if layer.input_norm is not None), weights.norm]
    ends.append(_head(weights.head))
    return Spans([Span(*parts) for parts in zip(behind, norms, ends, strict=True)], config.rms_norm_eps)


def _behind(layer: MixerWeights) -> Behind | None:
    """What follows the mixer, where it is one MLP, or experts."""
    if len(layer.mlps) != 1 or layer.joins or layer.latent is not None or layer.input_norm is None:
        return None
    (weights,) = layer.mlps
    experts = weights.mlp if isinstance(weights.mlp, Experts) else None
    mlp = weights.mlp if isinstance(weights.mlp, Mlp) else None
    routed = None
    if experts is not None:
        routed, mlp = experts.routed, None if experts.shared is None else experts.shared[0]
        if routed is None or routed.router is None or experts.latent is not None:
            return None
    gate_up = down = None
    if mlp is not None:
        gate_up, down = mlp.gate_up.few_rows, mlp.down.few_rows
        if mlp.gating not in (silu_mul, gelu_tanh_mul) or gate_up is None or down is None:
            return None
    gate, output = None if layer.gate is None else _gate(layer.gate, layer.input_norm), layer.output.few_rows
    if output is None or weights.norm is None or (gate is None and layer.gate is not None):
        return None
    gelu = mlp is not None and mlp.gating is gelu_tanh_mul
    norms = layer.attended_norm, weights.norm_behind
    return Behind(output, weights.norm, gate_up, down, gelu, *norms, gate, routed)


def _gate(gate: OutputGate, entering: torch.Tensor) -> Gate | None:
    few_rows = gate.map.few_rows if isinstance(gate.map, Linear) else None
    if few_rows is None or not gate.fuses:
        return None
    return Gate(few_rows, entering, gate.activation is F.silu, gate.norm, gate.group, gate.eps)


def _inputs(config: ModelConfig, layer: MixerWeights) -> Heads | States | None:
    """What a mixer reads, where it is attention or a gated delta net."""
    qkv, state = layer.qkv.few_rows, layer.state
    if qkv is None or layer.index is not None:
        return None
    if state is None:
        return Heads(qkv, config.num_attention_heads, config.num_key_value_heads, layer.qk_norms)
    gates = None if state.gates is None else state.gates.few_rows
    if gates is None or not state.fuses or state.constants.conv is None or state.rate is None or state.offset is None:
        return None
    return States(qkv, gates, state.rate, state.offset)


def _head(head: Linear) -> Weight | None:
    few_rows = head.few_rows
    return few_rows[0] if few_rows is not None and few_rows[1] is None else None


def project(
    config: ModelConfig, layer: MixerWeights, normed: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q `[T, heads, query_width]`, k `[T, kv_heads, key_width]` and v `[T, kv_heads, d_v]` of the normed residual
    stream, `[T, hidden_size]`, with what the layer's index has of it."""
    projected = layer.qkv(normed)
    q, k, v = split(config, layer, projected, config.num_attention_heads, config.num_key_value_heads, rotation)
    if layer.index is not None:
        q, k = beside(q, k, *layer.index(normed, projected, rotation))
    return q, k, v


def split(
    config: ModelConfig, layer: MixerWeights, projected: torch.Tensor, heads: int, kv_heads: int, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q `[T, heads, d_k]`, k `[T, kv_heads, d_k]` and v `[T, kv_heads, d_v]` from what `layer` projects of them, side
    by side. Either number of heads may be 0."""
    if layer.latent is not None:
        return _over_latents(layer.latent, projected, heads, kv_heads, rotation)
    kind, norms, eps = config.family.qk_norm, layer.qk_norms, config.rms_norm_eps
    d, d_v = config.head_dim, config.v_head_dim
    if norms is None or kind == "head":
        return split_heads(projected, heads, kv_heads, rotation, norms, eps, d_v)
    if kind == "whole":
        q, k, v = projected.split((heads * d, kv_heads * d, kv_heads * d_v), -1)
        pairs = zip((q, k), norms, strict=True)
        normed = [rms_norm(x.contiguous(), weight, eps) if x.shape[1] else x for x, weight in pairs]
        return split_heads(torch.cat([*normed, v], -1), heads, kv_heads, rotation, d_v=d_v)
    q, k, v = split_heads(projected, heads, kv_heads, rotation, d_v=d_v)
    pairs = zip((q, k), norms, strict=True)
    q, k = (rms_norm(x.flatten(0, 1), weight, eps).view_as(x) if x.numel() else x for x, weight in pairs)
    return q, k, v


def _over_latents(
    latent: LatentAttention, projected: torch.Tensor, heads: int, kv_heads: int, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v; without `heads` no q, without `kv_heads` no k, and no v either way."""
    first = query_rows(latent.config, heads) if heads else 0
    empty = projected.new_empty(len(projected), kv_heads, 0)
    q = latent.queries(projected[:, :first], rotation) if heads else empty
    return q, latent.keys(projected[:, first:], rotation) if kv_heads else empty, empty


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one forward pass, of any number of sequences.

    token_ids, positions: int64 `[T]`. sampled: int64 `[S]`, indices into the T tokens whose logits are wanted.
    rope_lengths: int64 `[T]`, per token the larger of its sequence's prompt length and its position + 1; needed where
    RoPE is `by_length`, else None. All on the decoder's device. `scorer` gets the tokens of prompts that are scored.
    `hidden`, where it is a list, gets what enters the head, of all tokens, `[T, hidden_size]`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    sampled: torch.Tensor
    rope_lengths: torch.Tensor | None = None
    scorer: PromptScorer | None = None
    hidden: list[torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class QueryReady:
    """The queries of `layer`. q: `[T, heads, query_width]` of its `LayerSpec`, mostly d_k wide, in the decoder's dtype,
    rotated, not scaled. `early`: k and v are computed when the pass goes on, else they are there already."""

    layer: int
    q: torch.Tensor
    early: bool = False


@dataclass(frozen=True, slots=True)
class KeyValueReady:
    """The keys and values of `layer`. k: `[T, kv_heads, key_width]`, mostly d_k, rotated; v: `[T, kv_heads, d_v]`, or
    of latents `[T, 1, 0]`.
    `sinks`, float32 `[heads]`: the logit of one more key of each head, whose value is zeros; None where there are none.
    The driver merges them in (`lamina_kernels.partial.with_sinks`); holders do not know them.

    In answer to it the driver sends the attention output, `[T, heads, d_v]` or `[T, heads * d_v]`. Or it goes on
    elsewhere with that and `hidden`, `[T, hidden_size]`, the residual stream that entered the layer.
    """

    layer: int
    k: torch.Tensor
    v: torch.Tensor
    hidden: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class StateReady:
    """The inputs of `layer`, which keeps a state. x: `[T, 2 * key_heads * d_k + heads * d_v]` in the decoder's dtype,
    in the order q, k, v, before the convolution; gates: float32 `[T, heads, g]`, as in `messages.Advance`.

    In answer to it the driver sends the output, `[T, heads * d_v]`; or the batch's work at a holder in this process:
    then the layers that it has and that follow one another are computed here. `hidden` as in `KeyValueReady`.
    """

    layer: int
    x: torch.Tensor
    gates: torch.Tensor
    hidden: torch.Tensor | None = None


Event = QueryReady | KeyValueReady | StateReady

Entering = tuple[torch.Tensor, ...]
"""What a span has made of the residual stream: q, k and v, or where q comes first the normed stream; the inputs of a
state and its gates; of what leaves the last layer the logits, or the normed stream. Empty: nothing yet."""

Forward = Generator[Event, torch.Tensor | StateWork | None, torch.Tensor]


class Decoder:
    """A decoder-only transformer: embedding, layers, final norm, head; or what one rank has of it.

    `config` is the rank's own, with its own heads (see `shard.local`). Nothing here needs gradients; run it under
    `torch.inference_mode()`.
    """

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, shard: Shard = WHOLE, collective: Collective | None = None
    ) -> None:
        """config: of the whole model, `with_ranks`. collective: needed by a rank of several, and replaceable."""
        self.config = local(config, shard)
        self.shard = shard
        self.collective = collective
        shapes = [rank_shape(config, Shard(rank, shard.ranks)) for rank in range(shard.ranks)]
        self._widths = [len(shape.vocabulary) for shape in shapes]  # of each rank's logits
        self._first_token = shapes[shard.rank].vocabulary.start
        self._split_embedding = weights.embedding.shape[0] < config.vocab_size
        self.dtype = weights.norm.dtype
        self.device = weights.norm.device
        self._weights = weights
        self._rotations = LayerRotations(config.layer_ropes(), config.rotary_dim, self.device)
        # By whether q comes first: those are made when they are first wanted.
        self._spans = {False: decoder_spans(self.config, weights) if shard.ranks == 1 else None}

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        checkpoint: TensorSource,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
        shard: Shard = WHOLE,
        collective: Collective | None = None,
        split_embedding: bool | None = None,
        packing: Packing = UNPACKED,
    ) -> Decoder:
        """The decoder of a checkpoint, computing in `dtype` on `device`; see `load_weights` for the rest."""
        place = torch.device(device)
        weights = load_weights(config, checkpoint, dtype, place, progress, shard, split_embedding, packing)
        return cls(config, weights, shard, collective)

    @property
    def collective(self) -> Collective | None:
        """This rank's end of the group; None where it is the only one. May be replaced between two batches."""
        return self._collective

    @collective.setter
    def collective(self, collective: Collective | None) -> None:
        place = (collective.rank, collective.ranks) if collective is not None else (0, 1)
        if place != (self.shard.rank, self.shard.ranks):
            raise ValueError(
                f"rank {self.shard.rank} of {self.shard.ranks} got a collective of rank {place[0]} of {place[1]}"
            )
        self._collective = collective if self.shard.ranks > 1 else None

    def forward(
        self,
        batch: Batch,
        hidden: torch.Tensor | None = None,
        first_layer: int = 0,
        attended: torch.Tensor | None = None,
        query_first: bool = False,
    ) -> Forward:
        """Run `batch` from `first_layer` to the head; returns logits, float32 `[S, vocab_size]`, on ranks beyond 0
        `[0, vocab_size]`. With `attended`, the attention output of `first_layer`, it begins behind that attention:
        another decoder of the same weights has come so far. `query_first`: k and v are computed after q was yielded,
        else before it.

        Per layer it yields QueryReady, then KeyValueReady, or only StateReady; the last one is answered by `send(output
        of attention or state)`. `hidden`, `[T, hidden_size]`, is the residual stream that enters `first_layer` (None:
        the embedding). It is all that lives across a layer, and is never changed in place, so a run can start again
        from it.
        Raises RankLost where another rank is gone.
        """
        layers = self._weights.layers
        if not 0 <= first_layer < len(layers) or (hidden is None and (first_layer or attended is not None)):
            raise ValueError(f"first_layer is {first_layer}, allowed is 0 to {len(layers) - 1}, above 0 with hidden")
        query_first = query_first and self.config.index is None  # an index chooses among all keys
        if query_first and True not in self._spans:
            self._split_projections()
        if hidden is None:
            hidden = self._embed(batch.token_ids)
        angles = self._rotations(batch.positions, batch.rope_lengths)
        entering: Entering = ()
        if attended is None and not first_layer:
            hidden, entering = self._span(0, hidden, None, angles[0], query_first)
        index = first_layer
        while index < len(layers):
            if attended is None:
                if (state := layers[index].state) is None:
                    attended = yield from self._to_attention(index, hidden, angles[index], entering, query_first)
                else:
                    x, gates = entering or state.inputs(layers[index].qkv, self._entering(layers[index], hidden))
                    answer = yield StateReady(index, x, gates, hidden)
                    if isinstance(answer, StateWork):
                        behind = index + 1
                        while behind < len(layers) - 1 and behind in answer.places:
                            behind += 1
                        spans = self._spans[query_first] if behind < len(layers) and entering else None
                        if spans is not None and answer.takes(x, gates, torch.get_num_threads()):
                            of_states, inputs = range(index, behind), (x, gates)
                            hidden, *results = spans.advance(of_states, hidden, inputs, answer, angles[behind])
                            answer.stored([answer.places[layer] for layer in of_states])
                            index, entering = behind, tuple(results)
                            continue
                        answer = answer.advance(index, x, gates)
                    attended = answer
                if attended is None:
                    raise ValueError(f"layer {index} needs the output that answers its last event, got None")
            if index == len(layers) - 1:  # past the last attention, only the sampled tokens matter, and the scored ones
                if batch.scorer is not None:
                    self._score(batch.scorer, hidden, attended)
                if batch.hidden is None:
                    hidden, attended = hidden[batch.sampled], attended[batch.sampled]
            index += 1
            hidden, entering = self._span(index, hidden, attended, angles[index], query_first)
            attended = None
        if batch.hidden is not None:
            batch.hidden.append(self._norm(hidden, self._weights.norm))
            hidden, entering = hidden[batch.sampled], tuple(part[batch.sampled] for part in entering)
        gathered = self._gathered(logits := self._logits(hidden, entering))
        return logits.new_empty(0, self.config.vocab_size) if gathered is None else gathered

    def _score(self, scorer: PromptScorer, hidden: torch.Tensor, attended: torch.Tensor) -> None:
        """Score tokens of prompts. hidden, attended: of the last layer, of all tokens."""
        final = self._after_attention(len(self._weights.layers) - 1, hidden[scorer.rows], attended[scorer.rows])
        normed = self._norm(final, self._weights.norm)
        scorer.score(lambda part: self._gathered(self.head(normed[part])), normed)

    def _gathered(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Logits of the whole vocabulary from those of each rank's part; None at ranks beyond 0."""
        return logits if self._collective is None else self._collective.gather_columns(logits, self._widths)

    @property
    def experts_read(self) -> tuple[int, int]:
        """Since the beginning: bytes of experts, each once a batch that chose it, and pairs of a token and one."""
        experts = (mlp.mlp for layer in self._weights.layers for mlp in layer.mlps if isinstance(mlp.mlp, Experts))
        n_bytes, pairs = (sum(column) for column in zip((0, 0), *(one.touched() for one in experts), strict=True))
        return n_bytes, pairs

    def state_constants(self) -> dict[int, StateConstants]:
        """By layer, what holders need of each that keeps a state, beside its spec."""
        return {i: layer.state.constants for i, layer in enumerate(self._weights.layers) if layer.state is not None}

    def _split_projections(self) -> None:
        """Make it possible to compute q alone."""
        heads, latent = self.config.num_attention_heads, self.config.latent
        rows = heads * self.config.head_dim if latent is None else query_rows(latent, heads)
        for layer in self._weights.layers:
            if layer.state is None:
                layer.qkv.split(rows)
        plain = self._spans[False]
        self._spans[True] = None if plain is None else decoder_spans(self.config, self._weights, query_first=True)

    def _span(
        self, index: int, hidden: torch.Tensor, attended: torch.Tensor | None, rotation: Rotation, query_first: bool
    ) -> tuple[torch.Tensor, Entering]:
        """The residual stream that enters layer `index`, or the end, and what a span has made of it.

        hidden, attended: of the layer before; layer 0 has None, and `hidden` enters that itself.
        """
        spans = self._spans[query_first]
        if spans is None or not 0 < len(hidden) <= MAX_ROWS:
            return hidden if attended is None else self._after_attention(index - 1, hidden, attended), ()
        hidden, *entering = spans.run(index, hidden, attended, rotation)
        return hidden, tuple(entering)

    def _logits(self, hidden: torch.Tensor, entering: Entering) -> torch.Tensor:
        """Float32 `[n, vocab]`, of the rank's part of the vocabulary."""
        (result,) = entering or (self._norm(hidden, self._weights.norm),)
        if entering and result.dtype == torch.float32:  # a span's normed stream is bfloat16
            return self._scaled(result)
        return self.head(result)

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """Float32 `[n, vocab]`, of the rank's part of the vocabulary, from the normed residual stream behind the last
        layer, `[n, hidden_size]`."""
        return self._scaled(self._weights.head.float32(normed))

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        return logits if self.config.logit_soft_cap is None else soft_cap(logits, self.config.logit_soft_cap)

    def _to_attention(
        self, index: int, hidden: torch.Tensor, rotation: Rotation, entering: Entering, query_first: bool
    ) -> Generator[Event, torch.Tensor | None, torch.Tensor | None]:
        """The attention output of layer `index`, which `hidden` enters."""
        if query_first:
            if entering:
                (normed,) = entering
                q = self._query(index, normed, rotation)
            else:
                q, normed = self._before_query(index, hidden, rotation)
            yield QueryReady(index, q, early=True)
            k, v = self._keys_values(index, normed, rotation)
        else:
            q, k, v = entering or self._before_attention(index, hidden, rotation)
            yield QueryReady(index, q)
        return (yield KeyValueReady(index, k, v, hidden, self._weights.layers[index].sinks))

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The residual stream that enters layer 0, `[T, hidden_size]`."""
        scale = self.config.embedding_scale
        if not self._split_embedding or self._collective is None:
            embedded = self._weights.embedded(token_ids)
        else:
            rows = token_ids - self._first_token
            foreign = (rows < 0) | (rows >= self._weights.embedding.shape[0])
            embedded = self._weights.embedded(rows.masked_fill(foreign, 0))
            embedded = self._collective.all_reduce(embedded.masked_fill_(foreign.unsqueeze(-1), 0))
        if scale == 1.0:
            return embedded
        return embedded * torch.tensor(scale, dtype=self.dtype, device=self.device)  # rounded first, as in training

    def _before_attention(
        self, index: int, hidden: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Layer `index`: q `[T, heads, d_k]`, k `[T, kv_heads, d_k]` and v `[T, kv_heads, d_v]` from hidden `[T,
        hidden_size]`; q and k are wider in a layer with an index."""
        layer = self._weights.layers[index]
        return project(self.config, layer, self._entering(layer, hidden), rotation)

    def _before_query(self, index: int, hidden: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer `index`: q alone, and the normed hidden that k and v are computed from."""
        normed = self._entering(self._weights.layers[index], hidden)
        return self._query(index, normed, rotation), normed

    def _query(self, index: int, normed: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        layer = self._weights.layers[index]
        projected = self._half(index, 0)(normed)
        return split(self.config, layer, projected, self.config.num_attention_heads, 0, rotation)[0]

    def _keys_values(self, index: int, normed: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer `index`: what `_before_query` has left to do."""
        layer = self._weights.layers[index]
        projected = self._half(index, 1)(normed)
        return split(self.config, layer, projected, 0, self.config.num_key_value_heads, rotation)[1:]

    def _half(self, index: int, which: int) -> Linear:
        halves = self._weights.layers[index].qkv.halves
        if halves is None:
            raise ValueError(f"the projections of layer {index} were not split, which forward does for query_first")
        return halves[which]

    def _after_attention(self, index: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The residual stream that leaves layer `index`, `[n, hidden_size]` as `hidden`, which entered it.

        attended: `[n, heads, d]` or `[n, heads * d]`.
        """
        layer, family = self._weights.layers[index], self.config.family
        joined: list[torch.Tensor] = []  # what the mixer has given that joins this one
        if hidden.shape[1] > self.config.hidden_size:
            hidden, *joined = (part.contiguous() for part in hidden.split(self.config.hidden_size, -1))
        attended = attended.flatten(1) if layer.latent is None else layer.latent.values(attended)
        if layer.gate is not None or family.normed_stream or family.norms.parallel:
            normed = self._norm(hidden, layer.input_norm)
            hidden = normed if family.normed_stream else hidden
            attended = attended if layer.gate is None else layer.gate(attended, normed, self._total)
        delta = self._added(layer.output(attended), layer.attended_norm, layer.residual)
        if layer.joins:
            return torch.cat((hidden, delta), -1)
        delta = sum(joined, delta)
        hidden = self._kept(hidden, layer.residual)
        for weights in layer.mlps:
            if family.norms.parallel:
                hidden = hidden + delta
            else:
                normed, hidden = self._add(delta, hidden, weights.norm)
            hidden = self._kept(normed if family.normed_stream else hidden, weights.residual)
            delta = self._added(weights.mlp(normed), weights.norm_behind, weights.residual)
        return hidden + delta

    def _add(
        self, delta: torch.Tensor, hidden: torch.Tensor, norm: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the sum, and the sum."""
        if self.config.family.norm == "rms" and norm is not None:
            return add_rms_norm(delta, hidden, norm, self.config.rms_norm_eps)
        hidden = hidden + delta
        return self._norm(hidden, norm), hidden

    def _entering(self, layer: MixerWeights, hidden: torch.Tensor) -> torch.Tensor:
        """What a mixer reads of what enters it."""
        if hidden.shape[1] > self.config.hidden_size:
            hidden = hidden[:, : self.config.hidden_size].contiguous()
        return self._norm(hidden, layer.input_norm)

    def _added(self, delta: torch.Tensor, norm: torch.Tensor | None, residual: tuple[float, float]) -> torch.Tensor:
        """What a mixer or an MLP adds to the residual stream: the sum over ranks, normed and scaled."""
        delta = self._norm(self._total(delta), norm)
        return delta if residual[1] == 1.0 else delta * residual[1]

    def _kept(self, hidden: torch.Tensor, residual: tuple[float, float]) -> torch.Tensor:
        return hidden if residual[0] == 1.0 else hidden * residual[0]

    def _total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        return part if self._collective is None else self._collective.all_reduce(part)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """x: `[n, d]`; itself where there is no norm."""
        if weight is None:
            return x
        norm = rms_norm if self.config.family.norm == "rms" else layer_norm
        return norm(x, weight, self.config.rms_norm_eps)
