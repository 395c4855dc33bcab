"""The facts of a model's config.json, checked once, with the defaults of each supported family.

Every number is bounded here, so that a file cannot make later code take memory without limit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lamina_protocols.messages import LayerSpec
from lamina_workers.decoder.config_keys import Keys
from lamina_workers.decoder.rope import ROPE_TYPES, RopeConfig
from lamina_workers.errors import ModelFileError, UnsupportedModelError

_MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Family:
    """How one architecture differs from Llama. `defaults` stand in for keys that a config leaves out."""

    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | None = None  # None: the config's attention_bias says, and o_proj follows it
    qk_norm: bool = False
    windows: Literal["never", "always", "flag", "layers"] = "never"  # flag, layers: if use_sliding_window
    expert_size: str = ""  # the config's name for the width of one expert; "": there are none
    nope: bool = False  # some layers have no RoPE


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama"),
    "MistralForCausalLM": _Family("mistral", {"sliding_window": 4096, "num_key_value_heads": 8}, windows="always"),
    "Qwen2ForCausalLM": _Family("qwen2", {"sliding_window": 4096}, qkv_bias=True, windows="layers"),
    "Qwen3ForCausalLM": _Family("qwen3", {"sliding_window": 4096, "head_dim": 128}, qk_norm=True, windows="layers"),
    "SmolLM3ForCausalLM": _Family(
        "smollm3", {"rope_theta": 2e6, "tie_word_embeddings": True}, windows="layers", nope=True
    ),
    "MixtralForCausalLM": _Family(
        "mixtral",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "norm_topk_prob": True},
        windows="always",
        expert_size="intermediate_size",
    ),
    "Qwen3MoeForCausalLM": _Family(
        "qwen3_moe",
        {"sliding_window": 4096},
        qk_norm=True,
        windows="flag",
        expert_size="moe_intermediate_size",
    ),
}

_ROPE_RANGES = {
    "factor": (1.0, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
    "attention_factor": (1e-6, 1e3),
}
_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# "finetuned" says only how a checkpoint came to be; the rest is read by name.
_ROPE_KEYS = {*_ROPE_RANGES, "type", "rope_type", "rope_theta", "original_max_position_embeddings", "truncate"} | {
    "partial_rotary_factor",
    "finetuned",
}


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Mixture of experts: of `experts` MLPs of `intermediate_size`, each token takes the `top_k` best.

    `normalize`: the weights of those taken are divided by their sum.
    """

    experts: int
    top_k: int
    intermediate_size: int
    normalize: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model's shape. Names are those of Hugging Face's config.json where it has one.

    `max_position_embeddings` counts what RoPE scaling adds; `rope.positions` is the file's own number.
    `kv_copies`: how often each KV head of the checkpoint stands here, one after another, so that more ranks can share.
    Per layer: `windows` (None attends all), `rotary` (False: no RoPE), `sparse` (True: experts in place of an MLP).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rotary: tuple[bool, ...]
    sparse: tuple[bool, ...]
    moe: MoeConfig | None
    rope: RopeConfig
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    kv_copies: int = 1

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` in the folder `path`. Raises ModelFileError where it is missing or no JSON object."""
        file = Path(path) / "config.json"
        try:
            if (size := file.stat().st_size) > _MAX_CONFIG_BYTES:
                raise ModelFileError(f"{file} has {size} bytes, allowed are {_MAX_CONFIG_BYTES}")
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelFileError(f"cannot read {file}: {error}") from error
        if not isinstance(raw, dict):
            raise ModelFileError(f"{file} holds a {type(raw).__name__}, expected an object")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Check a parsed config.json.

        Raises UnsupportedModelError for what Lamina lacks, ModelFileError for what is missing or out of bounds.
        """
        architecture, family = _family(raw)
        keys = Keys(raw, family.defaults)
        if (activation := keys.text("hidden_act", "silu")) != "silu":
            raise UnsupportedModelError(f"hidden_act {activation!r} is not supported; supported: 'silu'")
        layers = keys.integer("num_hidden_layers", 1, 1024)
        hidden = keys.integer("hidden_size", 1, 1 << 17)
        heads = keys.integer("num_attention_heads", 1, 4096)
        kv_heads = keys.integer("num_key_value_heads", 1, 4096, default=heads)
        if heads % kv_heads:
            raise ModelFileError(f"num_key_value_heads {kv_heads} must divide num_attention_heads {heads}")
        if not keys.given("head_dim") and hidden % heads:
            raise ModelFileError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = keys.integer("head_dim", 4, 1024, default=hidden // heads)
        if head_dim % 2:
            raise ModelFileError(f"head_dim {head_dim} is odd; RoPE needs an even one")
        moe, sparse = _moe(keys, family, layers)
        rotary = _rotary(keys, layers) if family.nope else (True,) * layers
        bias = keys.flag("attention_bias", False)
        rope = _rope(_rope_parameters(keys), keys.integer("max_position_embeddings", 1, 1 << 30))
        return cls(
            architecture=architecture,
            vocab_size=keys.integer("vocab_size", 1, 1 << 22),
            hidden_size=hidden,
            intermediate_size=keys.integer("intermediate_size", 1, 1 << 20),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=keys.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
            max_position_embeddings=rope.context,
            tie_word_embeddings=keys.flag("tie_word_embeddings", False),
            qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=bias if family.qkv_bias is None else False,
            mlp_bias=keys.flag("mlp_bias", False),
            qk_norm=family.qk_norm,
            windows=_windows(keys, family, rotary),
            rotary=rotary,
            sparse=sparse,
            moe=moe,
            rope=rope,
            bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
            eos_token_ids=keys.token_ids("eos_token_id"),
        )

    def with_rope_scaling(self, scaling: Mapping[str, Any]) -> ModelConfig:
        """This model with another RoPE scaling, given as config.json's `rope_scaling`; the base stays unless given."""
        rope = _rope({"rope_theta": self.rope.theta, **scaling}, self.rope.positions)
        return replace(self, rope=rope, max_position_embeddings=rope.context)

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The specification of each layer for holders."""
        return tuple(
            LayerSpec(
                kv_layer=layer,
                heads=self.num_attention_heads,
                kv_heads=self.num_key_value_heads,
                d_k=self.head_dim,
                d_v=self.head_dim,
                scale=self.head_dim**-0.5,
                window=window,
            )
            for layer, window in enumerate(self.windows)
        )

    def fingerprint(self) -> str:
        """Hex SHA-256 over every field: two ends with the same fingerprint mean the same computation."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _family(raw: Mapping[str, Any]) -> tuple[str, _Family]:
    """The architecture's name and family, by `architectures`, else by `model_type`."""
    named = raw.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        if (family := _FAMILIES.get(named[0])) is not None:
            return named[0], family
        wanted = f"architecture {named[0]!r}"
    else:
        wanted = f"model_type {raw.get('model_type')!r}"
        for architecture, family in _FAMILIES.items():
            if family.model_type == raw.get("model_type"):
                return architecture, family
    raise UnsupportedModelError(f"{wanted} is not supported; supported: {', '.join(_FAMILIES)}")


def _windows(keys: Keys, family: _Family, rotary: tuple[bool, ...]) -> tuple[int | None, ...]:
    layers = len(rotary)
    on = family.windows == "always" or (family.windows != "never" and keys.flag("use_sliding_window", False))
    if not on or not keys.given("sliding_window"):
        return (None,) * layers
    window = keys.integer("sliding_window", 1, 1 << 30)
    if family.windows != "layers":
        return (window,) * layers
    if keys.given("layer_types"):
        kinds = keys.items("layer_types", ("full_attention", "sliding_attention"), layers)
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family.nope:  # SmolLM3 windows the layers that have no RoPE
        return tuple(None if rotates else window for rotates in rotary)
    first = keys.integer("max_window_layers", 0, 1024, default=28)
    return tuple(window if layer >= first else None for layer in range(layers))


def _rotary(keys: Keys, layers: int) -> tuple[bool, ...]:
    """SmolLM3: `no_rope_layers` has, despite its name, 1 for a layer with RoPE. Without it, every nth has none."""
    if keys.given("no_rope_layers"):
        return tuple(item == 1 for item in keys.items("no_rope_layers", (0, 1), layers))
    interval = keys.integer("no_rope_layer_interval", 1, 1024, default=4)
    return tuple((layer + 1) % interval != 0 for layer in range(layers))


def _moe(keys: Keys, family: _Family, layers: int) -> tuple[MoeConfig | None, tuple[bool, ...]]:
    if not family.expert_size:
        return None, (False,) * layers
    # transformers 5 writes num_local_experts also where published configs have num_experts.
    experts = keys.integer("num_local_experts" if keys.given("num_local_experts") else "num_experts", 1, 4096)
    config = MoeConfig(
        experts=experts,
        top_k=keys.integer("num_experts_per_tok", 1, experts),
        intermediate_size=keys.integer(family.expert_size, 1, 1 << 20),
        normalize=keys.flag("norm_topk_prob", False),
    )
    step = keys.integer("decoder_sparse_step", 1, 1024, default=1)
    dense = set(keys.items("mlp_only_layers", range(1024)))
    return config, tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _rope_parameters(keys: Keys) -> dict[str, Any]:
    """RoPE's parameters from where transformers 4 (`rope_scaling` beside `rope_theta`) or 5 puts them."""
    found = keys.table("rope_scaling") or keys.table("rope_parameters")
    beside = ("rope_theta", "original_max_position_embeddings")
    return {**{name: keys.get(name) for name in beside if keys.given(name)}, **found}


def _rope(parameters: Mapping[str, Any], positions: int) -> RopeConfig:
    """Check RoPE parameters. What is unknown is refused, since ignoring it would compute something else."""
    keys = Keys(parameters, {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0})
    kind = keys.text("rope_type", keys.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(f"RoPE type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if unknown := sorted(parameters.keys() - _ROPE_KEYS):
        raise UnsupportedModelError(
            f"RoPE parameter {unknown[0]!r} is not supported; supported: {', '.join(sorted(_ROPE_KEYS))}"
        )
    if (partial := keys.number("partial_rotary_factor", 0.0, 1.0)) != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor {partial:g} is not supported; supported: 1")
    original = keys.integer("original_max_position_embeddings", 1, 1 << 30, default=positions)
    numbers = {
        name: keys.number(name, *bounds)
        for name, bounds in _ROPE_RANGES.items()
        if keys.given(name) or name in _ROPE_REQUIRED[kind]
    }
    if kind == "yarn":
        numbers.setdefault("factor", max(1.0, positions / original))
    if kind == "llama3" and not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        raise ModelFileError(f"high_freq_factor is {high:g}, expected more than low_freq_factor {low:g}")
    return RopeConfig(
        kind=kind,
        theta=keys.number("rope_theta", 1.001, 1e15),
        positions=positions,
        original=original,
        truncate=keys.flag("truncate", True),
        **numbers,
    )
