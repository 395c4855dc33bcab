"""A GGUF file gets a folder as Hugging Face models have one: config, tokenizer, and a record of where its weights are.

The weights stay in the file. Names and layouts are those of llama.cpp's converter, for the families below.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamina.models.cache import FileRecord, write_file
from lamina.models.gguf_files import GgufFile
from lamina.models.gguf_tokenizer import tokenizer_files
from lamina_workers.checkpoints.gguf_checkpoint import RECORD, GgufEntry, GgufRecord
from lamina_workers.decoder.weight_names import norm_names, tensor_shapes
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_MAPS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")  # in the order of `norm_names`
_QK_NORMS = ("attn_q_norm", "attn_k_norm")
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ROPE_FACTORS = "rope_freqs.weight"
_MAX_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class _Target:
    """One tensor: its name and shape, the GGUF tensor that it is, how many heads are permuted there (0: its rows are in
    order), and what was added to its values there."""

    name: str
    source: str
    shape: tuple[int, ...]
    permuted: int = 0
    added: float = 0.0


def convert(file: GgufFile, folder: Path, path: str) -> dict[str, FileRecord]:
    """Write what says how to run `file` into the empty folder `folder`. Returns a record of each file written, by name.
    `path`: where the file is found from there.

    Raises UnsupportedModelError for a model that Lamina cannot represent, ModelFileError where the file contradicts
    itself, and OSError as it comes.
    """
    config = _config(file)
    tensors = {target.name: _entry(file, target) for target in _targets(file, config)}
    record = GgufRecord(path, file.size, file.header, file.header_sha256(), tensors)
    contents = {"config.json": config, **tokenizer_files(file.path, file.metadata), RECORD: asdict(record)}
    return {
        name: write_file(folder / name, iter([json.dumps(content, indent=2, ensure_ascii=False).encode()]))
        for name, content in contents.items()
    }


def _entry(file: GgufFile, target: _Target) -> GgufEntry:
    tensor = file.tensors[target.source]
    return GgufEntry(tensor.kind.name, tensor.shape, tensor.offset, target.permuted, target.added)


def _config(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model in `file`, as Hugging Face writes it for the family."""
    keys = _Keys(file)
    family = keys.family
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", default=hidden // max(heads, 1))
    if head_dim % 2:
        raise ModelFileError(f"{file.path} has a head_dim of {head_dim}; RoPE needs an even one")
    if keys.integer("rope.dimension_count", default=head_dim) != head_dim:
        raise UnsupportedModelError(f"{file.path} rotates only a part of each head; supported is all of it")
    if keys.integer("attention.value_length", default=head_dim) != head_dim:
        raise UnsupportedModelError(f"{file.path} has values of another length than its keys; supported is the same")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{file.path} has no tensor 'token_embd.weight'")
    window = keys.integer("attention.sliding_window", default=0)
    if family == "llama" and window:  # llama.cpp has no family of its own for Mistral
        family = "mistral"
    gemma3 = family == "gemma3"
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": "gemma3_text" if gemma3 else family,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count", most=_MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_activation" if gemma3 else "hidden_act": "gelu_pytorch_tanh" if gemma3 else "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", default=1e6 if gemma3 else 1e4),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if family == "mistral":
        config["sliding_window"] = window or None
    if gemma3:
        config |= _gemma3(file, keys, config)
    if scaling := _rope_scaling(file, keys, config):
        config["rope_scaling"] = scaling
    return config


