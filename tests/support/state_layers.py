"""Layers that keep states: small specs of each kind, random inputs, and what they give by the recurrence."""

from __future__ import annotations

import dataclasses

import numpy as np
import state_reference as reference
import torch

from lamina_kernels.states.layout import StateLayout
from lamina_kernels.states.operands import StateConstants, StateRows
from lamina_protocols.messages.layers import STATES, HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Constants

HEADS, D_K, D_V = 4, 16, 32
KEY_HEADS = {"lightning": 4, "gated_delta": 2, "mamba2": 1, "kda": 4}
KINDS = STATES


def spec(kind: str, layer: int) -> LayerSpec:
    decays = tuple(-0.1 * (head + 1) for head in range(HEADS)) if kind == "lightning" else ()
    conv = 0 if kind == "lightning" else 4
    return LayerSpec(
        layer, HEADS, HEADS, D_K, D_V, 0.25, kind=kind, key_heads=KEY_HEADS[kind], conv=conv, decays=decays
    )


def config(kind: str, layers: int = 2, kv_memory: int = 1 << 22) -> HolderConfig:
    return HolderConfig(tuple(spec(kind, at) for at in range(layers)), 16, "float32", kv_memory)


def layout(of: LayerSpec) -> StateLayout:
    return StateLayout(of.kind, of.d_k, of.d_v, of.conv)


def width(of: LayerSpec) -> int:
    return 2 * of.key_heads * of.d_k + of.heads * of.d_v


def constants(of: LayerSpec, layer: int, ids: tuple[int, int] = (1, 1)) -> Constants:
    """The message of a layer's constants; those of the same layer are the same."""
    made = torch.Generator().manual_seed(100 + layer)
    conv = torch.randn(width(of), of.conv, generator=made) / 2 if of.conv else torch.empty(0)
    bias = torch.randn(width(of), generator=made) / 4 if of.kind == "mamba2" else torch.empty(0)
    skip = torch.randn(of.heads, generator=made) if of.kind == "mamba2" else torch.empty(0)
    return Constants(*ids, layer, conv, bias, skip)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A sequence's inputs in each layer. x: of each `[T, width]`, gates: `[T, heads, g]`."""

    specs: tuple[LayerSpec, ...]
    x: list[torch.Tensor]
    gates: list[torch.Tensor]

    @classmethod
    def random(cls, specs: tuple[LayerSpec, ...], tokens: int, seed: int) -> Inputs:
        made = torch.Generator().manual_seed(seed)
        x = [torch.randn(tokens, width(of), generator=made) for of in specs]
        gates = [torch.rand(tokens, of.heads, layout(of).gates, generator=made) for of in specs]
        for of, some in zip(specs, gates, strict=True):
            logs = slice(0, of.d_k if of.kind == "kda" else 1)
            some[..., logs] = -some[..., logs]  # decays are logs of what is below 1
        return cls(specs, x, gates)

    def constants(self, layer: int) -> StateConstants:
        """Of all heads of a layer."""
        of, given = self.specs[layer], constants(self.specs[layer], layer)
        some = (x if x.numel() else None for x in (given.conv, given.bias, given.skip))
        return StateConstants(of.heads, of.key_heads, of.scale, *some, torch.tensor(of.decays) if of.decays else None)

    def outputs(self) -> list[torch.Tensor]:
        """By the recurrence, over the whole sequence: of each layer `[T, heads * d_v]`."""
        found = []
        for layer, of in enumerate(self.specs):
            tokens = len(self.x[layer])
            rows = StateRows(np.array([tokens]), [np.arange(of.heads)], of.heads // of.key_heads)
            arena = torch.zeros(of.heads + 1, layout(of).record)
            out = reference.advance(
                layout(of), arena, rows, np.full(of.heads, -1), np.arange(of.heads), self.x[layer].view(-1),
                self.gates[layer].view(-1), self.constants(layer),
            )  # fmt: skip
            found.append(out.view(tokens, -1))
        return found
