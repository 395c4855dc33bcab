"""What the layers of a model are made of, as its config.json says it: attention over heads or latents, indexes,
recurrent states, and MLPs or experts. All is checked once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lamina_kernels.states.layout import CONVS, SIZES
from lamina_protocols.messages.layers import Index, LayerSpec
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config_keys import Keys
from lamina_workers.model_config.family import Family
from lamina_workers.model_config.rope_config import RopeConfig, scaled_attention


@dataclass(frozen=True, slots=True)
class StateConfig:
    """The states of a model's layers that keep one. How a family computes and names its tensors is in `families`."""

    kind: str
    """That of the layers' `LayerSpec`."""
    heads: int
    """States of a layer, each of `d_k` times `d_v` numbers."""
    key_heads: int
    """Heads of q and k. Each belongs to heads / key_heads states."""
    d_k: int
    d_v: int
    conv: int
    """The width of the convolution; 0: there is none."""
    scale: float
    """It multiplies q."""
    norm: int
    """The numbers of the output that are normed together; 0: none are."""
    eps: float
    """The norm's epsilon."""
    norm_first: bool = True
    """The output is normed before it is multiplied by its gate."""
    slopes: tuple[float, ...] = ()
    """By head, lightning's log decay a token, before a layer's own factor."""
    bias: bool = False
    """The maps into the layer have biases."""
    out_bias: bool = False
    """So has the map out of it."""
    conv_bias: bool = False
    skip: bool = False
    """An input adds to the output past the state."""
    step: tuple[float, float] = (0.0, math.inf)
    """The bounds of Mamba2's dt."""
    factors: tuple[float, ...] = (1.0,) * 5
    """They multiply what is projected: the output's gate, v, k, q and dt."""
    key_copies: int = 1
    """How often each head of q and k of the checkpoint stands here, one after another, so that more ranks can share."""

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

    def name(key: str) -> str:
        return named.get(key, f"mamba_{key}")

    heads, groups = keys.integer(name("n_heads"), 1, 4096), keys.integer(name("n_groups"), 1, 4096, default=1)
    inner = keys.integer("mamba_expand", 1, 64, default=2) * keys.integer("hidden_size", 1, 1 << 17)
    if family.mixers == "both":
        inner = keys.integer("mamba_d_ssm", 1, 1 << 20)
    has_width = keys.get(name("d_head")) not in (None, "auto")
    d_v = keys.integer(name("d_head"), 1, 1024) if has_width else inner // heads
    if not nemotron and heads * d_v != inner:
        raise ModelFileError(f"mamba_n_heads {heads} of {d_v} numbers are {heads * d_v}; allowed: {inner}")
    if heads % groups:
        raise ModelFileError(f"{name('n_groups')} {groups} must divide {name('n_heads')} {heads}")
    bias = keys.flag("use_bias" if nemotron else "mamba_proj_bias", False)
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
        bias=bias,
        out_bias=keys.flag("projectors_bias", False) if family.mixers == "both" else bias,
        conv_bias=keys.flag(name("conv_bias"), True),
        skip=True,
        step=_step(keys),
        factors=_factors(keys),
    )


def _factors(keys: Keys) -> tuple[float, ...]:
    """Falcon-H1's, with that of the input."""
    multipliers = keys.numbers("ssm_multipliers", 1e-6, 1e6, 5) if keys.given("ssm_multipliers") else (1.0,) * 5
    into = keys.number("ssm_in_multiplier", 1e-6, 1e6, default=1.0)
    factors = tuple(into * multiplier for multiplier in multipliers)
    if factors != (1.0,) * 5 and keys.flag("mamba_proj_bias", False):
        raise UnsupportedModelError("mamba_proj_bias is not supported with ssm_multipliers; supported: false")
    return factors


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
    linear = Keys({name: table.get(key, keys.get(name)) for key, name in nested.items()}, {})
    heads, d = linear.integer("linear_num_heads", 1, 4096), linear.integer("linear_head_dim", 1, 1024)
    conv, eps = linear.integer("linear_conv_kernel_dim", 2, 64), keys.number(family.eps, 0.0, 1.0, default=1e-6)
    return StateConfig("kda", heads, heads, d, d, conv, d**-0.5, norm=d, eps=eps)


