"""The tensors of a checkpoint: their names, as Hugging Face models are published, and their shapes.

Layers that keep a state have many tensors, which models name and cut in different ways; so what a rank reads of them
is here too, beside their names (`load_state`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lamina_kernels.dense.dense import Linear
from lamina_kernels.states.operands import StateConstants
from lamina_protocols.messages.layers import Index
from lamina_workers.checkpoints.weight_loader import ALL, Loader
from lamina_workers.decoder.shard import RankShape, Shard
from lamina_workers.decoder.state_layers import LowRank, OutputGate, StateWeights
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_config.family import Family, States
from lamina_workers.model_config.mixers import LatentConfig, StateConfig

_BY_KEY = ("q", "k")  # what each head of q and k has; the rest is of each value head
GATE_ROLES = {"lightning": (), "gated_delta": ("step", "beta"), "mamba2": ("step",), "kda": ("beta",)}
"""By kind, what its gates are made from."""
_NORMED_BY_HEAD = ("gated_delta", "kda")  # kinds whose heads share the weights of the output's norm
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
}


def state_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the state layer `layer`."""
    family, states = _described(config)
    prefix, hidden = f"model.layers.{layer}.{family.module}", config.hidden_size
    key_heads = states.key_heads // states.key_copies

    def width(roles: Sequence[str]) -> int:
        return sum(key_heads * states.d_k if role in _BY_KEY else states.heads * _unit(states, role) for role in roles)

    shapes: dict[str, tuple[int, ...]] = {}
    for name, roles in family.maps.items():
        shapes[f"{prefix}.{name}.weight"] = width(roles), hidden
        if states.bias:
            shapes[f"{prefix}.{name}.bias"] = (width(roles),)
    shapes[f"{prefix}.{family.out}.weight"] = hidden, states.heads * states.d_v
    if states.out_bias:
        shapes[f"{prefix}.{family.out}.bias"] = (hidden,)
    for name, roles in family.conv.items():
        shapes[f"{prefix}.{name}.weight"] = width(roles), 1, states.conv
        if states.conv_bias:
            shapes[f"{prefix}.{name}.bias"] = (width(roles),)
    for role, (down, up) in family.low_rank.items():
        shapes[f"{prefix}.{down}.weight"] = states.d_v, hidden
        shapes[f"{prefix}.{up}.weight"] = width((role,)), states.d_v
    if GATE_ROLES[states.kind]:
        decays = width(("decay",)) if "decay" in family.low_rank else states.heads
        shapes[f"{prefix}.A_log"] = (1, 1, states.heads, 1) if "decay" in family.low_rank else (states.heads,)
        shapes[f"{prefix}.dt_bias"] = (decays,)
    if states.skip:
        shapes[f"{prefix}.D"] = (states.heads,)
    if states.norm:
        shapes[f"{prefix}.{family.norm}.weight"] = (_norm_width(states),)
    return shapes


def load_state(
    config: ModelConfig, load: Loader, layer: int, shard: Shard, shape: RankShape
) -> tuple[Linear, StateWeights, OutputGate, Linear]:
    """The rank's part of a state layer: the map to q, k and v, what its gates are made from, the gate of its output,
    and the map of that."""
    family, states = _described(config)
    prefix = f"model.layers.{layer}.{family.module}"
    heads, key_heads = shape.states, shape.state_keys
    sources = {role: name for name, roles in family.maps.items() for role in roles}

    def parts(roles: Sequence[str]) -> list[tuple[str, list[slice]]]:
        return [
            (
                f"{prefix}.{sources[role]}",
                _rows(states, family.maps[sources[role]], family.by_head, role, heads, key_heads),
            )
            for role in roles
        ]

    def own_rows(role: str) -> list[slice]:
        return _rows(states, (role,), False, role, heads, key_heads)

    roles = GATE_ROLES[states.kind]
    plain = [part for part in (("q", "k", "v"), ("z",), roles) if part and part[0] in sources]
    maps = dict(zip(plain, load.apart([parts(part) for part in plain], states.bias), strict=True))
    low = {
        role: LowRank(load.linear([f"{prefix}.{down}"]), load.linear([f"{prefix}.{up}"], rows=[own_rows(role)]))
        for role, (down, up) in family.low_rank.items()
    }
    gate_map = low.get("z") or maps[("z",)]
    rank_heads = slice(heads.start, heads.stop)
    conv, conv_bias = _convolution(states, family, load, prefix, (heads, key_heads)) if states.conv else (None, None)
    skip = load.float32(f"{prefix}.D", [rank_heads]) if states.skip else None
    decays = states.spec(0, layer, config.num_hidden_layers).decays[rank_heads]
    weights = StateWeights(
        states.kind,
        StateConstants(
            len(heads),
            len(key_heads),
            states.scale,
            conv,
            conv_bias,
            skip,
            torch.tensor(decays, device=load.device) if decays else None,
        ),
        maps.get(roles),
        low.get("decay"),
        -load.float32(f"{prefix}.A_log").flatten()[rank_heads].exp() if roles else None,
        load.float32(f"{prefix}.dt_bias", own_rows("decay") if "decay" in low else [rank_heads]) if roles else None,
        states.step,
        states.factors[-1],
    )
    columns = slice(heads.start * states.d_v, heads.stop * states.d_v)
    gate = _gate(states, family, load, f"{prefix}.{family.norm}.weight", gate_map, columns)
    output = load.summed(f"{prefix}.{family.out}", states.out_bias, columns, shard.rank == 0)
    return maps["q", "k", "v"], weights, gate, output


