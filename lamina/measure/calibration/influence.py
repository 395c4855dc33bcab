"""How much the model's predictions change where a KV head sees less: the measure that windows are chosen by.

For queries at the end of a long text, all that a policy would take away is at hand: d = out(policy) - out(everything).
With g the gradient of the log-probability of tokens drawn from the model's own prediction, (g . d)^2 / 2 estimates the
KL divergence that d causes (the Fisher information is the KL's curvature). MoA (arXiv 2406.14909, section 3) takes the
first-order change of the loss, g . d, which is about 0 where a model has converged, and in which errors cancel.

g . d needs no output of any policy. With w_k the weight of key k and c_k = w_k (g . v_k),

    g . d = sum of c over the keys seen / sum of w over the keys seen - sum of all c

so two cumulative sums over the keys give it for every window, and blocks of keys need no sums of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lamina.measure.calibration.capture import Captured, joined
from lamina.measure.calibration.scores import Scores
from lamina.measure.calibration.torch_path import TorchPath, attend
from lamina_kernels.dense.dense import soft_cap
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import Policy, within


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
    policy of windows for these queries, and the rest of the model sees everything.

    `context` has K and V of the tokens before `token_ids`, the queries judged. Each of `samples` is a backward pass
    with other tokens drawn. `report(done, total)` counts layers.
    """
    start, layers = context[0].k.shape[1], path.config.num_hidden_layers
    marks: list[torch.Tensor] = []
    tails: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tails.append((q.detach(), k.detach(), v.detach()))
        marks.append(torch.zeros_like(q, requires_grad=True))
        report(layer + 1, 2 * layers)
        return attend(path.specs[layer], Full(), q, *joined(context[layer], k, v), start) + marks[-1]

    logits = path.logits(path.hidden(torch.tensor(token_ids), attention, start))
    likelihood = torch.log_softmax(logits, -1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(likelihood.detach().exp(), samples, replacement=True, generator=generator)
    gradients = [
        torch.autograd.grad(likelihood.gather(1, each.unsqueeze(1)).sum(), marks, retain_graph=True)
        for each in drawn.unbind(1)
    ]
    del logits, likelihood
    found = np.zeros((len(policies), layers, path.config.num_key_value_heads))
    for layer, (q, k, v) in enumerate(tails):
        k, v = joined(context[layer], k, v)
        spec = path.specs[layer]
        seen = [_seen(within(policy, spec.window), start, q.shape[2]) for policy in policies]
        for head in range(len(k)):
            marked = torch.stack([gradient[layer][head] for gradient in gradients])
            found[:, layer, head] = _of_head(spec, q[head], k[head], v[head], marked, seen, start)
        report(layers + layer + 1, 2 * layers)
    return found


def _of_head(
    spec: LayerSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gradients: torch.Tensor,
    seen: Sequence[tuple[torch.Tensor, torch.Tensor]],
    start: int,
) -> list[float]:
    """The influence of each entry of `seen` in one KV head: q `[group, T, d]`, k and v `[start + T, d]`, gradients
    `[samples, group, T, d_v]`."""
    count = q.shape[1]
    scores = q @ k.T * spec.scale
    if spec.soft_cap is not None:
        scores = soft_cap(scores, spec.soft_cap)
    age = torch.arange(start, start + count).unsqueeze(1) - torch.arange(len(k))
    hidden = age < 0 if spec.window is None else (age < 0) | (age >= spec.window)
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    mass = _running(weights)  # [group, T, keys + 1]
    rows = torch.arange(count)
    total = np.zeros(len(seen))
    for gradient in gradients:
        change = _running(weights * (gradient @ v.T))
        for number, (sinks, first) in enumerate(seen):
            of_mass, of_change = (
                sums[..., -1] - sums[:, rows, first] + sums[:, rows, sinks] for sums in (mass, change)
            )
            moved = of_change / of_mass - change[..., -1]
            total[number] += float(moved.sum(0).square().mean()) / 2  # a group's heads move together
    return [float(each) for each in total / len(gradients)]


def _running(x: torch.Tensor) -> torch.Tensor:
    """Sums of the first 0, 1, ... entries of the last dimension, float64: small differences of them matter."""
    return torch.nn.functional.pad(x.cumsum(-1, dtype=torch.float64), (1, 0))


def _seen(policy: Policy, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each query, int64 `[count]`: how many first keys it sees, and the first key of its window, no less."""
    sinks, first = [], []
    for view in policy.views(start, count):
        at = torch.arange(view.start, view.start + view.count)
        first.append((at - view.window + 1).clamp(min=0))
        sinks.append(first[-1].clamp(max=view.sinks))
    return torch.cat(sinks), torch.cat(first)
