"""The architectures of GGUF files that are models of native families, and their config.json.

What each has in its metadata follows from the family's description (`lamina_workers.model_config.family`), under the
names of llama.cpp's converter; `ARCHITECTURES` is what remains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lamina.models.gguf_files import GgufFile
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.families import FAMILIES
from lamina_workers.model_config.family import Family

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
_SIGMOID = 2  # of expert_gating_func
_MAX_LAYERS = 1024
_MAX_EXPERTS = 1 << 16  # of all layers, each with its tensors' records; the largest known models have 24,000


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of GGUF: the name in `FAMILIES` of what it is, and how llama.cpp's converter lays it out."""

    native: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """What its config.json has in any case."""
    interleaved: bool = False
    """The rows of q and k are put so that RoPE turns neighbours."""
    tiled: bool = False
    """Value heads of states stand in the order of their places in a group, not of the groups."""
    norm_behind: bool = False
    """The norm before an MLP is called that behind attention."""


_GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", interleaved=True),
    "mistral": Architecture("MistralForCausalLM", interleaved=True),  # llama.cpp calls these two llama as well
    "mixtral": Architecture("MixtralForCausalLM", interleaved=True),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen2moe": Architecture("Qwen2MoeForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", {"norm_topk_prob": True}),
    "qwen3next": Architecture("Qwen3NextForCausalLM", norm_behind=True),
    "qwen35": Architecture("Qwen3_5ForCausalLM", tiled=True, norm_behind=True),
    "qwen35moe": Architecture("Qwen3_5MoeForCausalLM", tiled=True, norm_behind=True),
    "gemma2": Architecture("Gemma2ForCausalLM", _GEMMA),
    "gemma3": Architecture("Gemma3ForCausalLM", _GEMMA),
    "gpt-oss": Architecture("GptOssForCausalLM", {"rope_scaling": {"rope_type": "default"}}, norm_behind=True),
    "gemma4": Architecture("Gemma4ForCausalLM"),  # transformers' code computes it: `gguf_gemma4`
    "phi3": Architecture("Phi3ForCausalLM"),
    "granite": Architecture("GraniteForCausalLM", interleaved=True),
    "granitehybrid": Architecture("GraniteMoeHybridForCausalLM", {"num_local_experts": 0}, interleaved=True),
    "granitemoe": Architecture("GraniteMoeHybridForCausalLM", {"num_local_experts": 0}, interleaved=True),
    "glm4": Architecture("Glm4ForCausalLM"),
    "glm4moe": Architecture("Glm4MoeForCausalLM", norm_behind=True),
    "olmo2": Architecture("Olmo2ForCausalLM"),
    "olmo3": Architecture("Olmo3ForCausalLM"),  # llama.cpp calls it olmo2
    "cohere2": Architecture("Cohere2ForCausalLM"),
    "deepseek2": Architecture("DeepseekV2ForCausalLM"),
    "deepseek3": Architecture("DeepseekV3ForCausalLM"),  # llama.cpp calls it deepseek2
    "deepseek32": Architecture("DeepseekV32ForCausalLM"),
    "glm-dsa": Architecture("GlmMoeDsaForCausalLM"),
    "minicpm3": Architecture("MiniCPM3ForCausalLM"),
    "smollm3": Architecture("SmolLM3ForCausalLM", interleaved=True),
    "seed_oss": Architecture("SeedOssForCausalLM", norm_behind=True),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM"),
    "hunyuan-dense": Architecture("HunYuanDenseV1ForCausalLM"),
    "falcon-h1": Architecture("FalconH1ForCausalLM", {"mamba_norm_before_gate": False}),  # the rest is in the weights
    "nemotron_h": Architecture("NemotronHForCausalLM", interleaved=True),
    "nemotron_h_moe": Architecture("NemotronHForCausalLM", interleaved=True),
    "kimi-linear": Architecture("KimiLinearForCausalLM"),
    "minimax-m2": Architecture("MiniMaxM2ForCausalLM"),
}