def _convolution(
    states: StateConfig, family: States, load: Loader, prefix: str, heads: tuple[range, range]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Its weights `[channels, conv]` and its bias, in the order q, k, v, of a rank's `heads` and key heads."""
    where = {role: (f"{prefix}.{name}", roles) for name, roles in family.conv.items() for role in roles}
    parts = [(where[role][0], _rows(states, where[role][1], False, role, *heads)) for role in "qkv"]
    weights = load.pieces([(f"{name}.weight", rows) for name, rows in parts])
    factors = dict(zip(("z", "v", "k", "q", "step"), states.factors, strict=True))
    weight = torch.cat([part * factors[role] for role, part in zip("qkv", weights, strict=True)]).squeeze(1)
    return weight, torch.cat(
        load.pieces([(f"{name}.bias", rows) for name, rows in parts])
    ) if states.conv_bias else None


def _gate(
    states: StateConfig, family: States, load: Loader, norm: str, of: Linear | LowRank, columns: slice
) -> OutputGate:
    if not states.norm:
        return OutputGate(of, _ACTIVATIONS[family.gate], scale=states.factors[0])
    width = columns.stop - columns.start
    weight = load.float32(norm, ALL if states.kind in _NORMED_BY_HEAD else [columns])
    return OutputGate(
        of,
        _ACTIVATIONS[family.gate],
        weight.repeat(width // len(weight)),
        group=min(states.norm, width),
        norm_size=states.norm,
        first=states.norm_first,
        eps=states.eps,
        scale=states.factors[0],
    )


def _norm_width(states: StateConfig) -> int:
    """The weights of the output's norm: one for each number, or those of a head for all heads."""
    return states.d_v if states.kind in _NORMED_BY_HEAD else states.heads * states.d_v


def _rows(
    states: StateConfig, roles: Sequence[str], by_head: bool, role: str, heads: range, key_heads: range
) -> list[slice]:
    """The rows that a rank's heads have in a tensor with `roles`; see `families.States.maps`."""
    if not roles:
        return []
    n_keys = states.key_heads // states.key_copies
    group = states.heads // n_keys  # value heads of a key head
    sizes = {
        part_role: _unit(states, part_role) * (1 if part_role in _BY_KEY else group) for part_role in roles
    }  # of a key head
    before = sum(sizes[part_role] for part_role in roles[: list(roles).index(role)])
    unit = _unit(states, role)
    if role in _BY_KEY:
        places = [(head // states.key_copies, 0) for head in key_heads]
    else:
        places = [divmod(head, group) for head in heads]
    step, first = (sum(sizes.values()), before) if by_head else (sizes[role], before * n_keys)
    begins = [first + key * step + inner * unit for key, inner in places]
    return [slice(begin, begin + unit) for begin in begins]


def _unit(states: StateConfig, role: str) -> int:
    """The rows of one head."""
    return states.d_k if role in (*_BY_KEY, "decay") else states.d_v if role in ("v", "z") else 1


def _described(config: ModelConfig) -> tuple[States, StateConfig]:
    if config.family.states is None or config.states is None:
        raise ValueError(f"{config.architecture} has no layers with a state")
    return config.family.states, config.states


EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
CHOICE_BIAS = "e_score_correction_bias"  # of a router: beside its weight


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of `config`; stacked experts one by one (see `SeparateExperts`)."""
    hidden, family = config.hidden_size, config.family
    shapes: dict[str, tuple[int, ...]] = {f"{NORM}.weight": (hidden,)}

    def linear(name: str, n_out: int, n_in: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (n_out, n_in)
        if bias:
            shapes[f"{name}.bias"] = (n_out,)

    for name in (EMBEDDING,) if config.tie_word_embeddings else (EMBEDDING, HEAD):
        linear(name, config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes.update({f"{prefix}.{name}.weight": (hidden,) for name in norm_names(family) if name})
        if "state" in config.mixers[layer]:
            shapes.update(state_shapes(config, layer))
        if "attention" in config.mixers[layer]:
            shapes.update(_attention_shapes(config, layer))
        if config.has_mlp(layer):
            shapes.update(_mlp_shapes(config, layer))
    return shapes


def _mlp_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    (router, mlps), hidden, moe = mlp_names(config, layer), config.hidden_size, config.moe
    shapes: dict[str, tuple[int, ...]] = {}

    def mlp(names: tuple[str, str, str], size: int, bias: bool, width: int = hidden) -> None:
        gate, up, down = names
        for name in filter(None, dict.fromkeys((gate, up))):
            shapes[f"{name}.weight"] = (2 * size if gate == up else size), width
        shapes[f"{down}.weight"] = width, size
        if bias:
            shapes.update({f"{name}.bias": shapes[f"{name}.weight"][:1] for name in names if name})

    if router is None or moe is None:
        mlp(mlps[0], config.intermediate_size, config.mlp_bias)
        return shapes
    shapes[f"{router}.weight"] = moe.experts, hidden
    if moe.bias:
        shapes[f"{router}.bias"] = (moe.experts,)
    if moe.choice.sigmoid:
        shapes[f"{router}.{CHOICE_BIAS}"] = (moe.experts,)
    for names in mlps:
        mlp(names, moe.intermediate_size, moe.bias, moe.latent or hidden)
    if moe.latent:
        for name, latent_shape in zip(
            latent_names(config, layer), ((moe.latent, hidden), (hidden, moe.latent)), strict=True
        ):
            shapes[f"{name}.weight"] = latent_shape
            if config.mlp_bias:
                shapes[f"{name}.bias"] = latent_shape[:1]
    if moe.shared:
        gate, names = shared_names(config, layer)
        if gate is not None:
            shapes[f"{gate}.weight"] = 1, hidden
        mlp(names, moe.shared, False)
    return shapes


def _latent_shapes(latent: LatentConfig, prefix: str, heads: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the attention `at` but its output's."""
    of_queries = heads * (latent.plain + latent.rotary)
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.kv_a_proj_with_mqa.weight": (latent.rank + latent.rotary, hidden),
        f"{prefix}.kv_a_layernorm.weight": (latent.rank,),
        f"{prefix}.kv_b_proj.weight": (heads * (latent.plain + latent.value), latent.rank),
    }
    if not latent.query_rank:
        return shapes | {f"{prefix}.q_proj.weight": (of_queries, hidden)}
    return shapes | {
        f"{prefix}.q_a_proj.weight": (latent.query_rank, hidden),
        f"{prefix}.q_a_layernorm.weight": (latent.query_rank,),
        f"{prefix}.q_b_proj.weight": (of_queries, latent.query_rank),
    }


def _attention_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    prefix, family, hidden = f"model.layers.{layer}.self_attn", config.family, config.hidden_size
    d, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads // config.kv_copies
    widths = heads * d, kv_heads * d, kv_heads * config.v_head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if config.latent is not None:
        shapes.update(_latent_shapes(config.latent, prefix, heads, hidden))
    else:
        names = projection_names(config, layer)
        projected = (2 * widths[0] if family.gated else widths[0], *widths[1:])
        for name, width in zip(names, projected if len(names) == 3 else (sum(projected),), strict=True):
            shapes[f"{name}.weight"] = width, hidden
            if config.qkv_bias:
                shapes[f"{name}.bias"] = (width,)
    shapes[f"{prefix}.o_proj.weight"] = hidden, heads * (config.latent.value if config.latent else config.v_head_dim)
    if config.o_bias:
        shapes[f"{prefix}.o_proj.bias"] = (hidden,)
    if family.qk_norm:
        for name, width in zip(family.qk_norm_names, widths, strict=False):
            shapes[f"{prefix}.{name}.weight"] = (width if family.qk_norm == "whole" else d,)
    if config.sinks:
        shapes[f"{prefix}.sinks"] = (heads,)
    if config.index is not None and config.indexed[layer]:
        shapes.update(_index_shapes(config, config.index, layer, kv_heads))
    return shapes


def _index_shapes(config: ModelConfig, index: Index, layer: int, kv_heads: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer's index."""
    hidden, width = config.hidden_size, index.width
    first, second, third, fourth = (f"{name}.weight" for name in index_names(config, layer))
    if config.latent is None:
        return {first: (kv_heads * width, hidden), second: (width, hidden), third: (width,), fourth: (width,)}
    return {
        first: (index.heads * width, config.latent.query_rank),
        second: (width, hidden),
        third: (index.heads, hidden),
        fourth: (width,),
        f"{fourth.removesuffix('weight')}bias": (width,),
    }


def projection_names(config: ModelConfig, layer: int) -> list[str]:
    """The maps to q, k and v of a layer; one name where one map has all. Of latent attention those to queries, or to
    what they are made of, and to latents."""
    prefix, joined = f"model.layers.{layer}.self_attn", config.family.qkv
    if config.latent is not None:
        return [f"{prefix}.{'q_a' if config.latent.query_rank else 'q'}_proj", f"{prefix}.kv_a_proj_with_mqa"]
    return [f"{prefix}.{joined}"] if joined else [f"{prefix}.{part}_proj" for part in "qkv"]


def index_names(config: ModelConfig, layer: int) -> tuple[str, str, str, str]:
    """The maps and norms of a layer's index: to index queries and keys, and their norms; with latents to index queries,
    keys and weights, and the norm of keys."""
    prefix = f"model.layers.{layer}.self_attn.indexer"
    if config.latent is not None:
        return f"{prefix}.wq_b", f"{prefix}.wk", f"{prefix}.weights_proj", f"{prefix}.k_norm"
    return f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.q_norm", f"{prefix}.k_norm"


def norm_names(family: Family) -> tuple[str, str, str, str]:
    """The names of a layer's norms, in the order in which they are applied; "": there is none."""
    names = family.norms
    return names.before_attention, names.behind_attention, names.before_mlp, names.behind_mlp


def mlp_names(config: ModelConfig, layer: int) -> tuple[str | None, list[tuple[str, str, str]]]:
    """The router's name, if any, and (gate, up, down) of the layer's MLP or of each of its experts. Gate and up have
    one name where one map has both; the gate's is "" where there is none."""
    if config.moe is None or not config.sparse[layer]:
        return None, [_plain_names(config.family, f"model.layers.{layer}.mlp")]
    named = config.family.experts
    block, maps = f"model.layers.{layer}.{named.block}", named.maps
    return f"{block}.{named.router}", [
        _under(f"{block}.experts.{number}", maps) for number in range(config.moe.experts)
    ]


def shared_names(config: ModelConfig, layer: int) -> tuple[str | None, tuple[str, str, str]]:
    """The gate of the expert that all tokens take, if it has one, and its own (gate, up, down)."""
    prefix = f"model.layers.{layer}.{config.family.experts.shared}"
    gated = config.moe is not None and config.moe.shared_gate
    return f"{prefix}_gate" if gated else None, _plain_names(config.family, prefix)


def _plain_names(family: Family, prefix: str) -> tuple[str, str, str]:
    if family.gate_up:
        return _under(prefix, (family.gate_up, family.gate_up, "down_proj"))
    return _under(prefix, ("" if family.ungated_mlp else "gate_proj", "up_proj", "down_proj"))


def _under(prefix: str, maps: tuple[str, str, str]) -> tuple[str, str, str]:
    gate, up, down = maps
    return gate and f"{prefix}.{gate}", f"{prefix}.{up}", f"{prefix}.{down}"


def latent_names(config: ModelConfig, layer: int) -> tuple[str, str]:
    """The maps before and behind experts that are of another width than the model."""
    prefix = f"model.layers.{layer}.{config.family.experts.block}"
    return f"{prefix}.fc1_latent_proj", f"{prefix}.fc2_latent_proj"
