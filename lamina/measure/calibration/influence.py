"""How much the model's predictions change where a KV head sees less: the measure that windows are chosen by.

For queries at the end of a long text, all that a policy would take away is at hand: d = out(policy) - out(everything).
With g the gradient of the log-probability of tokens drawn from the model's own prediction, (g . d)^2 / 2 estimates the
KL divergence that d causes (the Fisher information is the KL's curvature). MoA (arXiv 2406.14909, section 3) takes the
first-order change of the loss, g . d, which is about 0 where a model has converged, and in which errors cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lamina.measure.calibration.capture import Captured, joined
from lamina.measure.calibration.scores import Scores
from lamina.measure.calibration.torch_path import TorchPath, attend
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import Policy


def influences(
    path: TorchPath,
    context: Sequence[Captured],
    token_ids: Sequence[int],
    policies: Sequence[Policy],
    samples: int = 2,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Estimated KL divergence in nats a token, float64 `[policies, layers, kv_heads]`, where one KV head follows a
    static policy for these queries, and the rest of the model sees everything.

    `context` has K and V of the tokens before `token_ids`, the queries judged. Each of `samples` is a backward pass
    with other tokens drawn. `report(done, total)` counts layers.
    """
    start, layers = context[0].k.shape[1], path.config.num_hidden_layers
    marks: list[torch.Tensor] = []
    changes: list[torch.Tensor] = []

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        spec = path.specs[layer]
        k, v = joined(context[layer], k, v)
        whole = attend(spec, Full(), q, k, v, start)
        with torch.no_grad():
            changes.append(torch.stack([attend(spec, policy, q, k, v, start) - whole for policy in policies]))
        marks.append(torch.zeros_like(q, requires_grad=True))
        report(layer + 1, layers * (1 + samples))
        return whole + marks[-1]

    logits = path.logits(path.hidden(torch.tensor(token_ids), attention, start))
    likelihood = torch.log_softmax(logits, -1)
    drawn_from = likelihood.detach().exp()
    generator = torch.Generator().manual_seed(seed)
    total = np.zeros((len(policies), layers, path.config.num_key_value_heads))
    for sample in range(samples):
        drawn = torch.multinomial(drawn_from, 1, generator=generator)
        gradients = torch.autograd.grad(likelihood.gather(1, drawn).sum(), marks, retain_graph=sample + 1 < samples)
        for layer, (gradient, change) in enumerate(zip(gradients, changes, strict=True)):
            moved = (change * gradient).float().sum((2, 4))  # over a group's heads and d: [policies, kv_heads, T]
            total[:, layer] += moved.square().mean(-1).double().numpy() / 2
        report(layers * (2 + sample), layers * (1 + samples))
    return total / samples
