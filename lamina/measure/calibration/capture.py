"""What the real decoder makes of a prompt, for calibration and not for serving.

`capture` gives queries, keys and values of a prompt, which scores and searches look at.

`TorchPath` is the decoder as a function that is differentiable with respect to what attention gives. It computes one
sequence at a time. The weights are frozen; gradients flow to the outputs of the `Attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from lamina.measure.probe import Probe
from lamina_kernels.dense.dense import Linear, soft_cap
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.checkpoints.checkpoint import TensorSource
from lamina_workers.decoder.decoder_weights import load_weights
from lamina_workers.decoder.model import Batch, Decoder, QueryReady, StateReady
from lamina_workers.errors import UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.policies.policy import Policy, within

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q `[kv_heads, group, T, d_k]`, k and v `[kv_heads, T, d_k or d_v]`, rotated) -> what attention gives, shaped
as q but `d_v` wide."""

_BLOCK = 256  # queries that are attended together under a policy


class TorchPath:
    """A decoder in float32 as one function of token ids and of an `Attention`, with gradients.

    Raises ModelFileError where `source` is not this config's, UnsupportedModelError for attention that is not plain.
    """

    def __init__(self, config: ModelConfig, source: TensorSource) -> None:
        others = {
            "states": config.states,
            "attention sinks": config.sinks,
            "latents": config.latent,
            "an index": config.index,
        }
        for name, value in others.items():
            if value:
                raise UnsupportedModelError(f"gates and influence need a model of plain attention; this one has {name}")
        self.config = config
        self.specs = config.layer_specs()
        weights = load_weights(config, source, torch.float32, torch.device("cpu"))
        self._decoder = Decoder(config, weights)
        plain = replace(config, logit_scale=1.0, logit_soft_cap=None)
        self._trunk = Decoder(plain, replace(weights, head=_Identity(weights.norm.unsqueeze(0))))

    def hidden(self, token_ids: torch.Tensor, attention: Attention, start: int = 0) -> torch.Tensor:
        """The normed final hidden states, `[T, hidden_size]`, of tokens `[T]` at positions start, start + 1, ...

        `attention` has the tokens before them.
        """
        count = len(token_ids)
        lengths = torch.full((count,), start + count)
        forward = self._trunk.forward(
            Batch(token_ids, torch.arange(start, start + count), torch.arange(count), lengths)
        )
        event, q = next(forward), torch.empty(0)
        try:
            while True:
                if isinstance(event, QueryReady):
                    q, event = event.q, next(forward)
                    continue
                if isinstance(event, StateReady):
                    raise TypeError(f"layer {event.layer} keeps a state")
                group = self.specs[event.layer].group
                queries = q.transpose(0, 1).unflatten(0, (-1, group))
                attended = attention(event.layer, queries, event.k.transpose(0, 1), event.v.transpose(0, 1))
                event = forward.send(attended.flatten(0, 1).transpose(0, 1))
        except StopIteration as end:
            states: torch.Tensor = end.value
            return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 `[n, vocab_size]` from normed hidden states `[n, hidden_size]`."""
        return self._decoder.head(hidden)


class _Identity(Linear):
    """Stands in for the head, where hidden states are wanted."""

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        return x


def attend(
    spec: LayerSpec, policy: Policy, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int = 0
) -> torch.Tensor:
    """Attention as a static policy of that layer sees it, `[kv_heads, group, T, d]`, with a gradient.

    q `[kv_heads, group, T, d]` at positions start, ...; k and v `[kv_heads, start + T, d]` from position 0 on.
    """
    bounded = within(policy, spec.window)
    group, count = q.shape[1], q.shape[2]
    pieces = []
    for first in range(0, count, _BLOCK):
        end = min(first + _BLOCK, count)
        index, mask = _visible(bounded, start + first, start + end)
        keys, values = (x[:, index].unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
        queries = q[:, :, first:end]
        if spec.soft_cap is None:
            pieces.append(F.scaled_dot_product_attention(queries, keys, values, mask, scale=spec.scale))
        else:
            scores = soft_cap(queries @ keys.transpose(-1, -2) * spec.scale, spec.soft_cap)
            pieces.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values)
    return torch.cat(pieces, 2)


def _visible(policy: Policy, start: int, end: int) -> tuple[torch.Tensor | slice, torch.Tensor]:
    """Which keys queries [start, end) may see, and which of them each does, bool `[end - start, keys]`."""
    seen_from = policy.seen_from(start)
    stay = torch.from_numpy(policy.stays(np.arange(seen_from)))
    keys = torch.cat([stay.nonzero().squeeze(1), torch.arange(seen_from, end)])
    rows = []
    for view in policy.views(start, end - start):
        positions = torch.arange(view.start, view.start + view.count).unsqueeze(1)
        mask = (positions - keys < view.window) | (keys < view.sinks)
        if view.ranges is not None:
            first, stop = torch.from_numpy(view.ranges.T.copy()).unsqueeze(2)
            mask = ((first <= keys) & (keys < stop)).any(0)
        visible = (keys <= positions) & mask
        rows.append(visible)
    return slice(0, end) if len(keys) == end else keys, torch.cat(rows)


@dataclass(frozen=True, slots=True)
class Captured:
    """One layer, rotated, not scaled, in the decoder's dtype. q `[kv_heads, group, n, d]` of the queries asked for,
    k and v `[kv_heads, T, d]` of all tokens."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def capture(
    probe: Probe,
    token_ids: Sequence[int],
    queries: Sequence[int] = (),
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Captured]:
    """Feed a prompt, and keep K and V of each layer and the queries at positions `queries`, which ascend.

    `report(done, total)` counts tokens.
    """
    config, total = probe.model, len(token_ids)
    kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    positions = torch.tensor(queries, dtype=torch.int64)
    layers: list[Captured] = []
    handle, tokens_fed = probe.open(), 0

    def tap(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        nonlocal tokens_fed
        first, end = tokens_fed, tokens_fed + len(q)
        if layer == len(layers):
            kv = [torch.empty(kv_heads, total, x.shape[-1], dtype=q.dtype) for x in (k, v)]
            layers.append(Captured(torch.empty(kv_heads, group, len(positions), config.head_dim, dtype=q.dtype), *kv))
        into = layers[layer]
        low, high = (int(torch.searchsorted(positions, edge)) for edge in (first, end))
        if low < high:
            into.q[:, :, low:high] = q[positions[low:high] - first].unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
        into.k[:, first:end], into.v[:, first:end] = k.transpose(0, 1), v.transpose(0, 1)
        if layer == config.num_hidden_layers - 1:
            tokens_fed = end
            report(end, total)

    probe.prefill(handle, token_ids, tap=tap)
    probe.close(handle)
    return layers


def joined(context: Captured, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a context and of the tokens after it, `[kv_heads, T, d]`, in the dtype of the latter."""
    return torch.cat([context.k.to(k.dtype), k], 1), torch.cat([context.v.to(v.dtype), v], 1)
