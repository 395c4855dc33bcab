"""Queries, keys and values of a prompt, as the real decoder makes them: what scores and searches look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lamina.measure.probe import Probe


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
    wanted = torch.tensor(queries, dtype=torch.int64)
    layers: list[Captured] = []
    handle, at = probe.open(), 0

    def tap(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        nonlocal at
        first, end = at, at + len(q)
        if layer == len(layers):
            kept = [torch.empty(kv_heads, total, x.shape[-1], dtype=q.dtype) for x in (k, v)]
            layers.append(Captured(torch.empty(kv_heads, group, len(wanted), config.head_dim, dtype=q.dtype), *kept))
        into = layers[layer]
        low, high = (int(torch.searchsorted(wanted, at)) for at in (first, end))
        if low < high:
            into.q[:, :, low:high] = q[wanted[low:high] - first].unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
        into.k[:, first:end], into.v[:, first:end] = k.transpose(0, 1), v.transpose(0, 1)
        if layer == config.num_hidden_layers - 1:
            at = end
            report(end, total)

    probe.prefill(handle, token_ids, tap=tap)
    probe.close(handle)
    return layers


def joined(context: Captured, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a context and of the tokens after it, `[kv_heads, T, d]`, in the dtype of the latter."""
    return torch.cat([context.k.to(k.dtype), k], 1), torch.cat([context.v.to(v.dtype), v], 1)
