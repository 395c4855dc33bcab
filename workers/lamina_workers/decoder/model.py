"""The decoder: a forward pass that is a coroutine, cut at attention.

It yields queries, keys and values, and its driver sends back the attention output.

Between two yields stands one plain function of tensors: `_before_attention`, or `_after_attention`. Where a batch has
few rows and the machine can, both are one compiled program, a span from one attention to the next.
A rank of several has a decoder of its own heads, columns, experts and tokens. Its driver attends those heads only, and
the sums over ranks are made inside `_after_attention`. All ranks run the same batches in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lamina_kernels.cpu.spans import MAX_ROWS
from lamina_kernels.dense import Linear, add_rms_norm, rms_norm, split_heads
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.decoder_spans import decoder_spans
from lamina_workers.decoder.decoder_weights import DecoderWeights, LayerWeights, TensorSource, load_weights
from lamina_workers.decoder.rope import Rotary
from lamina_workers.decoder.shard import WHOLE, Shard, local, rank_shape

if TYPE_CHECKING:
    from lamina_workers.decoder.collective import Collective


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one forward pass, of any number of sequences.

    token_ids, positions: int64 `[T]`. sampled: int64 `[S]`, indices into the T tokens whose logits are wanted.
    rope_lengths: int64 `[T]`, per token the larger of its sequence's prompt length and its position + 1; needed by
    dynamic RoPE only, else None. All on the decoder's device.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    sampled: torch.Tensor
    rope_lengths: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class QueryReady:
    """The queries of `layer`. q: `[T, heads, d_k]` in the decoder's dtype, rotated, not scaled. `early`: k and v are
    computed when the pass goes on, else they are there already."""

    layer: int
    q: torch.Tensor
    early: bool = False


@dataclass(frozen=True, slots=True)
class KeyValueReady:
    """The keys and values of `layer`. k: `[T, kv_heads, d_k]`, rotated; v: `[T, kv_heads, d_v]`.

    In answer to it the driver sends the attention output, `[T, heads, d_v]` or `[T, heads * d_v]`. Or it goes on
    elsewhere with that and `hidden`, `[T, hidden_size]`, the residual stream that entered the layer.
    """

    layer: int
    k: torch.Tensor
    v: torch.Tensor
    hidden: torch.Tensor | None = None


Rotation = tuple[torch.Tensor, torch.Tensor] | None
"""cos and sin of the batch's positions, float32 `[T, d / 2]`; None in a layer without RoPE."""

Entering = tuple[torch.Tensor, ...]
"""What a span has made of the residual stream: q, k and v, or where q comes first the normed stream; of what leaves the
last layer the logits, or the normed stream. Empty: nothing yet."""

Forward = Generator[QueryReady | KeyValueReady, torch.Tensor | None, torch.Tensor]


