"""The decoder: a forward pass that is a coroutine, cut at attention.

Knows tokens, positions and weights. Knows nothing of sequences, KV caches, holders or messages: it yields
queries, keys and values, and whoever drives it sends back what attention made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lamina_kernels.dense import Linear, add_rms_norm, rms_norm, split_heads
from lamina_workers.decoder_weights import DecoderWeights, LayerWeights, TensorSource, load_weights
from lamina_workers.model_config import ModelConfig
from lamina_workers.rope import Rotary


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
    """The queries of `layer`. q: `[T, heads, d_k]` in the decoder's dtype, rotated, not scaled."""

    layer: int
    q: torch.Tensor


@dataclass(frozen=True, slots=True)
class KeyValueReady:
    """The keys and values of `layer`. k: `[T, kv_heads, d_k]`, rotated; v: `[T, kv_heads, d_v]`.

    In answer to it the driver sends the attention output, `[T, heads, d_v]` or `[T, heads * d_v]`.
    """

    layer: int
    k: torch.Tensor
    v: torch.Tensor


Forward = Generator[QueryReady | KeyValueReady, torch.Tensor | None, torch.Tensor]


class Decoder:
    """A decoder-only transformer: embedding, layers, final norm, head.

    Nothing here needs gradients; run it under `torch.inference_mode()`.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.dtype = weights.norm.dtype
        self.device = weights.norm.device
        self._weights = weights
        self._rope = Rotary(config.rope, config.head_dim, self.device)
        self._halves: list[tuple[Linear, Linear]] = []  # the projections to q, and to k and v; where q comes first

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        checkpoint: TensorSource,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Decoder:
        """The decoder of a checkpoint, computing in `dtype` on `device`; see `load_weights` for the rest."""
        return cls(config, load_weights(config, checkpoint, dtype, torch.device(device), progress))

    def compute_query_first(self) -> bool:
        """From now on compute q before k and v, so that it can leave while they are computed. False: it cannot."""
        rows = self.config.num_attention_heads * self.config.head_dim
        halves = [layer.qkv.split(rows) for layer in self._weights.layers]
        self._halves = [half for half in halves if half is not None]
        return len(self._halves) == len(halves)

    def forward(self, batch: Batch, hidden: torch.Tensor | None = None, first_layer: int = 0) -> Forward:
        """Run `batch` from `first_layer` to the head; returns logits, float32 `[S, vocab_size]`.

        Per layer it yields QueryReady, then KeyValueReady, which is answered by `send(attention output)`.
        `hidden`, `[T, hidden_size]`, is the residual stream that enters `first_layer` (None: the embedding). It is
        all that lives across a layer, and is never changed in place, so a run can start again from it.
        """
        layers = self._weights.layers
        if not 0 <= first_layer < len(layers) or (hidden is None and first_layer):
            raise ValueError(f"first_layer is {first_layer}, allowed is 0 to {len(layers) - 1}, above 0 with hidden")
        if hidden is None:
            hidden = F.embedding(batch.token_ids, self._weights.embedding).to(self.dtype)
        angles = self._rope(batch.positions, batch.rope_lengths)
        for index in range(first_layer, len(layers)):
            layer = layers[index]
            rotation = angles if self.config.rotary[index] else None
            if self._halves:
                heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
                normed = rms_norm(hidden, layer.input_norm, self.config.rms_norm_eps)
                q, _, _ = self._split(layer, self._halves[index][0](normed), heads, 0, rotation)
                yield QueryReady(index, q)
                _, k, v = self._split(layer, self._halves[index][1](normed), 0, kv_heads, rotation)
            else:
                q, k, v = self._before_attention(layer, hidden, rotation)
                yield QueryReady(index, q)
            attended = yield KeyValueReady(index, k, v)
            if attended is None:
                raise ValueError(f"layer {index} needs the attention output sent in answer to KeyValueReady, got None")
            if index == len(layers) - 1:  # past the last attention, only the sampled tokens matter
                hidden, attended = hidden[batch.sampled], attended[batch.sampled]
            hidden = self._after_attention(layer, hidden, attended)
        return self._weights.head.float32(rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps))

    def _before_attention(
        self, layer: LayerWeights, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q `[T, heads, d]`, k and v `[T, kv_heads, d]` from hidden `[T, hidden_size]`."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = layer.qkv(rms_norm(hidden, layer.input_norm, self.config.rms_norm_eps))
        return self._split(layer, qkv, heads, kv_heads, rotation)

    def _split(
        self,
        layer: LayerWeights,
        projected: torch.Tensor,
        heads: int,
        kv_heads: int,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return split_heads(projected, heads, kv_heads, rotation, layer.qk_norms, self.config.rms_norm_eps)

    def _after_attention(self, layer: LayerWeights, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The residual stream that enters the next layer, `[n, hidden_size]` as `hidden`."""
        delta = layer.output(attended.flatten(1))
        normed, hidden = add_rms_norm(delta, hidden, layer.post_norm, self.config.rms_norm_eps)
        return hidden + layer.mlp(normed)
