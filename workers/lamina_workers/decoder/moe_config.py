"""Mixtures of experts as a config.json describes them, checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lamina_workers.decoder.config_keys import Keys
from lamina_workers.decoder.family import Family
from lamina_workers.errors import ModelFileError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Choice:
    """How a router's logits choose experts and weigh them, beyond the `top_k` best of a softmax.

    `groups`: experts stand in so many groups of neighbours, and only those of the `top_groups` best are chosen. A
    group is as good as its best expert, with `sigmoid` as its two best together. `sigmoid`: scores are sigmoids, and a
    bias of each expert is added to choose, not to weigh. `scale` multiplies the weights.
    """

    groups: int = 1
    top_groups: int = 1
    sigmoid: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Mixture of experts: of `experts` MLPs of `intermediate_size`, each token takes the `top_k` best.

    `normalize`: the weights of those taken are divided by their sum. `bias`: of the router and of every expert.
    `clamp`: the gate, of the model's other MLPs too, is `lamina_workers.decoder.moe.ClampedGate` with this limit, and
    `alpha`; None: silu.
    `shared`: the width of one more expert that all tokens take, weighted by a gate of its own where `shared_gate`; 0:
    there is none.
    `latent`: the width of what experts take and give, between a map down to it and one up from it; 0: the model's.
    `stacked`: how the checkpoint keeps all experts of a layer in one tensor; "": each has its own. See
    `stacked_experts`.
    """

    experts: int
    top_k: int
    intermediate_size: int
    normalize: bool
    bias: bool = False
    clamp: float | None = None
    alpha: float = 1.0
    shared: int = 0
    shared_gate: bool = True
    stacked: Literal["", "rows", "floats", "mxfp4"] = ""
    choice: Choice = Choice()
    latent: int = 0


def read_moe(
    keys: Keys, family: Family, layers: int, sparse: tuple[bool, ...] | None = None
) -> tuple[MoeConfig | None, tuple[bool, ...]]:
    """The experts of a model, None where there are none, and which of its layers have them: `sparse`, if given."""
    config: MoeConfig | None
    if family.groups:
        config, found = _grouped(keys, family, layers)
    elif family.expert_size:
        config, found = _plain(keys, family, layers)
    else:
        return None, (False,) * layers
    if config is None:
        return None, found
    if family.experts.always:
        config = replace(config, stacked="rows")
    if family.clamped:
        clamp = keys.number("swiglu_limit", 0.0, 1e6, default=7.0)
        config = replace(config, clamp=clamp, alpha=keys.number("swiglu_alpha", 0.0, 1e3, default=1.702))
    return config, found if sparse is None else sparse


def _plain(keys: Keys, family: Family, layers: int) -> tuple[MoeConfig | None, tuple[bool, ...]]:
    # transformers 5 writes num_local_experts also where published configs have num_experts.
    name, least = "num_local_experts" if keys.given("num_local_experts") else "num_experts", family.shared_gate
    if not (experts := keys.integer(name, int(least), 4096)):  # then what all tokens take is the MLP
        return None, (False,) * layers
    config = MoeConfig(
        experts=experts,
        top_k=keys.integer("num_experts_per_tok", 1, experts),
        intermediate_size=keys.integer(family.expert_size, 1, 1 << 20),
        normalize=keys.flag("norm_topk_prob", False),
        shared=keys.integer(family.shared_expert, 1, 1 << 20) if family.shared_expert else 0,
        shared_gate=family.shared_gate,
    )
    if family.expert_bias:
        config = replace(config, bias=True, stacked=_stacked(keys, config.intermediate_size))
    step = keys.integer("decoder_sparse_step", 1, 1024, default=1)
    dense = set(keys.items("mlp_only_layers", range(1024)))
    return config, tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _grouped(keys: Keys, family: Family, layers: int) -> tuple[MoeConfig, tuple[bool, ...]]:
    """DeepSeek's: experts in groups, shared ones without a gate, in all but the first layers."""
    experts, sigmoid = keys.integer("n_routed_experts", 1, 4096), family.groups == "sigmoid"
    method = keys.text("topk_method", "noaux_tc" if sigmoid else "greedy")
    allowed = ("noaux_tc",) if sigmoid else ("greedy", "group_limited_greedy")
    if method not in allowed:
        raise UnsupportedModelError(f"topk_method {method!r} is not supported; supported: {', '.join(allowed)}")
    normalize = keys.flag("norm_topk_prob", sigmoid)
    if normalize and not sigmoid:
        raise UnsupportedModelError("norm_topk_prob is not supported with softmax scores; supported: false")
    choice = Choice(sigmoid=sigmoid, scale=keys.number("routed_scaling_factor", 1e-6, 1e6, default=1.0))
    if method != "greedy":
        groups = keys.integer("n_group", 1, experts)
        if experts % groups or (sigmoid and experts < 2 * groups):
            raise ModelFileError(f"n_group {groups} must divide n_routed_experts {experts}, into groups of 2 or more")
        choice = replace(choice, groups=groups, top_groups=keys.integer("topk_group", 1, groups))
    size = keys.integer("moe_intermediate_size", 1, 1 << 20)
    config = MoeConfig(
        experts=experts,
        top_k=keys.integer("num_experts_per_tok", 1, experts // choice.groups * choice.top_groups),
        intermediate_size=size,
        normalize=normalize,
        shared=keys.integer(family.shared_expert, 0, 1 << 20)
        if family.shared_expert
        else size * keys.integer("n_shared_experts", 0, 1024, default=0),
        shared_gate=False,
        choice=choice,
        latent=keys.integer("moe_latent_size", 1, 1 << 17) if keys.given("moe_latent_size") else 0,
    )
    if keys.given("mlp_layer_types"):
        return config, tuple(kind == "sparse" for kind in keys.items("mlp_layer_types", ("dense", "sparse"), layers))
    first, step = keys.integer("first_k_dense_replace", 0, 1024, default=0), keys.integer("moe_layer_freq", 1, 1024, 1)
    return config, tuple(layer >= first and layer % step == 0 for layer in range(layers))


def _stacked(keys: Keys, size: int) -> Literal["floats", "mxfp4"]:
    """How a checkpoint of gpt-oss keeps its experts, of width `size`."""
    if not (table := keys.table("quantization_config")):
        return "floats"
    if (method := table.get("quant_method")) != "mxfp4":
        raise UnsupportedModelError(f"quant_method {method!r} is not supported; supported: 'mxfp4'")
    hidden = keys.integer("hidden_size", 1, 1 << 17)
    if hidden % 32 or size % 32:
        raise ModelFileError(f"hidden_size {hidden} and {size}, of an expert, must be multiples of 32 for MXFP4")
    return "mxfp4"