class Decoder:
    """A decoder-only transformer: embedding, layers, final norm, head; or what one rank has of it.

    `config` is the rank's own, with its own heads (see `shard.local`). Nothing here needs gradients; run it under
    `torch.inference_mode()`.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        shard: Shard = WHOLE,
        collective: Collective | None = None,
    ) -> None:
        """config: of the whole model, `with_ranks`. collective: needed by a rank of several, and replaceable."""
        self.config = local(config, shard)
        self.shard = shard
        self.collective = collective
        shapes = [rank_shape(config, Shard(rank, shard.ranks)) for rank in range(shard.ranks)]
        self._widths = [len(shape.vocabulary) for shape in shapes]  # of each rank's logits
        self._first_token = shapes[shard.rank].vocabulary.start
        self._split_embedding = len(weights.embedding) < config.vocab_size
        self.dtype = weights.norm.dtype
        self.device = weights.norm.device
        self._weights = weights
        self._rope = Rotary(config.rope, config.head_dim, self.device)
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
    ) -> Decoder:
        """The decoder of a checkpoint, computing in `dtype` on `device`; see `load_weights` for the rest."""
        weights = load_weights(config, checkpoint, dtype, torch.device(device), progress, shard, split_embedding)
        return cls(config, weights, shard, collective)

    @property
    def collective(self) -> Collective | None:
        """This rank's end of the group; None where it is the only one. May be replaced between two batches."""
        return self._collective

    @collective.setter
    def collective(self, collective: Collective | None) -> None:
        given = (collective.rank, collective.ranks) if collective is not None else (0, 1)
        if given != (self.shard.rank, self.shard.ranks):
            raise ValueError(
                f"rank {self.shard.rank} of {self.shard.ranks} got a collective of rank {given[0]} of {given[1]}"
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

        Per layer it yields QueryReady, then KeyValueReady, which is answered by `send(attention output)`.
        `hidden`, `[T, hidden_size]`, is the residual stream that enters `first_layer` (None: the embedding). It is
        all that lives across a layer, and is never changed in place, so a run can start again from it.
        Raises RankLost where another rank is gone.
        """
        layers = self._weights.layers
        if not 0 <= first_layer < len(layers) or (hidden is None and (first_layer or attended is not None)):
            raise ValueError(f"first_layer is {first_layer}, allowed is 0 to {len(layers) - 1}, above 0 with hidden")
        if query_first and True not in self._spans:
            self._split_projections()
        if hidden is None:
            hidden = self._embed(batch.token_ids)
        angles = self._rope(batch.positions, batch.rope_lengths)
        entering: Entering = ()
        if attended is None and not first_layer:
            hidden, entering = self._span(0, hidden, None, angles, query_first)
        for index in range(first_layer, len(layers)):
            if attended is None:
                attended = yield from self._to_attention(index, hidden, angles, entering, query_first)
            if index == len(layers) - 1:  # past the last attention, only the sampled tokens matter
                hidden, attended = hidden[batch.sampled], attended[batch.sampled]
            hidden, entering = self._span(index + 1, hidden, attended, angles, query_first)
            attended = None
        logits = self._logits(hidden, entering)
        if self._collective is None:
            return logits
        whole = self._collective.gather_columns(logits, self._widths)
        return logits.new_empty(0, self.config.vocab_size) if whole is None else whole

    def _split_projections(self) -> None:
        """Make it possible to compute q alone."""
        rows = self.config.num_attention_heads * self.config.head_dim
        for layer in self._weights.layers:
            layer.qkv.split(rows)
        plain = self._spans[False]
        self._spans[True] = None if plain is None else decoder_spans(self.config, self._weights, query_first=True)

    def _span(
        self,
        index: int,
        hidden: torch.Tensor,
        attended: torch.Tensor | None,
        angles: tuple[torch.Tensor, torch.Tensor],
        query_first: bool,
    ) -> tuple[torch.Tensor, Entering]:
        """The residual stream that enters layer `index`, or the end, and what a span has made of it.

        hidden, attended: of the layer before; layer 0 has None, and `hidden` enters that itself.
        """
        spans = self._spans[query_first]
        if spans is None or not 0 < len(hidden) <= MAX_ROWS:
            return hidden if attended is None else self._after_attention(index - 1, hidden, attended), ()
        rotary = index < len(self.config.rotary) and self.config.rotary[index]
        hidden, *entering = spans.run(index, hidden, attended, angles if rotary else None)
        return hidden, tuple(entering)

    def _logits(self, hidden: torch.Tensor, entering: Entering) -> torch.Tensor:
        """Float32 `[n, vocab]`, of the rank's part of the vocabulary."""
        (result,) = entering or (rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps),)
        if entering and result.dtype == torch.float32:  # a span's normed stream is bfloat16
            return result
        return self._weights.head.float32(result)

    def _to_attention(
        self,
        index: int,
        hidden: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        entering: Entering,
        query_first: bool,
    ) -> Generator[QueryReady | KeyValueReady, torch.Tensor | None, torch.Tensor]:
        """The attention output of layer `index`, which `hidden` enters."""
        rotation = angles if self.config.rotary[index] else None
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
        attended = yield KeyValueReady(index, k, v, hidden)
        if attended is None:
            raise ValueError(f"layer {index} needs the attention output sent in answer to KeyValueReady, got None")
        return attended

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The residual stream that enters layer 0, `[T, hidden_size]`."""
        if not self._split_embedding or self._collective is None:
            return F.embedding(token_ids, self._weights.embedding).to(self.dtype)
        rows = token_ids - self._first_token
        foreign = (rows < 0) | (rows >= len(self._weights.embedding))
        found = F.embedding(rows.masked_fill(foreign, 0), self._weights.embedding).to(self.dtype)
        return self._collective.all_reduce(found.masked_fill_(foreign.unsqueeze(-1), 0))

    def _before_attention(
        self, index: int, hidden: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Layer `index`: q `[T, heads, d]`, k and v `[T, kv_heads, d]` from hidden `[T, hidden_size]`."""
        layer = self._weights.layers[index]
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = layer.qkv(rms_norm(hidden, layer.input_norm, self.config.rms_norm_eps))
        return self._split(layer, qkv, heads, kv_heads, rotation)

    def _before_query(self, index: int, hidden: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer `index`: q alone, and the normed hidden that k and v are computed from."""
        normed = rms_norm(hidden, self._weights.layers[index].input_norm, self.config.rms_norm_eps)
        return self._query(index, normed, rotation), normed

    def _query(self, index: int, normed: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        layer = self._weights.layers[index]
        q, _, _ = self._split(layer, self._half(index, 0)(normed), self.config.num_attention_heads, 0, rotation)
        return q

    def _keys_values(self, index: int, normed: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer `index`: what `_before_query` has left to do."""
        layer = self._weights.layers[index]
        _, k, v = self._split(layer, self._half(index, 1)(normed), 0, self.config.num_key_value_heads, rotation)
        return k, v

    def _half(self, index: int, which: int) -> Linear:
        halves = self._weights.layers[index].qkv.halves
        if halves is None:
            raise ValueError(f"the projections of layer {index} were not split, which forward does for query_first")
        return halves[which]

    def _after_attention(self, index: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The residual stream that leaves layer `index`, `[n, hidden_size]` as `hidden`, which entered it.

        attended: `[n, heads, d]` or `[n, heads * d]`.
        """
        layer, collective = self._weights.layers[index], self._collective
        delta = layer.output(attended.flatten(1))
        if collective is not None:
            delta = collective.all_reduce(delta)
        normed, hidden = add_rms_norm(delta, hidden, layer.post_norm, self.config.rms_norm_eps)
        delta = layer.mlp(normed)
        if collective is not None:
            delta = collective.all_reduce(delta)
        return hidden + delta

    def _split(
        self,
        layer: LayerWeights,
        projected: torch.Tensor,
        heads: int,
        kv_heads: int,
        rotation: Rotation,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return split_heads(projected, heads, kv_heads, rotation, layer.qk_norms, self.config.rms_norm_eps)
