"""The tensors of a layer that keeps a state: their names and shapes in a checkpoint, and a rank's parts of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lamina_kernels.dense.dense import Linear
from lamina_kernels.states.layout import StateConstants
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.family import States
from lamina_workers.decoder.shard import RankShape, Shard
from lamina_workers.decoder.state_config import StateConfig
from lamina_workers.decoder.state_layers import LowRank, OutputGate, StateWeights
from lamina_workers.decoder.weight_loader import ALL, Loader

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
    at, hidden = f"model.layers.{layer}.{family.at}", config.hidden_size
    key_heads = states.key_heads // states.key_copies

    def width(roles: Sequence[str]) -> int:
        return sum(key_heads * states.d_k if role in _BY_KEY else states.heads * _unit(states, role) for role in roles)

    shapes: dict[str, tuple[int, ...]] = {}
    for name, roles in family.maps.items():
        shapes[f"{at}.{name}.weight"] = width(roles), hidden
        if states.bias:
            shapes[f"{at}.{name}.bias"] = (width(roles),)
    shapes[f"{at}.{family.out}.weight"] = hidden, states.heads * states.d_v
    if states.bias:
        shapes[f"{at}.{family.out}.bias"] = (hidden,)
    for name, roles in family.conv.items():
        shapes[f"{at}.{name}.weight"] = width(roles), 1, states.conv
        if states.conv_bias:
            shapes[f"{at}.{name}.bias"] = (width(roles),)
    for role, (down, up) in family.low_rank.items():
        shapes[f"{at}.{down}.weight"] = states.d_v, hidden
        shapes[f"{at}.{up}.weight"] = width((role,)), states.d_v
    if GATE_ROLES[states.kind]:
        decays = width(("decay",)) if "decay" in family.low_rank else states.heads
        shapes[f"{at}.A_log"] = (1, 1, states.heads, 1) if "decay" in family.low_rank else (states.heads,)
        shapes[f"{at}.dt_bias"] = (decays,)
    if states.skip:
        shapes[f"{at}.D"] = (states.heads,)
    if states.norm:
        shapes[f"{at}.{family.norm}.weight"] = (_norm_width(states),)
    return shapes


def load_state(
    config: ModelConfig, load: Loader, layer: int, shard: Shard, shape: RankShape
) -> tuple[Linear, StateWeights, OutputGate, Linear]:
    """The rank's part of a state layer: the map to q, k and v, what its gates are made from, the gate of its output,
    and the map of that."""
    family, states = _described(config)
    at = f"model.layers.{layer}.{family.at}"
    heads, key_heads = shape.states, shape.state_keys
    sources = {role: name for name, roles in family.maps.items() for role in roles}

    def parts(roles: Sequence[str]) -> list[tuple[str, list[slice]]]:
        return [
            (f"{at}.{sources[role]}", _rows(states, family.maps[sources[role]], family.by_head, role, heads, key_heads))
            for role in roles
        ]

    def own_rows(role: str) -> list[slice]:
        return _rows(states, (role,), False, role, heads, key_heads)

    roles = GATE_ROLES[states.kind]
    plain = [part for part in (("q", "k", "v"), ("z",), roles) if part and part[0] in sources]
    maps = dict(zip(plain, load.apart([parts(part) for part in plain], states.bias), strict=True))
    low = {
        role: LowRank(load.linear([f"{at}.{down}"]), load.linear([f"{at}.{up}"], rows=[own_rows(role)]))
        for role, (down, up) in family.low_rank.items()
    }
    gate_map = low.get("z") or maps[("z",)]
    own = slice(heads.start, heads.stop)
    conv, conv_bias = _convolution(states, family, load, at, (heads, key_heads)) if states.conv else (None, None)
    skip = load.float32(f"{at}.D", [own]) if states.skip else None
    decays = states.spec(0, layer, config.num_hidden_layers).decays[own]
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
        -load.float32(f"{at}.A_log").flatten()[own].exp() if roles else None,
        load.float32(f"{at}.dt_bias", own_rows("decay") if "decay" in low else [own]) if roles else None,
        states.step,
        states.factors[-1],
    )
    columns = slice(heads.start * states.d_v, heads.stop * states.d_v)
    gate = _gate(states, family, load, f"{at}.{family.norm}.weight", gate_map, columns)
    output = load.summed(f"{at}.{family.out}", states.bias, columns, shard.rank == 0)
    return maps["q", "k", "v"], weights, gate, output


def _convolution(
    states: StateConfig, family: States, load: Loader, at: str, own: tuple[range, range]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Its weights `[channels, conv]` and its bias, in the order q, k, v, of a rank's `own` heads and key heads."""
    where = {role: (f"{at}.{name}", roles) for name, roles in family.conv.items() for role in roles}
    parts = [(where[role][0], _rows(states, where[role][1], False, role, *own)) for role in "qkv"]
    weights = load.pieces([(f"{name}.weight", rows) for name, rows in parts])
    factors = dict(zip(("z", "v", "k", "q", "step"), states.factors, strict=True))
    weight = torch.cat([part * factors[role] for role, part in zip("qkv", weights, strict=True)]).squeeze(1)
    return weight, torch.cat(load.pieces([(f"{name}.bias", of) for name, of in parts])) if states.conv_bias else None


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
        whole=states.norm,
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
    sizes = {each: _unit(states, each) * (1 if each in _BY_KEY else group) for each in roles}  # of a key head
    before = sum(sizes[each] for each in roles[: list(roles).index(role)])
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
