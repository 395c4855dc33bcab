"""Mixture of experts: a router, and of many MLPs the few that each token takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from lamina_kernels.dense import expert_loops
from lamina_kernels.dense.dense import Linear, gelu_tanh_mul, silu_mul
from lamina_kernels.dense.experts import Gating, Routed, Routing, stack
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
        self.limit = limit
        self.alpha = alpha

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: `[n, 2f]`, gate first -> `[n, f]`."""
        gate, up = gate_up.chunk(2, -1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(gate * self.alpha) * (up + 1)


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
        self.scores = scores
        self._moe = moe
        self._bias = bias

    @property
    def routing(self) -> Routing:
        """What kernels know of it."""
        moe, choice = self._moe, self._moe.choice
        groups = choice.groups, choice.top_groups
        return Routing(moe.experts, moe.top_k, moe.normalize, *groups, choice.sigmoid, choice.scale, self._bias)

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of logits, float32 `[n, experts]`: weights, float32, and the numbers of the experts, both `[n, top_k]`."""
        moe, choice = self._moe, self._moe.choice
        scores = torch.sigmoid(logits) if choice.sigmoid else torch.softmax(logits, -1)
        ranked = scores if self._bias is None else scores + self._bias
        if choice.groups > 1:
            grouped = ranked.view(len(logits), choice.groups, moe.experts // choice.groups)
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
    `shared`: one more expert that every token takes, and the map `[1, hidden]` whose sigmoid is its weight; without one
    it is 1. `latent`: the maps before and behind the experts, where those are of another width.
    `routed`: what kernels have of it, where all experts are packed alike, or in bfloat16.
    """

    def __init__(
        self,
        router: Router,
        experts: Sequence[Mlp],
        first: int = 0,
        shared: tuple[Mlp, torch.Tensor | None] | None = None,
        latent: tuple[Linear, Linear] | None = None,
    ) -> None:
        self._router = router
        self._first = first
        self._experts = experts
        self.shared = shared
        self.latent = latent
        self.routed = self._routed()
        self._touched, self._pairs = 0, 0  # besides what kernels have counted

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[n, hidden]` -> `[n, hidden]`."""
        logits = self._router.scores(x)
        inner = x if self.latent is None else self.latent[0](x)
        shared = None if self.shared is None else self.shared[0](x)
        gate = None if self.shared is None else self.shared[1]
        if self.routed is not None and self.routed.takes(len(x), x.dtype):
            if self.latent is None:
                return self.routed.run(inner, logits, shared).to(x.dtype)
            out = self.routed.run(inner, logits)
        else:
            out = self._one_by_one(inner, logits.float())
        if self.latent is not None:
            out = self.latent[1](out.to(x.dtype)).float()
        if shared is not None:
            out += shared.float() if gate is None else torch.sigmoid(F.linear(x, gate).float()) * shared.float()
        return out.to(x.dtype)

    def touched(self) -> tuple[int, int]:
        """Since the beginning: bytes of experts that were read, of each once a batch, and pairs of a token and an
        expert."""
        counts = [0, 0] if self.routed is None else self.routed.counts[:2].tolist()
        return (self._touched + counts[0]) * self.expert_bytes, self._pairs + counts[1]

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return self._experts[0].gate_up.nbytes + self._experts[0].down.nbytes if self._experts else 0

    def _one_by_one(self, inner: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weight, chosen = self._router.choose(logits)
        out = torch.zeros(inner.shape, dtype=torch.float32, device=inner.device)
        for number in sorted(set(chosen.flatten().tolist())):
            if not 0 <= number - self._first < len(self._experts):
                continue
            expert = self._experts[number - self._first]
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, tokens, expert(inner[tokens]).float() * weight[tokens, place].unsqueeze(-1))
            self._touched, self._pairs = self._touched + 1, self._pairs + len(tokens)
        return out

    def _routed(self) -> Routed | None:
        gating = _gating_of(self._experts[0].gating) if self._experts else None
        gate_up = stack([expert.gate_up.few_rows for expert in self._experts])
        down = stack([expert.down.few_rows for expert in self._experts])
        if gating is None or gate_up is None or down is None:
            return None
        gate = None if self.shared is None or self.shared[1] is None else self.shared[1].flatten()
        router = self._router
        return Routed(router.routing, gate_up, down, gating, self._first, router.scores.few_rows, gate)


def _gating_of(gating: Callable[[torch.Tensor], torch.Tensor]) -> Gating | None:
    """As kernels call it; None where they do not know it."""
    if isinstance(gating, ClampedGate):
        return Gating(expert_loops.CLAMPED, gating.limit, gating.alpha)
    kinds = {silu_mul: expert_loops.SILU, gelu_tanh_mul: expert_loops.GELU, relu2: expert_loops.RELU2}
    return Gating(kinds[gating]) if gating in kinds else None
