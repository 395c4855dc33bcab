"""The layers of a model that keep a state, as its config.json says them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lamina_kernels.states.layout import CONVS, SIZES
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.decoder.config_keys import Keys
from lamina_workers.decoder.family import Family
from lamina_workers.errors import ModelFileError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class StateConfig:
    """The shape of a model's layers that keep a state: `heads` states of `d_k` times `d_v` numbers in each.

    Each of the `key_heads` heads of q and k belongs to heads / key_heads states; `key_copies`: how often each of the
    checkpoint stands here, one after another, so that more ranks can share. `conv`: the width of the convolution; 0:
    none. `scale` multiplies q. `slopes`, by head: lightning's log decay a token, before a layer's own factor.
    `bias`: of the maps into and out of the layer; `conv_bias`: of the convolution; `skip`: an input adds to the output
    past the state. `norm`: the numbers of the output that are normed together, with the epsilon `eps`; 0: none are;
    `norm_first`: before the output is multiplied by its gate. `step`: the bounds of Mamba2's dt. `factors` multiply
    what is projected: the output's gate, v, k, q and dt. How a family computes and names its tensors is in `families`.
    """

    kind: str
    heads: int
    key_heads: int
    d_k: int
    d_v: int
    conv: int
    scale: float
    norm: int
    eps: float
    norm_first: bool = True
    slopes: tuple[float, ...] = ()
    bias: bool = False
    conv_bias: bool = False
    skip: bool = False
    step: tuple[float, float] = (0.0, math.inf)
    factors: tuple[float, ...] = (1.0,) * 5
    key_copies: int = 1

    @property
    def width(self) -> int:
        """The numbers of q, k and v of a token."""
        return 2 * self.key_heads * self.d_k + self.heads * self.d_v

    def spec(self, mixer: int, layer: int, layers: int) -> LayerSpec:
        """That of the state layer `layer` of `layers`, for holders, who call it `mixer`."""
        # MiniMax-01 (arXiv 2501.08313): the later a layer, the longer it remembers.
        factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
        return LayerSpec(
            kv_layer=mixer,
            heads=self.heads,
            kv_heads=self.heads,
            d_k=self.d_k,
            d_v=self.d_v,
            scale=self.scale,
            kind=self.kind,
            key_heads=self.key_heads,
            conv=self.conv,
            decays=tuple(slope * factor for slope in self.slopes),
        )


def read_states(keys: Keys, family: Family) -> StateConfig | None:
    """The shape of a family's layers with a state; None where it has none."""
    if family.states is None:
        return None
    for name in ("mamba_hidden_act", *(() if family.ungated_mlp else ("hidden_act",))):
        if (activation := keys.text(name, "silu")) != "silu":
            raise UnsupportedModelError(f"{name} {activation!r} is not supported with states; supported: 'silu'")
    config = _READERS[family.states.kind](keys, family)
    if config.heads % config.key_heads:
        raise ModelFileError(
            f"a state layer has {config.heads} heads; allowed: multiples of {config.key_heads}, of its q"
        )
    for size in (config.d_k, config.d_v):
        if size not in SIZES:
            raise UnsupportedModelError(
                f"a state has {config.d_k} x {config.d_v} numbers; allowed of each: multiples of 16 up to {SIZES[-1]}"
            )
    if config.conv and config.conv not in CONVS:
        raise UnsupportedModelError(
            f"a convolution before a state is {config.conv} wide; allowed: {CONVS[0]} to {CONVS[-1]}"
        )
    return config


