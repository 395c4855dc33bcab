"""The one primitive: attention over any set of keys is a `Partial`, and partials merge.

For disjoint key sets with m = max(lse_i) and w_i = exp(lse_i - m):
out = sum(w_i * out_i) / sum(w_i), lse = m + log(sum(w_i)). The empty set is (0, -inf).
(FlashDecoding's split-KV reduction; "Attention as an RNN", arXiv 2405.13956, states the same operator.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Partial(NamedTuple):
    """Attention over a set of keys. out: `[n, d_v]` normalised over that set; lse: float32 `[n]`, natural log."""

    out: torch.Tensor
    lse: torch.Tensor


def empty(n: int, d_v: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Partial:
    """Attention over no keys at all: the identity of `merge`."""
    return Partial(
        torch.zeros(n, d_v, dtype=dtype, device=device),
        torch.full((n,), -torch.inf, dtype=torch.float32, device=device),
    )


def with_sinks(whole: Partial, sinks: torch.Tensor) -> torch.Tensor:
    """The output `[n, d_v]` of `whole`, attention over all keys, beside attention sinks: each query vector's head has
    one key more, whose logit is its sink and whose value is zeros.

    sinks: float32 `[heads]`, finite; vector i of `whole` is one of head i modulo heads. A sink is the partial
    (0, sink), so merging it multiplies out by exp(lse) / (exp(lse) + exp(sink)). It counts once, however many partials
    there are: this takes what they all merge to.
    """
    share = torch.sigmoid(whole.lse.view(-1, len(sinks)) - sinks)
    return (whole.out * share.view(-1, 1)).to(whole.out.dtype)


def merge(partials: Sequence[Partial]) -> Partial:
    """Merge partials over disjoint key sets, in order. All share n, d_v and the dtype of out, which is kept.

    Sums in float32. Empty partials are neutral, and only empties merge to the empty one.
    """
    if not partials:
        raise ValueError("merge needs at least one partial, got none")
    if len(partials) == 1:
        return partials[0]
    lse = torch.stack([p.lse for p in partials])  # [p, n]
    peak = lse.amax(0)
    shift = torch.where(torch.isinf(peak), torch.zeros_like(peak), peak)  # all empty: exp(-inf - 0) = 0, not NaN
    weight = torch.exp(lse - shift)
    total = weight.sum(0)
    scale = weight / torch.where(total == 0, torch.ones_like(total), total)
    out = sum((p.out.float() * s.unsqueeze(-1) for p, s in zip(partials, scale, strict=True)), torch.zeros(()))
    return Partial(out.to(partials[0].out.dtype), shift + torch.log(total))