class Keys:
    """Typed, bounded reads of one architecture's metadata."""

    def __init__(self, file: GgufFile) -> None:
        self._path, self._metadata = file.path, file.metadata
        self._prefix: str = value_of(file.path, file.metadata, "general.architecture", str, None)
        self.architecture = self._prefix
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{file.path} has the GGUF architecture {self._prefix!r:.80}; supported are {', '.join(ARCHITECTURES)}"
            )
        if self.architecture == "llama" and self.has("attention.sliding_window"):
            self.architecture = "mistral"
        if self.architecture == "llama" and self.integer("expert_count", 0):
            self.architecture = "mixtral"
        if self.architecture == "olmo2" and self.has("attention.sliding_window"):
            self.architecture = "olmo3"
        if self.architecture == "granite" and not self.flag("rope.scaling.finetuned", True):
            self.architecture = "granitemoe"  # Granite 4 without states: llama.cpp calls it granite
        sigmoid = any(name.endswith(".exp_probs_b.bias") for name in file.tensors)
        if self.architecture == "deepseek2" and (self.integer("expert_gating_func", 1) == _SIGMOID or sigmoid):
            self.architecture = "deepseek3"
        self.layers = self.integer("block_count", most=_MAX_LAYERS)
        self.layers -= self.integer("nextn_predict_layers", 0, most=self.layers - 1)

    def has(self, name: str) -> bool:
        """Whether the key is there, and is not 0."""
        return bool(self._metadata.get(f"{self._prefix}.{name}"))

    def integer(self, name: str, default: int | None = None, most: int = 1 << 30) -> int:
        value = self._read(name, int, default)
        if not 0 <= value <= most or (value == 0 and default != 0):
            raise ModelFileError(f"{self._path}: {self._prefix}.{name} is {value}; allowed is 1 to {most}")
        return int(value)

    def real(self, name: str, default: float | None = None) -> float:
        value = self._read(name, float, default)
        if not 0 < value < math.inf:
            raise ModelFileError(f"{self._path}: {self._prefix}.{name} is {value}; allowed is a number above 0")
        return float(str(np.float32(value)))  # 1e-05 rather than 9.99999974e-06: the same float32

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._read(name, bool, default))

    def text(self, name: str, default: str) -> str:
        return str(self._read(name, str, default))

    def by_layer(self, name: str, default: int | None = None) -> list[int]:
        """A whole number of each layer, where it is one for all too."""
        values = self._metadata.get(f"{self._prefix}.{name}", default)
        if not isinstance(values, list):
            return [self.integer(name, default)] * self.layers
        if len(values) < self.layers or any(type(n) not in (int, bool) or not 0 <= n < 1 << 30 for n in values):
            raise ModelFileError(f"{self._path}: {self._prefix}.{name} is {values!r:.80}; allowed is a number a layer")
        return [int(value) for value in values[: self.layers]]

    def _read(self, name: str, kind: type, default: Any) -> Any:
        return value_of(self._path, self._metadata, f"{self._prefix}.{name}", kind, default)


