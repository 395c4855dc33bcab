"""DuoAttention's gates (arXiv 2410.10819, section 2.3): how much of full attention each KV head needs, trained.

    out = alpha * full + (1 - alpha) * streaming, one alpha a layer and KV head, from 1, clamped to [0, 1]
    loss = mean squared error of the final hidden states on the hidden words + 0.05 * mean |alpha|

AdamW, learning rate 0.02, no decay, rising over the first and falling over the last fifth of the steps; documents of
many lengths with needles at many depths. Two things are simpler than there, because it has to run on two cores. Keys
and values of a document come from the full model, once; the questions at its end alone are computed at each step. And a
step asks for one needle of a document, where the paper asks for all ten.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lamina.measure.calibration.capture import Captured, joined
from lamina.measure.calibration.data import Passkeys
from lamina.measure.calibration.scores import Scores
from lamina.measure.calibration.torch_path import Attention, TorchPath, attend
from lamina_workers.policies.full import Full
from lamina_workers.policies.streaming import Streaming

RATE = 0.02
PENALTY = 0.05
RAMP = 0.2  # of the steps, at each end


@dataclass(frozen=True, slots=True)
class Gates:
    """alpha float64 `[layers, kv_heads]` in [0, 1], and the loss of each step."""

    alpha: Scores
    losses: tuple[float, ...]


def train(
    path: TorchPath,
    samples: Sequence[tuple[Passkeys, Sequence[Captured]]],
    steps: int,
    streaming: Streaming,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Gates:
    """Gates after so many steps, each on a question about one of `samples`: a document with needles, and its K and V.

    All questions come once, in random order, before any comes again. `report(done, total)` counts steps.
    """
    if steps < 1 or not samples:
        raise ValueError(f"{steps} steps on {len(samples)} samples; allowed are at least one of each")
    config = path.config
    alpha = torch.ones(config.num_hidden_layers, config.num_key_value_heads, requires_grad=True)
    optimiser = torch.optim.AdamW([alpha], lr=RATE, weight_decay=0.0)
    questions = [(number, asked) for number, (hidden, _) in enumerate(samples) for asked in range(len(hidden.answers))]
    generator = random.Random(seed)
    order: list[tuple[int, int]] = []
    targets: dict[tuple[int, int], torch.Tensor] = {}
    losses = []
    for step in range(steps):
        order = order or generator.sample(questions, len(questions))
        number, asked = order.pop()
        hidden, context = samples[number]
        question = hidden.question(asked)
        first, end = question.answers[0]
        tail, start = torch.tensor(question.tail[: end - 1]), len(question.document)
        if (number, asked) not in targets:
            with torch.no_grad():
                targets[number, asked] = path.hidden(tail, _whole(path, context, start), start)[first - 1 :]
        for group in optimiser.param_groups:
            group["lr"] = RATE * ramp(step, steps)
        with torch.no_grad():
            alpha.clamp_(0, 1)
        given = path.hidden(tail, _gated(path, context, start, alpha, streaming), start)[first - 1 :]
        loss = (given - targets[number, asked]).float().square().mean() + PENALTY * alpha.abs().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        report(step + 1, steps)
    return Gates(alpha.detach().clamp(0, 1).double().numpy(), tuple(losses))


def ramp(step: int, steps: int) -> float:
    """The part of the learning rate at a step: linear up, flat, linear down."""
    length = max(1.0, RAMP * steps)
    return min(1.0, (step + 1) / length, (steps - step) / length)


def _whole(path: TorchPath, context: Sequence[Captured], start: int) -> Attention:
    """Everything attends everything: what the gates are to keep up with."""

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(path.specs[layer], Full(), q, *joined(context[layer], k, v), start)

    return attention


def _gated(
    path: TorchPath, context: Sequence[Captured], start: int, alpha: torch.Tensor, streaming: Streaming
) -> Attention:
    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        spec, gate = path.specs[layer], alpha[layer].view(-1, 1, 1, 1).to(q.dtype)
        k, v = joined(context[layer], k, v)
        full = attend(spec, Full(), q, k, v, start)
        return gate * full + (1 - gate) * attend(spec, streaming, q, k, v, start)

    return attention