_READERS: dict[str, Callable[[Keys, Family], StateConfig]] = {
    "lightning": _lightning,
    "gated_delta": _gated_delta,
    "mamba2": _mamba2,
    "kda": _kda,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """How a router's logits choose experts and weigh them, beyond the `top_k` best of a softmax."""

    groups: int = 1
    """Experts stand in so many groups of neighbours. A group is as good as its best expert; with `sigmoid` as its two
    best together."""
    top_groups: int = 1
    """The best groups, in which experts are chosen."""
    sigmoid: bool = False
    """Scores are sigmoids, and a bias of each expert is added to choose, not to weigh."""
    scale: float = 1.0
    """It multiplies the weights."""


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Mixture of experts: of `experts` MLPs of `intermediate_size`, each token takes the `top_k` best."""

    experts: int
    top_k: int
    intermediate_size: int
    normalize: bool
    """The weights of the experts taken are divided by their sum."""
    bias: bool = False
    """The router and every expert have biases."""
    clamp: float | None = None
    """The limit of the gate, of the model's other MLPs too: `lamina_workers.decoder.moe.ClampedGate`; None: silu."""
    alpha: float = 1.0
    """The clamped gate's factor."""
    shared: int = 0
    """The width of one more expert, which all tokens take; 0: there is none."""
    shared_gate: bool = True
    """The shared expert is weighted by a gate of its own."""
    stacked: Literal["", "rows", "floats", "mxfp4"] = ""
    """How the checkpoint keeps all experts of a layer in one tensor, see `decoder_weights`; "": each has its own."""
    choice: Choice = Choice()
    latent: int = 0
    """The width of what experts take and give, between a map down to it and one up from it; 0: the model's."""


def read_moe(
    keys: Keys, family: Family, layers: int, sparse: tuple[bool, ...] | None = None
) -> tuple[MoeConfig | None, tuple[bool, ...]]:
    """The experts of a model, None where there are none, and which of its layers have them: `sparse`, if given."""
    config: MoeConfig | None
    if family.groups:
        config, layout = _grouped(keys, family, layers)
    elif family.expert_size:
        config, layout = _plain(keys, family, layers)
    else:
        return None, (False,) * layers
    if config is None:
        return None, layout
    if family.experts.always:
        config = replace(config, stacked="rows")
    if family.clamped:
        clamp = keys.number("swiglu_limit", 0.0, 1e6, default=7.0)
        config = replace(config, clamp=clamp, alpha=keys.number("swiglu_alpha", 0.0, 1e3, default=1.702))
    return config, layout if sparse is None else sparse


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
        shared=keys.integer(family.shared_expert, 0, 1 << 20) if family.shared_expert else 0,
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


Mixers = tuple[Literal["attention", "state"], ...]
"""What a layer has of attention and state, in the order in which a forward pass comes to it."""

ATTENTION: Mixers = ("attention",)
_STATE: Mixers = ("state",)
_KINDS: Mapping[str, Mixers] = {
    "full_attention": ATTENTION,
    "linear_attention": _STATE,
    "attention": ATTENTION,
    "mamba": _STATE,
}
_MLPS: Mapping[str, Mixers] = {"mlp": (), "moe": ()}  # in place of a mixer
_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_NAMES = ("layer_types", "layers_block_type")


def read_kinds(keys: Keys, family: Family) -> tuple[tuple[Mixers, ...], tuple[bool, ...] | None]:
    """The mixers of each layer, and which layers have experts, where the kinds of layers say that, else None.

    Raises UnsupportedModelError for another kind of layer, ModelFileError where kinds and num_hidden_layers differ.
    """
    if family.states is None or family.mixers == "both":
        mixers: Mixers = ATTENTION if family.states is None else ("state", "attention")
        return (mixers,) * keys.integer("num_hidden_layers", 1, 1024), None
    if (kinds := _kinds(keys)) is None:
        every = keys.integer("full_attention_interval", 1, 1024)
        layers = keys.integer("num_hidden_layers", 1, 1024)
        return tuple(_STATE if (layer + 1) % every else ATTENTION for layer in range(layers)), None
    if len(kinds) != keys.integer("num_hidden_layers", 1, 1024, default=min(len(kinds), 1024)):
        raise ModelFileError(f"num_hidden_layers is {keys.get('num_hidden_layers')}, expected {len(kinds)} as kinds")
    allowed = {**_KINDS, **(_MLPS if family.mixers == "alternating" else {})}
    for kind in kinds:
        if not isinstance(kind, str) or kind not in allowed:
            raise UnsupportedModelError(f"layer_types has {kind!r:.80}; allowed: {', '.join(map(repr, allowed))}")
    if not kinds or kinds[0] in _MLPS:
        raise UnsupportedModelError(f"the first layer is {next(iter(kinds), None)!r}; allowed: attention or a state")
    sparse = tuple(kind == "moe" for kind in kinds) if family.mixers == "alternating" else None
    return tuple(allowed[str(kind)] for kind in kinds), sparse


def _kinds(keys: Keys) -> Sequence[object] | None:
    if keys.given("hybrid_override_pattern"):
        return [_LETTERS.get(letter, letter) for letter in keys.text("hybrid_override_pattern")]
    if not keys.given("layer_types") and (full := keys.table("linear_attn_config").get("full_attn_layers")) is not None:
        layers = keys.integer("num_hidden_layers", 1, 1024)  # Kimi counts them from 1
        return [
            "full_attention" if isinstance(full, list) and i in full else "linear_attention"
            for i in range(1, layers + 1)
        ]
    name = next((name for name in _NAMES if keys.given(name)), None)
    if name is None and keys.given("full_attention_interval"):
        return None
    kinds = keys.get(name or _NAMES[0])
    if not isinstance(kinds, list):
        raise ModelFileError(f"{name or _NAMES[0]} is {kinds!r:.80}, expected a list of kinds, one a layer")
    return kinds


_NOTHING: tuple[Index | None, tuple[bool, ...]] = (None, ())


def read_index(
    keys: Keys, family: Family, layers: int, kv_heads: int, head_dim: int, rotary: int
) -> tuple[Index | None, tuple[bool, ...]]:
    """The index of a model, None where there is none, and which of its layers have it. `rotary`: how many of a latent's
    numbers are rotated."""
    if family.index == "blocks":
        return _of_blocks(keys, layers, kv_heads, head_dim)
    return _of_tokens(keys, layers, rotary) if family.index == "tokens" else _NOTHING


def _of_blocks(keys: Keys, layers: int, kv_heads: int, head_dim: int) -> tuple[Index | None, tuple[bool, ...]]:
    """MiniMax-M3's: one index query for each KV head, rotated as the queries are."""
    if not keys.given("layer_types"):
        return _NOTHING
    kinds = keys.items("layer_types", ("full_attention", "minimax_m3_sparse"), layers)
    for name, only in (("index_n_heads", kv_heads), ("index_head_dim", head_dim)):
        if (value := keys.integer(name, 1, 4096, default=only)) != only:
            raise UnsupportedModelError(f"{name} {value} is not supported; supported for this model: {only}")
    block, top = (keys.integer(name, 1, 1 << 16) for name in ("index_block_size", "index_topk_blocks"))
    index = Index(head_dim, 1, block, top, keys.integer("index_local_blocks", 0, top, default=1))
    return index, tuple(kind == "minimax_m3_sparse" for kind in kinds)


def _of_tokens(keys: Keys, layers: int, rotary: int) -> tuple[Index, tuple[bool, ...]]:
    """DeepSeek V3.2's: several weighted index queries for all heads, whose first numbers are rotated."""
    if not keys.given("q_lora_rank"):
        raise ModelFileError("q_lora_rank is missing from the model's config, which index queries are made of")
    shared = keys.given("indexer_types") and "shared" in keys.items("indexer_types", ("full", "shared"), layers)
    if shared or keys.given("index_topk_pattern") or keys.integer("index_topk_freq", 0, 1024, default=1) > 1:
        raise UnsupportedModelError(
            "indexer_types 'shared', layers that take over the choice of another, is not supported"
        )
    width = keys.integer("index_head_dim", rotary, 4096)
    index = Index(
        width, keys.integer("index_n_heads", 1, 1024), 1, keys.integer("index_topk", 1, 1 << 16), weighted=True
    )
    return index, (True,) * layers


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): k and v of all heads are linear in one vector of
    `rank` numbers, the latent, but for `rotary` more numbers of k, which are rotated and shared by all heads.
    """

    query_rank: int
    """The numbers of the vector that queries are made of; 0: they are made of the residual stream."""
    rank: int
    plain: int
    """The numbers of a head of q and k beside the rotated ones."""
    rotary: int
    value: int
    """The numbers of a head of v."""


def read_latent(keys: Keys, hidden: int) -> LatentConfig:
    """The latents of a model whose residual stream has `hidden` numbers."""
    if keys.flag("attention_bias", False):
        raise UnsupportedModelError("attention_bias is not supported for latent attention; supported: false")
    value = hidden // keys.integer("num_attention_heads", 1, 4096)  # MiniCPM3 leaves it out
    return LatentConfig(
        query_rank=keys.integer("q_lora_rank", 1, 1 << 16) if keys.given("q_lora_rank") else 0,
        rank=keys.integer("kv_lora_rank", 16, 1 << 12),
        plain=keys.integer("qk_nope_head_dim", 1, 1024),
        rotary=keys.integer("qk_rope_head_dim", 2, 1024),
        value=keys.integer("v_head_dim", 1, 1024, default=value),
    )


def latent_scale(latent: LatentConfig, rope: RopeConfig) -> float:
    """What multiplies q.k: with RoPE that is scaled, and `mscale_all_dim`, YaRN's factor for longer contexts too."""
    mscale = scaled_attention(rope.factor, rope.mscale_all_dim) if rope.kind != "default" else 1.0
    return float(mscale**2 / math.sqrt(latent.plain + latent.rotary))
