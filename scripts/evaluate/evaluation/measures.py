"""How far one model's predictions and attention are from another's. Pure functions of tensors.

Logits are float32 `[n, vocab]`, one row a predicted token; targets int64 `[n]`. Everything is in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_ROWS = 64  # rows of logits that are turned into log-probabilities at a time: 64 * 50,000 * 4 bytes are 13 MB
_TINY = torch.finfo(torch.float32).tiny


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target) of each row, float32 `[n]`."""
    _same_rows(logits, targets)
    return torch.cat(
        [
            part.logsumexp(-1) - part.gather(-1, at.unsqueeze(-1)).squeeze(-1)
            for part, at in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
        ]
    )


def divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) = sum p log(p / q) of each row, float32 `[n]`; 0 where both are equal."""
    _same_rows(reference, other)
    parts = []
    for p, q in zip(reference.split(_ROWS), other.split(_ROWS), strict=True):
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)


def agreement(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Whether both find the same token likeliest, bool `[n]`."""
    _same_rows(reference, other)
    return reference.argmax(-1) == other.argmax(-1)


@dataclass(frozen=True, slots=True)
class Quality:
    """Predictions of a text beside those of the full cache.

    `nll` and `full_nll` are means over `tokens`; `change` is their difference and `relative` that over `full_nll`.
    `error` is the standard error of `change` over the tokens' own differences, taken as independent. `divergence` is
    the mean over tokens, `worst` the largest.
    """

    tokens: int
    nll: float
    full_nll: float
    change: float
    error: float
    relative: float
    divergence: float
    worst: float
    agreement: float


def quality(full: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> Quality:
    """Of `other`'s logits, beside `full`'s of the same tokens. At least two rows are needed."""
    if len(targets) < 2:
        raise ValueError(f"{len(targets)} tokens; at least 2 are needed for a standard error")
    of_full, of_other = negative_log_likelihood(full, targets), negative_log_likelihood(other, targets)
    changes = (of_other - of_full).double()
    full_nll, change = float(of_full.double().mean()), float(changes.mean())
    apart = divergence(full, other).double()
    return Quality(
        tokens=len(targets),
        nll=float(of_other.double().mean()),
        full_nll=full_nll,
        change=change,
        error=float(changes.std() / len(targets) ** 0.5),
        relative=change / full_nll if full_nll > 0 else 0.0,
        divergence=float(apart.mean()),
        worst=float(apart.max()),
        agreement=float(agreement(full, other).double().mean()),
    )


@dataclass(frozen=True, slots=True)
class Score:
    """Answers of a task, of which only those count that the full cache gives.

    `asked` answers were asked for, `full` of them the full cache gives, and `kept` of those the policy gives too.
    """

    asked: int
    full: int
    kept: int


def score(full: Sequence[bool], other: Sequence[bool]) -> Score:
    """Whether each answer is right, by the full cache and by another policy."""
    if len(full) != len(other):
        raise ValueError(f"{len(full)} and {len(other)} answers; allowed is the same number")
    return Score(len(full), sum(full), sum(a and b for a, b in zip(full, other, strict=True)))


def exact_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last position's query over all keys, by its definition in float32.

    q `[heads, d]`, k `[n, kv_heads, d]`, v `[n, kv_heads, d_v]`, the query's own last; `scale`, `window` and
    `soft_cap` as in `LayerSpec`. Returns the output `[heads, d_v]` and the weights `[heads, n]`.
    """
    heads, kv_heads = len(q), k.shape[1]
    if len(k) != len(v) or heads % kv_heads:
        raise ValueError(f"{heads} query heads, {len(k)} keys and {len(v)} values of {kv_heads} heads do not fit")
    grouped = q.float().view(kv_heads, heads // kv_heads, -1)
    logits = torch.einsum("hgd,nhd->hgn", grouped, k.float()) * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if window is not None and window < len(k):
        logits[..., : len(k) - window] = -torch.inf
    weights = logits.softmax(-1)
    out = torch.einsum("hgn,nhd->hgd", weights, v.float())
    return out.reshape(heads, -1), weights.reshape(heads, -1)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of each row of two `[heads, d]`, float32 `[heads]`; two rows of zeros count as equal."""
    a, b = a.float(), b.float()
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    both_zero = (a == 0).all(-1) & (b == 0).all(-1)
    similar = (a * b).sum(-1) / norms.clamp(min=_TINY)
    return torch.where(both_zero, torch.ones_like(similar), similar)


def relative_error(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """|other - exact| / |exact| of each row of two `[heads, d]`, float32 `[heads]`."""
    exact, other = exact.float(), other.float()
    difference: torch.Tensor = torch.linalg.vector_norm(other - exact, dim=-1)
    size: torch.Tensor = torch.linalg.vector_norm(exact, dim=-1)
    return difference / size.clamp(min=_TINY)


def _same_rows(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dim() != 2 or len(a) != len(b) or (b.dim() == 2 and a.shape != b.shape):
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}; allowed are [n, vocab] twice, or with [n]")
