"""The facts of a model's config.json, checked once, with the defaults of its family.

Every number is bounded here, so that a file cannot make later code take memory without limit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lamina_protocols.messages.layers import Index, LayerSpec
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config_keys import Keys
from lamina_workers.model_config.families import FAMILIES
from lamina_workers.model_config.family import Family
from lamina_workers.model_config.mixers import (
    LatentConfig,
    Mixers,
    MoeConfig,
    StateConfig,
    latent_scale,
    read_index,
    read_kinds,
    read_latent,
    read_moe,
    read_states,
)
from lamina_workers.model_config.rope_config import RopeConfig, read_rope, read_ropes

_MAX_CONFIG_BYTES = 4 << 20
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_UNGATED = {"relu2": "relu2"}
_WINDOWS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Residuals:
    """What the residual stream is multiplied by before attention, a state layer or an MLP adds to it, and what that is
    multiplied by."""

    attention: tuple[float, float] = (1.0, 1.0)
    state: tuple[float, float] = (1.0, 1.0)
    mlp: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model's shape. Names are those of Hugging Face's config.json where it has one.

    How a family computes and names its tensors is in `families`. Tuples "by layer" have one item a layer.
    """

    architecture: str
    """The key of its family in `FAMILIES`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """The width of an MLP that is no expert."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """1 where attention is over latents."""
    head_dim: int
    """The numbers of q and k in a head; over latents: those of the latent and of what is rotated behind it."""
    v_head_dim: int
    """The numbers of v in a head; over latents: those of the latent, which is v."""
    rms_norm_eps: float
    max_position_embeddings: int
    """With what RoPE scaling adds; `rope.positions` is the file's own number."""
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    activation: str
    """That of MLPs, as kernels name it."""
    scale: float
    """It multiplies q.k."""
    soft_cap: float | None
    """A cap c turns a logit x of attention into c * tanh(x / c)."""
    logit_soft_cap: float | None
    """The same of the model's logits."""
    embedding_scale: float
    """It multiplies the embedding."""
    residuals: Residuals
    logit_scale: float
    """It multiplies the logits."""
    sinks: bool
    """Each query head has an attention sink, in every layer."""
    windows: tuple[int | None, ...]
    """By layer, the tokens that attention reads at most; None: all."""
    rotary: tuple[bool, ...]
    """By layer, whether attention has RoPE."""
    sparse: tuple[bool, ...]
    """By layer, whether there are experts in place of an MLP."""
    mixers: tuple[Mixers, ...]
    """By layer, attention and states in the order in which they are computed."""
    moe: MoeConfig | None
    rope: RopeConfig
    window_rope: RopeConfig | None
    """RoPE of layers with a window, where it is another one."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    states: StateConfig | None = None
    """The states of the layers that have one."""
    gate_scale: float = 1.0
    """It multiplies an MLP's gate."""
    kv_copies: int = 1
    """How often each KV head of the checkpoint stands here, one after another, so that more ranks can share."""
    latent: LatentConfig | None = None
    """The latents that attention is over; None: it is over K and V."""
    index: Index | None = None
    """How layers that are `indexed` choose what they read."""
    indexed: tuple[bool, ...] = ()
    """By layer, whether it has an index; empty: none has."""
    qk_normed: bool = True
    """Whether q and k are normed where the family has norms of them."""

    @property
    def rotary_dim(self) -> int:
        """The numbers of a head among which are those that RoPE turns."""
        return self.head_dim if self.latent is None else self.latent.rotary

    @property
    def family(self) -> Family:
        """How it computes, and names its tensors."""
        family = FAMILIES[self.architecture]
        return family if self.qk_normed else replace(family, qk_norm="")

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """The model in the folder `path`. Raises ModelFileError, UnsupportedModelError."""
        return cls.from_dict(read_config_json(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Check a parsed config.json.

        Raises UnsupportedModelError for what Lamina lacks, ModelFileError for what is missing or out of bounds.
        """
        return cls.of_family(*_family(raw), raw)

    @classmethod
    def of_family(cls, architecture: str, family: Family, raw: Mapping[str, Any]) -> ModelConfig:
        """Check a parsed config.json as one of `family`, which `architecture` names. Raises what `from_dict` raises."""
        family, keys = _read_family(family, raw)
        mixers, sparse = read_kinds(keys, family)
        layers = len(mixers)
        hidden = keys.integer("hidden_size", 1, 1 << 17)
        latent = read_latent(keys, hidden) if family.latent else None
        heads, kv_heads, head_dim = _heads(keys, hidden, latent)
        moe, sparse = (None, sparse) if sparse and not any(sparse) else read_moe(keys, family, layers, sparse)
        listed = _rotary(keys, family, layers)
        windows = _windows(keys, family, listed)
        rotary = tuple(window is not None for window in windows) if family.rotary == "windowed" else listed
        rope, window_rope = read_ropes(keys, head_dim if latent is None else latent.rotary, family)
        embedding, residual, logits = _scales(keys, family, layers, hidden)
        index, indexed = read_index(keys, family, layers, kv_heads, head_dim, latent.rotary if latent else 0)
        return cls(
            architecture=architecture,
            vocab_size=keys.integer("vocab_size", 1, 1 << 22),
            hidden_size=hidden,
            intermediate_size=keys.integer(family.mlp_size, int(not all(sparse)), 1 << 20),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=keys.integer("v_head_dim", 1, 1024, default=head_dim) if latent is None else latent.rank,
            rms_norm_eps=keys.number(family.eps, 0.0, 1.0, default=1e-6),
            max_position_embeddings=rope.context,
            tie_word_embeddings=keys.flag("tie_word_embeddings", False),
            qkv_bias=keys.holds(family.qkv_bias),
            o_bias=keys.holds(family.o_bias),
            mlp_bias=keys.holds(family.mlp_bias),
            activation=_activation(keys, family),
            scale=_scale(keys, head_dim) if latent is None else latent_scale(latent, rope),
            soft_cap=_soft_cap(keys, "attn_logit_softcapping"),
            logit_soft_cap=_soft_cap(keys, "final_logit_softcapping"),
            embedding_scale=embedding,
            residuals=_residuals(keys, family, residual),
            logit_scale=logits,
            sinks=family.sinks,
            windows=windows,
            rotary=rotary,
            sparse=sparse,
            mixers=mixers,
            moe=moe,
            rope=rope,
            window_rope=window_rope,
            bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
            eos_token_ids=keys.token_ids("eos_token_id"),
            latent=latent,
            index=index,
            indexed=indexed,
            qk_normed=keys.flag("use_qk_norm", True),
            states=read_states(keys, family) if any("state" in kinds for kinds in mixers) else None,
            gate_scale=_mlp_multipliers(keys)[0],
        )

    def with_rope_scaling(self, scaling: Mapping[str, Any]) -> ModelConfig:
        """This model with another RoPE scaling, given as config.json's `rope_scaling`; the base stays unless given."""
        own_parameters = {"rope_theta": self.rope.theta, "partial_rotary_factor": self.rope.turned / self.rotary_dim}
        family = replace(self.family, interleaved=self.rope.interleaved)
        other = read_rope({**own_parameters, **scaling}, self.rope.positions, self.rotary_dim, family)
        window_rope = self.window_rope
        if any(window is not None for window in self.windows) and self.family.windows == "pattern":
            window_rope = window_rope or self.rope  # a window needs no scaling
        scale = self.scale if self.latent is None else latent_scale(self.latent, other)
        return replace(self, rope=other, window_rope=window_rope, max_position_embeddings=other.context, scale=scale)

    def mixer_layers(self) -> tuple[tuple[int, Literal["attention", "state"]], ...]:
        """The layer and the kind of each mixer, in the order in which a forward pass comes to them: what messages call
        a layer. A layer that is an MLP alone has none."""
        return tuple((layer, kind) for layer, kinds in enumerate(self.mixers) for kind in kinds)

    @property
    def attention_layers(self) -> int:
        """How many layers have attention."""
        return sum("attention" in kinds for kinds in self.mixers)

    def has_mlp(self, layer: int) -> bool:
        """Whether a layer has an MLP or experts."""
        return self.family.mixers != "alternating" or not self.mixers[layer]

    def layer_ropes(self) -> tuple[RopeConfig | None, ...]:
        """RoPE of each mixer; None where it has none."""
        windowed = self.window_rope or self.rope
        return tuple(
            (self.rope if self.windows[layer] is None else windowed)
            if kind == "attention" and self.rotary[layer]
            else None
            for layer, kind in self.mixer_layers()
        )

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The specification of each mixer for holders."""
        return tuple(
            self.states.spec(mixer, layer, self.num_hidden_layers)
            if kind == "state" and self.states is not None
            else self._attention_spec(mixer, layer)
            for mixer, (layer, kind) in enumerate(self.mixer_layers())
        )

    def _attention_spec(self, mixer: int, layer: int) -> LayerSpec:
        return LayerSpec(
            kv_layer=mixer,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            d_k=self.head_dim,
            d_v=self.v_head_dim,
            scale=self.scale,
            window=self.windows[layer],
            soft_cap=self.soft_cap,
            kind="attention" if self.latent is None else "latent",
            index=self.index if self.indexed and self.indexed[layer] else None,
        )


def read_config_json(path: str | Path, name: str = "config.json") -> dict[str, Any]:
    """Read a config in the folder `path`. Raises ModelFileError where it is missing or no JSON object."""
    file = Path(path) / name
    try:
        if (size := file.stat().st_size) > _MAX_CONFIG_BYTES:
            raise ModelFileError(f"{file} has {size} bytes, allowed are {_MAX_CONFIG_BYTES}")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"cannot read {file}: {error}") from error
    if not isinstance(raw, dict):
        raise ModelFileError(f"{file} holds a {type(raw).__name__}, expected an object")
    return raw


def _read_family(family: Family, raw: Mapping[str, Any]) -> tuple[Family, Keys]:
    """A family with what the config changes of it, and the config's keys by their usual names."""
    if family.multimodal and isinstance(text := raw.get("text_config"), Mapping):
        raw = {**raw, **text}
    keys = Keys({**raw, **{name: raw[key] for key, name in family.aliases.items() if key in raw}}, family.defaults)
    if keys.given("use_bidirectional_attention") and keys.flag("use_bidirectional_attention", False):
        raise UnsupportedModelError("use_bidirectional_attention is not supported; supported: causal attention")
    if keys.given("rope_interleave"):
        family = replace(family, interleaved=keys.flag("rope_interleave", True))
    return family, keys


def _family(raw: Mapping[str, Any]) -> tuple[str, Family]:
    """The architecture's name and family, by `architectures`, else by `model_type`."""
    named = raw.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        if (family := FAMILIES.get(named[0])) is not None:
            return named[0], family
        request = f"architecture {named[0]!r:.80}"
    else:
        request = f"model_type {raw.get('model_type')!r:.80}"
        for architecture, family in FAMILIES.items():
            if family.model_type == raw.get("model_type"):
                return architecture, family
    raise UnsupportedModelError(f"{request} is not supported; supported: {', '.join(FAMILIES)}")


def _activation(keys: Keys, family: Family) -> str:
    """The activation of MLPs, as kernels name it."""
    if family.ungated_mlp:
        name, kernels, activation = "mlp_hidden_act", _UNGATED, keys.text("mlp_hidden_act")
    else:
        name, kernels = "hidden_activation" if keys.given("hidden_activation") else "hidden_act", _ACTIVATIONS
        activation = keys.text(name, "silu")
    if activation not in kernels:
        raise UnsupportedModelError(
            f"{name} {activation!r} is not supported; supported: {', '.join(map(repr, kernels))}"
        )
    return kernels[activation]


def _heads(keys: Keys, hidden: int, latent: LatentConfig | None) -> tuple[int, int, int]:
    """Query heads, KV heads, and the numbers in each."""
    heads = keys.integer("num_attention_heads", 1, 4096)
    if latent is not None:
        return heads, 1, latent.rank + latent.rotary
    kv_heads = keys.integer("num_key_value_heads", 1, 4096, default=heads)
    if heads % kv_heads:
        raise ModelFileError(f"num_key_value_heads {kv_heads} must divide num_attention_heads {heads}")
    if not keys.given("head_dim") and hidden % heads:
        raise ModelFileError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = keys.integer("head_dim", 4, 1024, default=hidden // heads)
    if head_dim % 2:
        raise ModelFileError(f"head_dim {head_dim} is odd; RoPE needs an even one")
    return heads, kv_heads, head_dim


def _scales(keys: Keys, family: Family, layers: int, hidden: int) -> tuple[float, float, float]:
    """What multiplies the embedding, what layers add, and the logits."""
    embedding, residual, logits = (keys.number(key, 1e-6, 1e6, 1.0) if key else 1.0 for key in family.scales)
    if family.embedding_root:
        embedding *= hidden**0.5
    if family.depth_scales:
        residual = keys.number("scale_depth", 1e-6, 1e6, default=layers**0.5) / layers**0.5
        logits = hidden / keys.number("dim_model_base", 1.0, 1e6, default=hidden)
    return embedding, residual, 1 / logits if family.divides_logits else logits


def _scale(keys: Keys, head_dim: int) -> float:
    if keys.given("key_multiplier"):  # Falcon-H1
        q_and_k = keys.number("attention_in_multiplier", 1e-6, 1e6, default=1.0) ** 2
        return q_and_k * keys.number("key_multiplier", 1e-6, 1e6) / math.sqrt(head_dim)
    if keys.given("attention_multiplier"):  # Granite
        return keys.number("attention_multiplier", 1e-6, 1e6)
    return 1 / math.sqrt(keys.number("query_pre_attn_scalar", 1e-6, 1e6, default=head_dim))  # Gemma


def _soft_cap(keys: Keys, name: str) -> float | None:
    return keys.number(name, 1e-3, 1e6) if keys.given(name) else None


def _windows(keys: Keys, family: Family, rotary: tuple[bool, ...]) -> tuple[int | None, ...]:
    layers = len(rotary)
    on = family.windows in ("always", "pattern") or (
        family.windows != "never" and keys.flag("use_sliding_window", False)
    )
    if not on or not keys.given("sliding_window"):
        return (None,) * layers
    window = keys.integer("sliding_window", 1, 1 << 30)
    if family.windows in ("always", "flag"):
        return (window,) * layers
    if keys.given("layer_types"):
        kinds = keys.items("layer_types", _WINDOWS, layers)
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family.windows == "pattern":
        pattern = keys.integer("sliding_window_pattern", 1, 1024, default=family.pattern)
        return tuple(window if (layer + 1) % pattern else None for layer in range(layers))
    if family.rotary == "listed":  # SmolLM3 windows the layers that have no RoPE
        return tuple(None if rotates else window for rotates in rotary)
    first = keys.integer("max_window_layers", 0, 1024)
    return tuple(window if layer >= first else None for layer in range(layers))


def _residuals(keys: Keys, family: Family, added: float) -> Residuals:
    """`added`: what all that is added to the residual stream is multiplied by."""
    factors = {"attention": (1.0, added), "state": (1.0, added), "mlp": (1.0, added)}
    for part, (stream, addition) in family.factors.items():
        factors[part] = keys.number(stream, -1e6, 1e6, default=1.0), keys.number(addition, -1e6, 1e6, default=1.0)
    if family.mixers == "both":  # what multiplies v multiplies the output; with a bias it would not
        into, out = (keys.number(f"attention_{way}_multiplier", 1e-6, 1e6, default=1.0) for way in ("in", "out"))
        if into != 1.0 and keys.flag("attention_bias", False):
            raise UnsupportedModelError("attention_bias is not supported with attention_in_multiplier")
        factors["attention"] = 1.0, into * out
        factors["state"] = 1.0, keys.number("ssm_out_multiplier", 1e-6, 1e6, default=1.0)
        factors["mlp"] = 1.0, _mlp_multipliers(keys)[1]
    return Residuals(**factors)


def _mlp_multipliers(keys: Keys) -> tuple[float, ...]:
    """Falcon-H1's, of an MLP's gate, and of what it gives."""
    return keys.numbers("mlp_multipliers", 1e-6, 1e6, 2) if keys.given("mlp_multipliers") else (1.0, 1.0)


def _rotary(keys: Keys, family: Family, layers: int) -> tuple[bool, ...]:
    """Which layers have RoPE, where windows do not say so.

    SmolLM3: `no_rope_layers` has, despite its name, 1 for a layer with RoPE. Without it, every nth has none.
    """
    if family.rotary != "listed":
        return (family.rotary != "typed" or keys.get("position_embedding_type") == "rope",) * layers
    if keys.given("no_rope_layers"):
        return tuple(item == 1 for item in keys.items("no_rope_layers", (0, 1), layers))
    interval = keys.integer("no_rope_layer_interval", 1, 1024, default=4)
    return tuple((layer + 1) % interval != 0 for layer in range(layers))