def _lightning(keys: Keys, family: Family) -> StateConfig:
    heads = keys.integer("num_attention_heads", 1, 4096)
    d = keys.integer("head_dim", 1, 1024, default=keys.integer("hidden_size", 1, 1 << 17) // heads)
    slopes = tuple(-(2 ** (-8 * (head + 1) / heads)) for head in range(heads))
    return StateConfig("lightning", heads, heads, d, d, 0, 1.0, norm=heads * d, eps=1e-6, slopes=slopes)


def _gated_delta(keys: Keys, family: Family) -> StateConfig:
    heads, key_heads = (keys.integer(f"linear_num_{which}_heads", 1, 4096) for which in ("value", "key"))
    d_k, d_v = (keys.integer(f"linear_{which}_head_dim", 1, 1024) for which in ("key", "value"))
    conv = keys.integer("linear_conv_kernel_dim", 2, 64)
    eps = keys.number("rms_norm_eps", 0.0, 1.0, default=1e-6)
    return StateConfig("gated_delta", heads, key_heads, d_k, d_v, conv, d_k**-0.5, norm=d_v, eps=eps)


def _mamba2(keys: Keys, family: Family) -> StateConfig:
    nemotron = family.mixers == "alternating"  # with keys of its own
    named = {"n_heads": "mamba_num_heads", "d_head": "mamba_head_dim", "n_groups": "n_groups"} if nemotron else {}
    named |= {"d_state": "ssm_state_size", "d_conv": "conv_kernel", "conv_bias": "use_conv_bias"} if nemotron else {}

    def name(of: str) -> str:
        return named.get(of, f"mamba_{of}")

    heads, groups = keys.integer(name("n_heads"), 1, 4096), keys.integer(name("n_groups"), 1, 4096, default=1)
    inner = keys.integer("mamba_expand", 1, 64, default=2) * keys.integer("hidden_size", 1, 1 << 17)
    if family.mixers == "both":
        inner = keys.integer("mamba_d_ssm", 1, 1 << 20)
    given = keys.get(name("d_head")) not in (None, "auto")
    d_v = keys.integer(name("d_head"), 1, 1024) if given else inner // heads
    if not nemotron and heads * d_v != inner:
        raise ModelFileError(f"mamba_n_heads {heads} of {d_v} numbers are {heads * d_v}; allowed: {inner}")
    if heads % groups:
        raise ModelFileError(f"{name('n_groups')} {groups} must divide {name('n_heads')} {heads}")
    return StateConfig(
        "mamba2",
        heads,
        groups,
        keys.integer(name("d_state"), 1, 1024, default=128 if nemotron else 256),
        d_v,
        keys.integer(name("d_conv"), 2, 64, default=4),
        1.0,
        norm=heads * d_v // groups if family.mixers != "both" or keys.flag("mamba_rms_norm", False) else 0,
        eps=keys.number(family.eps, 0.0, 1.0, default=1e-6),
        norm_first=family.mixers == "both" and keys.flag("mamba_norm_before_gate", True),
        bias=keys.flag("use_bias" if nemotron else "mamba_proj_bias", False),
        conv_bias=keys.flag(name("conv_bias"), True),
        skip=True,
        step=_step(keys),
        factors=_factors(keys),
    )


def _factors(keys: Keys) -> tuple[float, ...]:
    """Falcon-H1's, with that of the input."""
    each = keys.numbers("ssm_multipliers", 1e-6, 1e6, 5) if keys.given("ssm_multipliers") else (1.0,) * 5
    into = keys.number("ssm_in_multiplier", 1e-6, 1e6, default=1.0)
    found = tuple(into * factor for factor in each)
    if found != (1.0,) * 5 and (keys.flag("mamba_proj_bias", False) or keys.flag("projectors_bias", False)):
        raise UnsupportedModelError("mamba_proj_bias is not supported with ssm_multipliers; supported: false")
    return found


def _step(keys: Keys) -> tuple[float, float]:
    """The bounds of dt, where infinity is written in one way or the other."""
    bounds = keys.get("time_step_limit") or [0.0, math.inf]
    if isinstance(bounds, list) and len(bounds) == 2:
        low, high = (math.inf if bound == {"__float__": "Infinity"} else bound for bound in bounds)
        if type(low) in (int, float) and type(high) in (int, float) and 0 <= low < high:
            return float(low), float(high)
    raise ModelFileError(f"time_step_limit is {bounds!r:.80}, expected two numbers, the lower one first")


def _kda(keys: Keys, family: Family) -> StateConfig:
    table = {name: value for name, value in keys.table("linear_attn_config").items() if value is not None}
    nested = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"}
    nested["short_conv_kernel_size"] = "linear_conv_kernel_dim"
    own = Keys({name: table.get(key, keys.get(name)) for key, name in nested.items()}, {})
    heads, d = own.integer("linear_num_heads", 1, 4096), own.integer("linear_head_dim", 1, 1024)
    conv, eps = own.integer("linear_conv_kernel_dim", 2, 64), keys.number(family.eps, 0.0, 1.0, default=1e-6)
    return StateConfig("kda", heads, heads, d, d, conv, d**-0.5, norm=d, eps=eps)


_READERS: dict[str, Callable[[Keys, Family], StateConfig]] = {
    "lightning": _lightning,
    "gated_delta": _gated_delta,
    "mamba2": _mamba2,
    "kda": _kda,
}
