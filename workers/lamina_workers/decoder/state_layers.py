"""What a model worker computes of a layer that keeps a state, and of gates on a mixer's output.

The states themselves, and the convolution before them, are at the holders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lamina_kernels.dense.dense import Linear, compiled
from lamina_kernels.dense.gate_loops import gate_output, recurrence_gates
from lamina_kernels.states.operands import StateConstants

Map = Callable[[torch.Tensor], torch.Tensor]
Sum = Callable[[torch.Tensor], torch.Tensor]
"""The sum of a tensor over all ranks."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """Two maps, one behind the other."""

    down: Linear
    up: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


@dataclass(frozen=True, slots=True)
class OutputGate:
    """What a mixer's output is multiplied by: sigmoid or SiLU of a map of the stream that the mixer has read."""

    map: Map | None
    """It has as many outputs as the mixer; None: there is no gate."""
    activation: Map
    norm: torch.Tensor | None = None
    """`[width]`, the weights of a norm over each `group` numbers of the output; None: there is none."""
    group: int = 0
    norm_size: int = 0
    """The numbers that are normed together, where other ranks have some of them; else `group`."""
    first: bool = True
    """The norm is before the gate."""
    eps: float = 0.0
    scale: float = 1.0
    """It multiplies what the map gives."""

    @property
    def fuses(self) -> bool:
        """Whether one kernel does what follows the map: nothing is scaled, and normed before the gate, on one rank."""
        computed = self.activation in (torch.sigmoid, F.silu) and self.scale == 1.0
        return computed and (self.norm is None or (self.first and self.norm_size == self.group))

    def __call__(self, out: torch.Tensor, stream: torch.Tensor, total: Sum | None) -> torch.Tensor:
        """out, the mixer's output: `[n, width]`; stream: `[n, hidden_size]`. -> `[n, width]`, in the dtype of `out`.

        `total` is needed where other ranks have some of the numbers that are normed together.
        """
        if self.map is not None and self.fuses and compiled(out):
            return gate_output(out, self.map(stream), self.norm, self.group, self.eps, self.activation is F.silu)
        result = out.float()
        factor = None if self.map is None else self.activation(self.map(stream).float() * self.scale)
        if self.norm is None or not self.first:
            result = result if factor is None else result * factor
        if self.norm is not None:
            result = self._normed(result, total)
            if self.first and factor is not None:
                result = result * factor
        return result.to(out.dtype)

    def _normed(self, x: torch.Tensor, total: Sum | None) -> torch.Tensor:
        grouped = x.unflatten(-1, (-1, self.group))
        squares = grouped.square().sum(-1, keepdim=True)
        if self.norm_size > self.group and total is not None:
            squares = total(squares.flatten(1)).unsqueeze(-1)
        normed = grouped * torch.rsqrt(squares / self.norm_size + self.eps)
        weighted: torch.Tensor = normed.flatten(-2) * self.norm
        return weighted


@dataclass(frozen=True, slots=True)
class StateWeights:
    """One state layer, beside its map to q, k and v and its output.

    `gates` maps the stream to the numbers from which the gates are made, by kind and head; None where there are none.
    `decays`: in the same way to those of the decays alone, where each channel has one. `rate`: float32 `[heads]`, the
    decay a unit of time, below 0; `offset`: float32 `[heads]`, or of each channel, added to the time before its
    softplus. `step`: the bounds of the time; `step_scale` multiplies it before all that.
    """

    kind: str
    constants: StateConstants
    gates: Linear | None = None
    decays: Map | None = None
    rate: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    step: tuple[float, float] = (0.0, torch.inf)
    step_scale: float = 1.0

    @property
    def fuses(self) -> bool:
        """Whether one kernel does what follows the map of the gates: they are those of a gated delta net."""
        return self.kind == "gated_delta" and self.step == (0.0, torch.inf) and self.step_scale == 1.0

    def inputs(self, qkv: Linear, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What holders get of what the layer reads, `[n, hidden_size]`: q, k and v, and the gates of the recurrence.
        They have a SiLU behind the convolution; where there is none, it is here."""
        projected = qkv(stream)
        return projected if self.constants.conv is not None else F.silu(projected), self.gates_of(stream)

    def gates_of(self, stream: torch.Tensor) -> torch.Tensor:
        """The gates of the recurrence, float32 `[n, heads, g]`, from what the layer reads, `[n, hidden_size]`."""
        if self.gates is None or self.rate is None or self.offset is None:
            return torch.empty(len(stream), self.constants.heads, 0, device=stream.device)
        if self.fuses and compiled(stream):
            return recurrence_gates(self.gates(stream), self.rate, self.offset)
        raw, heads = self.gates(stream).float(), self.constants.heads
        if self.decays is not None:  # of each channel: Kimi Linear (arXiv 2510.26692)
            times = F.softplus(self.decays(stream).float() + self.offset).unflatten(-1, (heads, -1))
            return torch.cat((times * self.rate.unsqueeze(-1), raw.sigmoid().unsqueeze(-1)), -1)
        time = F.softplus(raw[:, :heads] * self.step_scale + self.offset).clamp(*self.step)
        # Gated delta nets (arXiv 2412.06464) have beta, Mamba2 (arXiv 2405.21060) dt.
        second = time if self.kind == "mamba2" else raw[:, heads:].sigmoid()
        return torch.stack((time * self.rate, second), -1)