def _gemma3(file: GgufFile, keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config of a Gemma 3 has beside the others'. Values without a key are llama.cpp's (`llama-model.cpp`)."""
    layers, every = config["num_hidden_layers"], keys.integer("attention.sliding_window_pattern", default=6)
    own: dict[str, Any] = {
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)],
        "rope_local_base_freq": keys.real("rope.freq_base_swa", default=1e4),
        "query_pre_attn_scalar": config["head_dim"],
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if layers == 62:  # the model of 27 billion parameters is the one that scales otherwise
        own["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    if "gemma3.final_logit_softcapping" in file.metadata:
        own["final_logit_softcapping"] = keys.real("final_logit_softcapping")
    return own


def _rope_scaling(file: GgufFile, keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if _ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, config)
    kind = keys.text("rope.scaling.type", default="none")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.real("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
    elif kind != "linear":
        raise UnsupportedModelError(f"{file.path} has RoPE scaling {kind!r}; supported are none, linear, yarn, llama3")
    return scaling


def _llama3_scaling(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Recover the parameters of llama3 scaling from the divisors of the frequencies, all that llama.cpp keeps of them.

    The divisors `[head_dim / 2]` reach the factor at low frequencies; the other parameters are the same in every
    model of the family, and are checked by computing the divisors from them.
    """
    found = np.concatenate(list(file.rows(_ROPE_FACTORS)), axis=None)
    low, high, context = 1.0, 4.0, 8192
    factor = float(found.max())
    half = config["head_dim"] // 2
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    if found.shape != (half,) or not np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UnsupportedModelError(f"{file.path} has RoPE factors in {_ROPE_FACTORS!r} that are not those of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _targets(file: GgufFile, config: Mapping[str, Any]) -> Iterator[_Target]:
    """Every tensor that the family needs, each with the shape that the config wants. Other tensors are refused."""
    model = ModelConfig.from_dict(config)
    targets = [_target(model, name, shape) for name, shape in tensor_shapes(model).items()]
    unknown = file.tensors.keys() - {target.source for target in targets} - {_ROPE_FACTORS}
    if unknown:
        kind = model.family.model_type
        raise UnsupportedModelError(f"{file.path} has a tensor {min(unknown)!r}, which family {kind!r} does not know")
    for target in targets:
        if target.source not in file.tensors:
            raise ModelFileError(f"{file.path} has no tensor {target.source!r}")
        if (shape := file.tensors[target.source].shape) != target.shape:
            raise ModelFileError(
                f"{file.path}: tensor {target.source!r} has shape {list(shape)}, "
                f"but the metadata wants {list(target.shape)}"
            )
        yield target


def _target(model: ModelConfig, name: str, shape: tuple[int, ...]) -> _Target:
    """Where a tensor of the checkpoint comes from."""
    part, _, kind = name.rpartition(".")
    if (found := _IN_LAYER.fullmatch(part)) is None:
        source = f"{_TOP[part]}.{kind}"
    else:
        norms = dict(zip(norm_names(model.family), _NORMS, strict=True))
        qk_norms = {
            f"self_attn.{own}": theirs for own, theirs in zip(model.family.qk_norm_names, _QK_NORMS, strict=True)
        }
        source = f"blk.{found[1]}.{(_MAPS | norms | qk_norms)[found[2]]}.{kind}"
    permuted = 0
    if model.family.model_type in ("llama", "mistral") and kind == "weight":
        permuted = {"q_proj": model.num_attention_heads, "k_proj": model.num_key_value_heads}.get(part[-6:], 0)
    # What a family adds to the weights of norms when it computes, llama.cpp's converter adds before.
    added = model.family.norm_offset if part.endswith("norm") else 0.0
    return _Target(name, source, shape, permuted, added)


class _Keys:
    """Typed, bounded reads of one architecture's metadata."""

    def __init__(self, file: GgufFile) -> None:
        self._path, self._metadata = file.path, file.metadata
        self.family: str = self._read("general.architecture", str, None)
        if self.family not in _ARCHITECTURES:
            raise UnsupportedModelError(
                f"{file.path} has the GGUF architecture {self.family!r}; supported are {', '.join(_ARCHITECTURES)}"
            )
        if self.integer("expert_count", default=0):
            raise UnsupportedModelError(f"{file.path} is a mixture of experts; as GGUF only dense models are supported")

    def integer(self, name: str, default: int | None = None, most: int = 1 << 30) -> int:
        value = self._read(f"{self.family}.{name}", int, default)
        if not 0 <= value <= most or (value == 0 and default != 0):
            raise ModelFileError(f"{self._path}: {self.family}.{name} is {value}; allowed is 1 to {most}")
        return int(value)

    def real(self, name: str, default: float | None = None) -> float:
        value = self._read(f"{self.family}.{name}", float, default)
        if not 0 < value < math.inf:
            raise ModelFileError(f"{self._path}: {self.family}.{name} is {value}; allowed is a number above 0")
        return float(str(np.float32(value)))  # 1e-05 rather than 9.99999974e-06: the same float32

    def text(self, name: str, default: str) -> str:
        return str(self._read(f"{self.family}.{name}", str, default))

    def _read(self, key: str, kind: type, default: Any) -> Any:
        value = self._metadata.get(key, default)
        if type(value) is not kind:
            raise ModelFileError(f"{self._path}: {key} is {value!r:.80}; expected a {kind.__name__}")
        return value
