"""The weights of an MLP or of experts, and the part of them that a rank keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.moe import GATINGS, ClampedGate, Experts, Mlp, Router, ScaledGate
from lamina_workers.decoder.moe_config import MoeConfig
from lamina_workers.decoder.shard import RankShape, Shard
from lamina_workers.decoder.weight_loader import Loader, part_of
from lamina_workers.decoder.weight_names import CHOICE_BIAS, latent_names, mlp_names, norm_names, shared_names


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """An MLP or experts, the norms before and behind it, `[hidden]`, or None where there is none there, and its factors
    in `Residuals`."""

    norm: torch.Tensor | None
    mlp: Mlp | Experts
    norm_behind: torch.Tensor | None
    residual: tuple[float, float]


def load_mlp(config: ModelConfig, load: Loader, layer: int, shard: Shard, shape: RankShape) -> MlpWeights:
    """The rank's part of the MLP or experts of `layer`."""
    router, names = mlp_names(config, layer)
    mlp: Mlp | Experts
    if router is not None and config.moe is not None:
        mlp = _experts(config, config.moe, load, layer, shard, shape)
    else:
        bias = config.mlp_bias, shard.rank == 0
        mlp = _mlp(load, names[0], shape.columns, config.intermediate_size, bias, _gating(config))
    before, behind = (
        load.norm(f"model.layers.{layer}.{name}", config.family.norm_offset) if name else None
        for name in norm_names(config.family)[2:]
    )
    return MlpWeights(before, mlp, behind, config.residuals.mlp)


def _mlp(
    load: Loader,
    names: tuple[str, str, str],
    columns: range,
    whole: int,
    bias: tuple[bool, bool],
    gating: Callable[[torch.Tensor], torch.Tensor],
) -> Mlp:
    """`columns` of an MLP that is `whole` wide. bias: whether there are any, and whether that of the sum is kept."""
    gate, up, down = names
    own = part_of(columns)
    if gate == up:
        gate_up = load.linear([gate], bias[0], [[own, part_of(columns, 1, whole)]])
    else:
        maps = [name for name in (gate, up) if name]
        gate_up = load.linear(maps, bias[0], [[own]] * len(maps))
    return Mlp(gate_up, load.summed(down, bias[0], own, bias[1]), gating)


def _gating(config: ModelConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    if config.moe is not None and config.moe.clamp is not None:
        return ClampedGate(config.moe.clamp, config.moe.alpha)
    plain = GATINGS[config.activation]
    return plain if config.gate_scale == 1.0 else ScaledGate(plain, config.gate_scale)


def _experts(config: ModelConfig, moe: MoeConfig, load: Loader, layer: int, shard: Shard, shape: RankShape) -> Experts:
    router, names = mlp_names(config, layer)
    own = names[part_of(shape.experts)]
    for name in (name for names_of_one in names if names_of_one not in own for name in names_of_one if name):
        load.skip(f"{name}.weight")
        if moe.bias:
            load.skip(f"{name}.bias")
    gating, size = _gating(config), moe.intermediate_size
    experts = [_mlp(load, each, range(size), size, (moe.bias, True), gating) for each in own]
    shared = None
    if moe.shared:
        gate, of_shared = shared_names(config, layer)
        mlp = _mlp(load, of_shared, shape.shared, moe.shared, (False, False), gating)
        shared = mlp, None if gate is None else load.linear([gate], plain=True)
    latent = None
    if moe.latent:
        into, out = latent_names(config, layer)
        whole = slice(0, moe.latent)
        latent = load.linear([into], config.mlp_bias), load.summed(out, config.mlp_bias, whole, shard.rank == 0)
    bias = load.float32(f"{router}.{CHOICE_BIAS}") if moe.choice.sigmoid else None
    chooses = Router(load.linear([str(router)], moe.bias, plain=True), moe, bias)
    return Experts(chooses, experts, shape.experts.start, shared, latent)
