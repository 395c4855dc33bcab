"""A GGUF file becomes a folder that Hugging Face's loaders and ours read: config, bf16 weights, tokenizer.

Names and layouts are those of llama.cpp's converter, for the families below. Memory is bounded by one block of rows,
whatever the file's size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina.models.cache import FileRecord, write_file
from lamina.models.gguf_files import GgufFile
from lamina.models.gguf_tokenizer import tokenizer_files
from lamina.system.progress import Progress
from lamina_workers.decoder.safetensors_files import SINGLE_FILE
from lamina_workers.errors import ModelFileError, UnsupportedModelError

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_BIAS_NAMES = {f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}
_NORM_NAMES = {f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}
_ROPE_FACTORS = "rope_freqs.weight"
_MAX_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class _Target:
    """One tensor to write: its name and shape, the GGUF tensor it comes from, and how many heads are permuted there
    (0: its rows are in order)."""

    name: str
    source: str
    shape: tuple[int, ...]
    permuted: int = 0


def convert(file: GgufFile, folder: Path, progress: Progress) -> dict[str, FileRecord]:
    """Write `file` into the empty folder `folder`. Returns a record of each file written, by name.

    Raises UnsupportedModelError for a model that Lamina cannot represent, ModelFileError where the file contradicts
    itself, and OSError as it comes.
    """
    config = _config(file)
    targets = list(_targets(file, config))
    contents = {"config.json": config, **tokenizer_files(file.path, file.metadata)}
    written = {
        name: write_file(folder / name, iter([json.dumps(content, indent=2, ensure_ascii=False).encode()]))
        for name, content in contents.items()
    }
    written[SINGLE_FILE] = write_file(folder / SINGLE_FILE, _safetensors(file, targets, progress))
    return written


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
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count", most=_MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", default=10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if family == "mistral":
        config["sliding_window"] = window or None
    if scaling := _rope_scaling(file, keys, config):
        config["rope_scaling"] = scaling
    return config


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
    family, hidden, head_dim = config["model_type"], config["hidden_size"], config["head_dim"]
    heads, kv_heads, inner = config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q.weight": (q, hidden),
        "attn_k.weight": (kv, hidden),
        "attn_v.weight": (kv, hidden),
        "attn_output.weight": (hidden, q),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
        "attn_q.bias": (q,),
        "attn_k.bias": (kv,),
        "attn_v.bias": (kv,),
        **dict.fromkeys(_NORM_NAMES, (head_dim,)),
    }
    permuted = {"attn_q.weight": heads, "attn_k.weight": kv_heads} if family in ("llama", "mistral") else {}
    names = _LAYER_NAMES | {"qwen2": _BIAS_NAMES, "qwen3": _NORM_NAMES}.get(family, {})
    targets = [
        _Target("model.embed_tokens.weight", "token_embd.weight", (config["vocab_size"], hidden)),
        *(
            _Target(f"model.layers.{i}.{name}", f"blk.{i}.{part}", shapes.get(part, (hidden,)), permuted.get(part, 0))
            for i in range(config["num_hidden_layers"])
            for part, name in names.items()
        ),
        _Target("model.norm.weight", "output_norm.weight", (hidden,)),
    ]
    if not config["tie_word_embeddings"]:
        targets.append(_Target("lm_head.weight", "output.weight", (config["vocab_size"], hidden)))
    unknown = file.tensors.keys() - {target.source for target in targets} - {_ROPE_FACTORS}
    if unknown:
        raise UnsupportedModelError(f"{file.path} has a tensor {min(unknown)!r}, which family {family!r} does not know")
    for target in targets:
        if target.source not in file.tensors:
            raise ModelFileError(f"{file.path} has no tensor {target.source!r}")
        if (shape := file.tensors[target.source].shape) != target.shape:
            raise ModelFileError(
                f"{file.path}: tensor {target.source!r} has shape {list(shape)}, "
                f"but the metadata wants {list(target.shape)}"
            )
        yield target


def _unpermuted(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """For each row of a Hugging Face q or k projection, its row in a GGUF of the llama family: int64 `[rows]`.

    Hugging Face rotates dimension i of a head with i + d/2, llama.cpp 2i with 2i + 1, so its converter
    (convert_hf_to_gguf.py, `permute`) interleaves the halves.
    """
    return np.arange(rows, dtype=np.int64).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _safetensors(file: GgufFile, targets: list[_Target], progress: Progress) -> Iterator[bytes]:
    """The bytes of a safetensors file with `targets` in bf16, block by block."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for target in targets:
        size = 2 * math.prod(target.shape)
        header[target.name] = {"dtype": "BF16", "shape": target.shape, "data_offsets": [total, total + size]}
        total += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts aligned
    yield len(encoded).to_bytes(8, "little") + encoded
    done = 0
    progress("converting", done, total)
    for target in targets:
        order = _unpermuted(target.shape[0], target.permuted) if target.permuted else None
        for block in file.rows(target.source, order):
            rounded = torch.from_numpy(np.require(block, requirements="W")).to(torch.bfloat16)
            data = rounded.view(torch.uint8).numpy().tobytes()
            yield data
            done += len(data)
            progress("converting", done, total)


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