def value_of(path: Path, metadata: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """The value of a key, which must be of that type."""
    value = metadata.get(key, default)
    if type(value) is not kind:
        raise ModelFileError(f"{path}: {key} is {value!r:.80}; expected a {kind.__name__}")
    return value


def config_of(file: GgufFile) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of the model in `file`, and its config.json, as Hugging Face writes it for the family."""
    keys = Keys(file)
    architecture = ARCHITECTURES[keys.architecture]
    family = FAMILIES[architecture.native]
    config = common(file, keys, family.model_type)
    config |= architecture.config
    config[family.eps] = keys.real(f"attention.layer_norm_{'rms_' if family.norm == 'rms' else ''}epsilon")
    if any(widths := keys.by_layer("feed_forward_length", 0)):
        config[family.mlp_size] = max(widths)
    config |= _heads(file, keys, family, config)
    config |= _flags(file, keys, family)
    config |= _windows(file, keys, family)
    config |= _states(file, keys, family, config)
    config |= _experts(file, keys, family)
    for name, scale in zip(family.scales, ("embedding_scale", "residual_scale", "logit_scale"), strict=True):
        if name and keys.has(scale):
            config[name] = keys.real(scale)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if keys.has(name):
            config[name] = keys.real(name)
    if keys.has("attention.scale"):
        config["attention_multiplier"] = keys.real("attention.scale")
    if scaling := _rope_scaling(file, keys, config):
        config["rope_scaling"] = scaling
    return architecture, config


def common(file: GgufFile, keys: Keys, model_type: str) -> dict[str, Any]:
    """What every config.json has."""
    if (embedding := file.tensors.get("token_embd.weight")) is None:
        raise ModelFileError(f"{file.path} has no tensor 'token_embd.weight'")
    return {
        "architectures": [ARCHITECTURES[keys.architecture].native],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": keys.integer("embedding_length"),
        "num_hidden_layers": keys.layers,
        "num_attention_heads": keys.integer("attention.head_count"),
        "max_position_embeddings": keys.integer("context_length"),
        "rope_theta": keys.real("rope.freq_base", 1e6 if keys.architecture == "gemma3" else 1e4),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _heads(file: GgufFile, keys: Keys, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Of attention, and what is turned of each head."""
    heads = config["num_attention_heads"]
    if family.latent:
        return _latents(keys)
    head_dim = keys.integer("attention.key_length", config["hidden_size"] // max(heads, 1))
    if head_dim % 2:
        raise ModelFileError(f"{file.path} has a head_dim of {head_dim}; RoPE needs an even one")
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{file.path} has values of another length than its keys; supported is the same")
    counts = {"num_key_value_heads": max(keys.by_layer("attention.head_count_kv", heads)), "head_dim": head_dim}
    turned = keys.integer("rope.dimension_count", head_dim)
    if family.rotary == "typed":
        rotates = keys.flag("rope.scaling.finetuned", keys.architecture == "granitemoe")
        return counts | ({"position_embedding_type": "rope"} if rotates else {})
    if turned == head_dim:
        return counts
    if not family.partial:
        raise UnsupportedModelError(f"{file.path} rotates only a part of each head; supported is all of it")
    return counts | {"partial_rotary_factor": turned / head_dim}


def _latents(keys: Keys) -> dict[str, Any]:
    turned, mla = keys.integer("rope.dimension_count"), "_mla" if keys.has("attention.key_length_mla") else ""
    sizes = {
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": keys.integer(f"attention.key_length{mla}") - turned,
    }
    for name, key in (("q_lora_rank", "q_lora_rank"), ("v_head_dim", f"value_length{mla}")):
        if keys.has(f"attention.{key}"):
            sizes[name] = keys.integer(f"attention.{key}")
    for name, key in (("index_n_heads", "head_count"), ("index_head_dim", "key_length"), ("index_topk", "top_k")):
        if keys.has(f"attention.indexer.{key}"):
            sizes[name] = keys.integer(f"attention.indexer.{key}")
    return sizes


def _flags(file: GgufFile, keys: Keys, family: Family) -> dict[str, bool]:
    """What says that there are biases, and norms of q and k, where the family may have some."""
    sources = ((family.o_bias, "attn_output"), (family.qkv_bias, "attn_q"), (family.mlp_bias, "ffn_down"))
    flags = {key: in_layers(file, keys, f"{stem}.bias") for key, stem in sources if isinstance(key, str)}
    return flags | {"use_qk_norm": in_layers(file, keys, "attn_q_norm.weight")}


def in_layers(file: GgufFile, keys: Keys, name: str) -> bool:
    """Whether a layer has such a tensor."""
    return any(f"blk.{layer}.{name}" in file.tensors for layer in range(keys.layers))


def _windows(file: GgufFile, keys: Keys, family: Family) -> dict[str, Any]:
    if family.windows not in ("always", "pattern"):
        return {}
    window: dict[str, Any] = {"sliding_window": keys.integer("attention.sliding_window", 0) or None}
    if family.windows == "pattern" and window["sliding_window"]:
        pattern, name = family.pattern, "attention.sliding_window_pattern"
        flags = keys.by_layer(name, pattern)
        if not isinstance(file.metadata.get(f"{file.metadata['general.architecture']}.{name}"), list):
            flags = [(layer + 1) % pattern for layer, pattern in enumerate(flags)]
        window["layer_types"] = ["sliding_attention" if flag else "full_attention" for flag in flags]
    if keys.architecture not in ("gemma2", "gemma3"):
        return window
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    # The models of 27 billion parameters are the ones that scale by another number, which is not in their files.
    largest = keys.layers == {"gemma2": 46, "gemma3": 62}[keys.architecture]
    window["query_pre_attn_scalar"] = (
        hidden // heads if largest else keys.integer("attention.key_length", hidden // heads)
    )
    window["pad_token_id"] = file.metadata.get("tokenizer.ggml.padding_token_id")
    if keys.architecture == "gemma3":
        window["rope_local_base_freq"] = keys.real("rope.freq_base_swa", 1e4)
    return window


def _states(file: GgufFile, keys: Keys, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The states of layers that keep one, and which layers these are."""
    if family.states is None:
        return {}
    if keys.architecture == "granitemoe":
        return {"layer_types": ["full_attention"] * keys.layers}
    sizes: dict[str, Any]
    if family.states.kind == "kda":
        sizes = {"linear_num_heads": config["num_attention_heads"], "linear_head_dim": keys.integer("kda.head_dim")}
        sizes["linear_conv_kernel_dim"] = keys.integer("ssm.conv_kernel")
    else:
        inner, heads = keys.integer("ssm.inner_size"), keys.integer("ssm.time_step_rank")
        groups, state, conv = (keys.integer(f"ssm.{name}") for name in ("group_count", "state_size", "conv_kernel"))
        biases = {name: in_layers(file, keys, f"{name}.bias") for name in ("ssm_conv1d", "ssm_in", "ssm_out")}
        if family.states.kind == "gated_delta":
            sizes = {"linear_num_value_heads": heads, "linear_num_key_heads": groups, "linear_key_head_dim": state}
            sizes |= {"linear_value_head_dim": inner // heads, "linear_conv_kernel_dim": conv}
        elif family.mixers == "alternating":
            sizes = {"mamba_num_heads": heads, "mamba_head_dim": inner // heads, "n_groups": groups}
            sizes |= {"ssm_state_size": state, "conv_kernel": conv}
            sizes |= {"use_conv_bias": biases["ssm_conv1d"], "use_bias": biases["ssm_in"]}
        else:
            sizes = {"mamba_n_heads": heads, "mamba_d_head": inner // heads, "mamba_n_groups": groups}
            sizes |= {"mamba_d_state": state, "mamba_d_conv": conv, "mamba_d_ssm": inner}
            sizes |= {"mamba_expand": inner // config["hidden_size"], "projectors_bias": biases["ssm_out"]}
            sizes |= {"mamba_conv_bias": biases["ssm_conv1d"], "mamba_proj_bias": biases["ssm_in"]}
            sizes["mamba_rms_norm"] = in_layers(file, keys, "ssm_norm.weight")
    if keys.has("full_attention_interval"):
        return sizes | {"full_attention_interval": keys.integer("full_attention_interval")}
    if family.mixers == "both":
        return sizes
    kinds = ["full_attention" if heads else "linear_attention" for heads in keys.by_layer("attention.head_count_kv")]
    if family.mixers == "typed":
        return sizes | {"layer_types": kinds}
    for layer in range(keys.layers):
        for kind, name in (("mlp", "ffn_down"), ("moe", "ffn_gate_inp")):
            if f"blk.{layer}.{name}.weight" in file.tensors:
                kinds[layer] = kind
    return sizes | {"layers_block_type": kinds}


def _experts(file: GgufFile, keys: Keys, family: Family) -> dict[str, Any]:
    if not (count := keys.integer("expert_count", 0)):
        return {}
    if not (family.expert_size or family.groups):
        raise UnsupportedModelError(
            f"{file.path} is a mixture of experts; of {keys.architecture!r} only dense models are supported"
        )
    if count * keys.layers > _MAX_EXPERTS:
        raise ModelFileError(
            f"{file.path} has {count} experts in each of {keys.layers} layers; allowed are {_MAX_EXPERTS} in all"
        )
    name = "num_experts" if "qwen" in family.model_type else "num_local_experts"
    config: dict[str, Any] = {
        "n_routed_experts" if family.groups else name: count,
        "num_experts_per_tok": keys.integer("expert_used_count"),
        family.expert_size or "moe_intermediate_size": _width(file, keys, "ffn_down_exps", -1),
    }
    if family.shared_expert:
        shared = in_layers(file, keys, "ffn_down_shexp.weight")
        config[family.shared_expert] = _width(file, keys, "ffn_down_shexp", -1) if shared else 0
    if not family.groups:
        return config
    if family.groups == "sigmoid" and (gating := keys.integer("expert_gating_func", _SIGMOID)) != _SIGMOID:
        raise UnsupportedModelError(
            f"{file.path} weighs experts by function {gating}; supported is {_SIGMOID}, sigmoid"
        )
    groups = keys.integer("expert_group_count", 1)
    config |= {
        "n_shared_experts": keys.integer("expert_shared_count", 0),
        "n_group": groups,
        "topk_group": keys.integer("expert_group_used_count", 1),
        "routed_scaling_factor": keys.real("expert_weights_scale", 1.0),
        "first_k_dense_replace": keys.integer("leading_dense_block_count", 0),
        "norm_topk_prob": keys.flag("expert_weights_norm", not keys.architecture.startswith("deepseek")),
    }
    if family.groups == "softmax":
        config["topk_method"] = "greedy" if groups == 1 else "group_limited_greedy"
    if in_layers(file, keys, "ffn_latent_down.weight"):
        config["moe_latent_size"] = _width(file, keys, "ffn_latent_down", 0)
    return config


def _width(file: GgufFile, keys: Keys, stem: str, dimension: int) -> int:
    """That size of the first tensor of this name."""
    names = (f"blk.{layer}.{stem}.weight" for layer in range(keys.layers))
    if (name := next((name for name in names if name in file.tensors), None)) is None:
        raise ModelFileError(f"{file.path} has no tensor '{stem}.weight' in any layer")
    return file.tensors[name].shape[dimension]


def _rope_scaling(file: GgufFile, keys: Keys, config: dict[str, Any]) -> dict[str, Any] | None:
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, config)
    if LONG_FACTORS["long_factor"] in file.tensors:
        half = (
            int(config.get("head_dim", config.get("qk_rope_head_dim")) * config.get("partial_rotary_factor", 1.0)) // 2
        )
        config["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        factors = {name: _factors(file, tensor, half).tolist() for name, tensor in LONG_FACTORS.items()}
        return {"rope_type": "longrope", **factors}
    kind = keys.text("rope.scaling.type", default="none")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.real("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
        scaling |= {
            name: keys.real(f"rope.scaling.{key}") for name, key in names.items() if keys.has(f"rope.scaling.{key}")
        }
        if keys.has("rope.scaling.yarn_log_multiplier"):  # 0.1 of what DeepSeek calls so
            weight = float(str(np.float32(10 * keys.real("rope.scaling.yarn_log_multiplier"))))
            scaling |= {"mscale": weight, "mscale_all_dim": weight}
        if keys.architecture == "gpt-oss":
            scaling["truncate"] = False
    elif kind != "linear":
        raise UnsupportedModelError(
            f"{file.path} has RoPE scaling {kind!r:.80}; supported are none, linear, yarn, longrope, llama3"
        )
    return scaling


def _factors(file: GgufFile, name: str, count: int) -> Any:
    """So many factors of frequencies, float32."""
    if name not in file.tensors:
        raise ModelFileError(f"{file.path} has no tensor {name!r}")
    if (shape := file.tensors[name].shape) != (count,):  # before any is read: it may be as large as the file
        raise UnsupportedModelError(f"{file.path}: {name!r} has shape {list(shape)}; supported is [{count}]")
    return np.concatenate(list(file.rows(name)), axis=None)


def _llama3_scaling(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Recover the parameters of llama3 scaling from the divisors of the frequencies, all that llama.cpp keeps of them.

    The divisors `[head_dim / 2]` reach the factor at low frequencies; the other parameters are the same in every
    model of the family, and are checked by computing the divisors from them.
    """
    half = config["head_dim"] // 2
    factors = _factors(file, ROPE_FACTORS, half)
    low, high, context = 1.0, 4.0, 8192
    factor = float(factors.max())
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UnsupportedModelError(f"{file.path} has RoPE factors in {ROPE_FACTORS!r} that are not those of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
