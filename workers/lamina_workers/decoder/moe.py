"""Mixture of experts: a router, and of many MLPs the few that each token takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lamina_kernels.dense.dense import Linear, gelu_tanh_mul, silu_mul
from lamina_workers.model_config.mixers import MoeConfig


def relu2(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2: of an MLP without a gate."""
    return torch.relu(x).square()


GATINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu_mul,
    "gelu_tanh": gelu_tanh_mul,
    "relu2": relu2,
}
"""By `ModelConfig.activation`."""


class ClampedGate:
    """gpt-oss' gating: min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clamp(up, -limit, limit) + 1)."""

    def __init__(self, limit: float, alpha: float) -> None:
        self._limit = limit
        self._alpha = alpha

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: `[n, 2f]`, gate first -> `[n, f]`."""
        gate, up = gate_up.chunk(2, -1)
        gate, up = gate.clamp(max=self._limit), up.clamp(-self._limit, self._limit)
        return gate * torch.sigmoid(gate * self._alpha) * (up + 1)


class ScaledGate:
    """Another gating, with the gate multiplied by `scale` first (Falcon-H1)."""

    def __init__(self, gating: Callable[[torch.Tensor], torch.Tensor], scale: float) -> None:
        self._gating = gating
        self._scale = scale

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: `[n, 2f]`, gate first -> `[n, f]`."""
        gate, up = gate_up.chunk(2, -1)
        return self._gating(torch.cat((gate * self._scale, up), -1))


class Mlp:
    """down(gating(gate(x), up(x))), gate and up as one linear map, or without a gate up alone.

    x: `[n, hidden]` -> `[n, hidden]`.
    """

    def __init__(self, gate_up: Linear, down: Linear, gating: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.gate_up = gate_up
        self.down = down
        self.gating = gating

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gating(self.gate_up(x)))


class Router:
    """Chooses `top_k` experts for each token, as `MoeConfig` and its `choice` say. `bias`: float32 `[experts]`, added
    to sigmoid scores to choose."""

    def __init__(self, scores: Linear, moe: MoeConfig, bias: torch.Tensor | None = None) -> None:
        self._scores = scores
        self._moe = moe
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: `[n, hidden]` -> the weights, float32, and the numbers of the experts, both `[n, top_k]`."""
        moe, choice = self._moe, self._moe.choice
        logits = self._scores(x).float()  # [n, experts]
        scores = torch.sigmoid(logits) if choice.sigmoid else torch.softmax(logits, -1)
        ranked = scores if self._bias is None else scores + self._bias
        if choice.groups > 1:
            grouped = ranked.view(len(x), choice.groups, moe.experts // choice.groups)
            best = grouped.topk(2 if choice.sigmoid else 1, -1).values.sum(-1)
            others = best.topk(choice.groups - choice.top_groups, -1, largest=False).indices
            ranked = grouped.scatter(1, others.unsqueeze(-1).expand(-1, -1, grouped.shape[-1]), -torch.inf).flatten(1)
        chosen = ranked.topk(moe.top_k, -1).indices
        weight = scores.gather(1, chosen)
        if moe.normalize:
            weight = weight / weight.sum(-1, keepdim=True)
        return weight * choice.scale, chosen


class Experts:
    """Each token goes to the experts that its router chooses, weighted as that says.

    Weights and the sum over experts are float32; a token's experts are summed in their order, so the sum does not
    depend on which other tokens are in the batch.
    `experts` may be some of the router's, from number `first` on, or none: then the result is their part of the sum.
    `shared`: one more expert that every token takes, and the map whose sigmoid is its weight; without one it is 1.
    `latent`: the maps before and behind the experts, where those are of another width.
    """

    def __init__(
        self,
        router: Router,
        experts: Sequence[Mlp],
        first: int = 0,
        shared: tuple[Mlp, Linear | None] | None = None,
        latent: tuple[Linear, Linear] | None = None,
    ) -> None:
        self._router = router
        self._first = first
        self._experts = experts
        self._shared = shared
        self._latent = latent

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[n, hidden]` -> `[n, hidden]`."""
        weight, chosen = self._router(x)
        inner = x if self._latent is None else self._latent[0](x)
        out = torch.zeros(inner.shape, dtype=torch.float32, device=x.device)
        for number in sorted(set(chosen.flatten().tolist())):
            if not 0 <= number - self._first < len(self._experts):
                continue
            expert = self._experts[number - self._first]
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, tokens, expert(inner[tokens]).float() * weight[tokens, place].unsqueeze(-1))
        if self._latent is not None:
            out = self._latent[1](out.to(x.dtype)).float()
        if self._shared is not None:
            mlp, gate = self._shared
            out += mlp(x).float() if gate is None else torch.sigmoid(gate(x).float()) * mlp(x).float()
        return out.to(x.dtype)
