"""Scores of KV heads that need no gradients, and the choice of policies by what is measured.

A head with a high score looks far back for what matters, so it should see everything. `echo_and_induction` scores the
attention to earlier repeats of a text, `mean_attention` the place that a mean query looks at. A KV head's score is the
largest of its query heads'. All are float64 `[layers, kv_heads]`.

`choose` goes from evidence to a choice: from candidates in order of what they keep to the least that is measured to be
good enough. The caller gives the functions that measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lamina.measure.calibration.capture import Captured
from lamina.measure.calibration.quality import Quality, Target
from lamina.policy_file import Heads
from lamina_kernels.dense.dense import rotate
from lamina_workers.decoder.rope import Rotary
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_config.rope_config import RopeConfig


@dataclass(frozen=True, slots=True)
class Trial:
    """Policies that were tried, and what was measured."""

    heads: Heads
    quality: Quality


def choose(
    candidates: Sequence[Heads],
    measure: Callable[[Heads], Quality],
    target: Target,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Trial | None, list[Trial]]:
    """The candidate that keeps least of those found to meet the target, and all that were tried.

    Bisection: it takes candidates in order of what they keep, and that more keeps quality. The last, full everywhere,
    is not tried; None says that none before it was found good enough.
    """
    low, high = 0, len(candidates) - 1
    rounds = max(1, (high - low).bit_length())
    best: Trial | None = None
    trials: list[Trial] = []
    while low < high:
        middle = (low + high) // 2
        trial = Trial(candidates[middle], measure(candidates[middle]))
        trials.append(trial)
        if target.met(trial.quality):
            best, high = trial, middle
        else:
            low = middle + 1
        report(len(trials), max(rounds, len(trials)))
    return best, trials


Scores = npt.NDArray[np.float64]

_MEAN_LENGTH = 500  # tokens over which the mean query looks at the mean key (kvpress)


def echo_and_induction(
    layers: Sequence[Captured], queries: Sequence[int], unit: int, scale: float
) -> tuple[Scores, Scores]:
    """The attention that queries at positions `queries` of a text that repeats every `unit` tokens pay to their own
    token in earlier repeats, and to the token after it (RazorAttention, arXiv 2407.15891, section 3.3). Means over the
    queries.

    Raises ValueError where a query lies in the first repeat, or its last place to look at beyond itself.
    """
    if unit < 2 or not queries or min(queries) < unit:
        raise ValueError(
            f"queries from {min(queries, default=0)} on, unit {unit}; allowed are units from 2, queries from it on"
        )
    positions = torch.tensor(queries)
    scores = np.zeros((2, len(layers), layers[0].k.shape[0]))
    for number, layer in enumerate(layers):
        keys = torch.arange(layer.k.shape[1])
        age = positions.unsqueeze(1) - keys
        earlier = (age > 0) & (age % unit == 0), (age > 0) & ((age + 1) % unit == 0)
        for head in range(layer.k.shape[0]):
            logits = (layer.q[head] * scale).float() @ layer.k[head].float().T  # [group, queries, keys]
            weights = torch.softmax(logits.masked_fill(age < 0, -torch.inf), -1)
            for kind, where in enumerate(earlier):
                scores[kind, number, head] = float((weights * where).sum(-1).mean(-1).max())
    return scores[0], scores[1]


def mean_attention(config: ModelConfig, layers: Sequence[Captured], queries: Sequence[int]) -> Scores:
    """The area under the cumulated attention of a head's mean query over its mean key at `_MEAN_LENGTH` positions:
    near 1 where it looks at the beginning, near 0 where it looks at what is next to it (the gradient-free score of
    kvpress' DuoAttentionPress).

    `queries` are the positions of the queries in `layers`, whose RoPE is taken off before the mean and put on after.
    """
    length = _MEAN_LENGTH
    scores = np.zeros((len(layers), layers[0].k.shape[0]))
    for number, layer in enumerate(layers):
        kv_heads, group = layer.q.shape[:2]
        of_q, of_k = layer.q.flatten(0, 1).transpose(0, 1).float(), layer.k.transpose(0, 1).float()
        rope, scale = config.layer_ropes()[number], config.layer_specs()[number].scale
        if rope is not None:
            of_q, of_k = _back(rope, of_q, queries), _back(rope, of_k, range(len(of_k)))
        q = of_q.mean(0).expand(length, -1, -1)
        k = of_k.mean(0).expand(length, -1, -1)
        if rope is not None:
            cos, sin = Rotary(rope, config.head_dim)(torch.arange(length), torch.full((length,), length))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        last = q[-1].view(kv_heads, group, -1)
        logits = torch.einsum("hgd,nhd->hgn", last, k) * scale
        area = torch.softmax(logits, -1).cumsum(-1).mean(-1)  # [kv_heads, group]
        scores[number] = area.amax(1).numpy()
    return scores


def _back(rope: RopeConfig, x: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
    """x `[n, heads, d]` as it was before RoPE turned it."""
    cos, sin = Rotary(rope, x.shape[-1])(torch.tensor(positions), torch.full((len(x),), max(positions) + 1))
    squared = cos.square() + sin.square()  # the scale's square, and 1 where nothing is turned
    return rotate(x, cos / squared, -sin / squared)


def ranks(scores: Scores) -> Scores:
    """Each score's rank among all, from 0 to 1; equal scores share the mean of their ranks."""
    flat = scores.reshape(-1)
    below = (flat[:, None] > flat).sum(1)
    ties = (flat[:, None] == flat).sum(1) - 1
    ranked: Scores = ((below + ties / 2) / max(1, flat.size - 1)).reshape(scores.shape)
    return ranked
