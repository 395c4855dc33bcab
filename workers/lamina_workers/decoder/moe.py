"""Mixture of experts: a router, and of many MLPs the few that each token takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamina_kernels.dense import Linear, silu_mul


class Mlp:
    """down(silu(gate(x)) * up(x)), gate and up as one linear map. x: `[n, hidden]` -> `[n, hidden]`."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(silu_mul(self.gate_up(x)))


class Experts:
    """Each token goes to its `top_k` most probable experts, weighted by those probabilities.

    `normalize` divides the weights by their sum. Weights and the sum over experts are float32; a token's experts are
    summed in their order, so the sum does not depend on which other tokens are in the batch.
    `experts` may be some of the router's, from number `first` on, or none: then the result is their part of the sum.
    """

    def __init__(self, router: Linear, experts: Sequence[Mlp], top_k: int, normalize: bool, first: int = 0) -> None:
        self._router = router
        self._first = first
        self._experts = experts
        self._top_k = top_k
        self._normalize = normalize

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[n, hidden]` -> `[n, hidden]`."""
        probability = torch.softmax(self._router(x).float(), -1)  # [n, experts]
        weight, chosen = probability.topk(self._top_k, -1)  # [n, top_k]
        if self._normalize:
            weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number in sorted(set(chosen.flatten().tolist())):
            if not 0 <= number - self._first < len(self._experts):
                continue
            expert = self._experts[number - self._first]
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, tokens, expert(x[tokens]).float() * weight[tokens, place].unsqueeze(-1))
        return out.to(x.dtype)
