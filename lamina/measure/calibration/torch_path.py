"""The model in plain torch, differentiable with respect to what attention gives: for calibration, not for serving.

It computes one sequence at a time. The weights are frozen; gradients flow to the outputs of the `Attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lamina_protocols.messages import LayerSpec
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.decoder_weights import TensorSource, check_tensors, tensor_shapes
from lamina_workers.decoder.rope import Rotary
from lamina_workers.errors import UnsupportedModelError
from lamina_workers.policies.policy import Policy, within

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q `[kv_heads, group, T, d]`, k and v `[kv_heads, T, d]`, rotated) -> what attention gives, shaped as q."""

_BLOCK = 256  # queries that are attended together under a policy


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights as the checkpoint names them, `[n_out, n_in]`; biases `[n_out]` or None."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class TorchPath:
    """A decoder in float32 as one function of token ids and of an `Attention`.

    Raises UnsupportedModelError for mixtures of experts, ModelFileError where `source` is not this config's.
    """

    def __init__(self, config: ModelConfig, source: TensorSource) -> None:
        if config.moe is not None:
            raise UnsupportedModelError("gating and spans need a model without experts; this one has them")
        head = "lm_head.weight"
        check_tensors(source, tensor_shapes(config), ignored={head} if config.tie_word_embeddings else set())
        self.config = config
        self.specs = config.layer_specs()

        def take(name: str) -> torch.Tensor:
            tensor = source.tensor(name).to(torch.float32)
            source.release(name)
            return tensor

        self._embedding = take("model.embed_tokens.weight")
        self._head = self._embedding if config.tie_word_embeddings else take(head)
        self._norm = take("model.norm.weight")
        self._layers = tuple(_load(config, take, layer) for layer in range(config.num_hidden_layers))
        self._rope = Rotary(config.rope, config.head_dim)

    def hidden(self, token_ids: torch.Tensor, attention: Attention, start: int = 0) -> torch.Tensor:
        """The normed final hidden states, `[T, hidden_size]`, of tokens `[T]` at positions start, start + 1, ...

        `attention` has the tokens before them.
        """
        hidden = F.embedding(token_ids, self._embedding)
        end = start + len(token_ids)
        lengths = torch.full((len(token_ids),), end) if self.config.rope.kind == "dynamic" else None
        angles = self._rope(torch.arange(start, end), lengths)
        for index, layer in enumerate(self._layers):
            rotation = angles if self.config.rotary[index] else None
            attended = attention(index, *self._before(layer, hidden, rotation))
            hidden = self._after(layer, hidden, attended)
        return F.rms_norm(hidden, self._norm.shape, self._norm, self.config.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 `[n, vocab_size]` from normed hidden states `[n, hidden_size]`."""
        return F.linear(hidden, self._head).float()

    def _before(
        self, layer: _Layer, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, ...]:
        config, eps = self.config, self.config.rms_norm_eps
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        normed = F.rms_norm(hidden, layer.input_norm.shape, layer.input_norm, eps)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(len(hidden), heads + 2 * kv_heads, config.head_dim)
        q, k, v = qkv.transpose(0, 1).split((heads, kv_heads, kv_heads))
        if layer.qk_norms is not None:
            q, k = (F.rms_norm(x, w.shape, w, eps) for x, w in zip((q, k), layer.qk_norms, strict=True))
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        return q.unflatten(0, (kv_heads, heads // kv_heads)), k, v

    def _after(self, layer: _Layer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        delta = F.linear(attended.flatten(0, 1).transpose(0, 1).flatten(1), layer.output, layer.output_bias)
        hidden = hidden + delta
        normed = F.rms_norm(hidden, layer.post_norm.shape, layer.post_norm, self.config.rms_norm_eps)
        gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
        return hidden + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)


def attend(
    spec: LayerSpec, policy: Policy, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int = 0
) -> torch.Tensor:
    """Attention as a static policy of that layer sees it, `[kv_heads, group, T, d]`, with a gradient.

    q `[kv_heads, group, T, d]` at positions start, ...; k and v `[kv_heads, start + T, d]` from position 0 on.
    """
    whole = within(policy, spec.window)
    group, count = q.shape[1], q.shape[2]
    pieces = []
    for first in range(0, count, _BLOCK):
        end = min(first + _BLOCK, count)
        index, mask = _visible(whole, start + first, start + end)
        keys, values = (x[:, index].unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
        pieces.append(F.scaled_dot_product_attention(q[:, :, first:end], keys, values, mask, scale=spec.scale))
    return torch.cat(pieces, 2)


def _visible(policy: Policy, start: int, end: int) -> tuple[torch.Tensor | slice, torch.Tensor]:
    """Which keys queries [start, end) may see, and which of them each does, bool `[end - start, keys]`."""
    sinks, seen_from = min(policy.sinks, start), policy.seen_from(start)
    keys = torch.cat([torch.arange(sinks), torch.arange(max(seen_from, sinks), end)])
    rows = []
    for view in policy.views(start, end - start):
        at = torch.arange(view.start, view.start + view.count).unsqueeze(1)
        seen = (keys <= at) & ((at - keys < view.window) | (keys < view.sinks))
        if view.listed is not None:
            seen &= torch.isin(keys, torch.tensor(view.listed))
        rows.append(seen)
    return slice(0, end) if len(keys) == end else keys, torch.cat(rows)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `lamina_kernels.dense.rotate`, for x `[heads, T, d]` and with a gradient; cos and sin are `[T, d / 2]`."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _load(config: ModelConfig, take: Callable[[str], torch.Tensor], layer: int) -> _Layer:
    at = f"model.layers.{layer}"

    def joined(*names: str, biased: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = torch.cat([take(f"{at}.{name}.weight") for name in names])
        return weight, torch.cat([take(f"{at}.{name}.bias") for name in names]) if biased else None

    qkv = joined(*(f"self_attn.{part}_proj" for part in "qkv"), biased=config.qkv_bias)
    output = joined("self_attn.o_proj", biased=config.o_bias)
    gate_up = joined("mlp.gate_proj", "mlp.up_proj", biased=config.mlp_bias)
    down = joined("mlp.down_proj", biased=config.mlp_bias)
    norms = None
    if config.qk_norm:
        norms = take(f"{at}.self_attn.q_norm.weight"), take(f"{at}.self_attn.k_norm.weight")
    input_norm, post_norm = take(f"{at}.input_layernorm.weight"), take(f"{at}.post_attention_layernorm.weight")
    return _Layer(input_norm, *qkv, norms, *output, post_norm, *gate_up, *down)
