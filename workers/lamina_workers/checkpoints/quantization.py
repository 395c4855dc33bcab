"""How a checkpoint's weights are quantised, as its config.json says; what is not known is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import read_config_json
from lamina_workers.model_config.config_keys import Keys

OF_MODELOPT = "hf_quant_config.json"
"""Where modelopt's older checkpoints say it."""
_TENSOR, _CHANNEL, _BLOCKS = (0, 0), (1, 0), (128, 128)  # outputs and inputs that share a scale, 0: all of them
_MODELOPT = {
    "FP8": ("float-quantized", 8, *_TENSOR),
    "FP8_PER_CHANNEL_PER_TOKEN": ("float-quantized", 8, *_CHANNEL),
    "FP8_PB_WO": ("float-quantized", 8, *_BLOCKS),
    "NVFP4": ("nvfp4", 4, 1, 16),
}
# Of compressed-tensors' formats: the type of numbers, their bits, and the strategies of scales.
_COMPRESSED = {
    "pack-quantized": ("int", (4, 8), ("tensor", "channel", "group")),
    "int-quantized": ("int", (4, 8), ("tensor", "channel", "group")),
    "float-quantized": ("float", (8,), ("tensor", "channel", "block")),
    "nvfp4-pack-quantized": ("float", (4,), ("tensor_group",)),
    "mxfp4-pack-quantized": ("float", (4,), ("group",)),
}


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's weights are quantised. way: one that `quantized_tensors` describes; rows, group: outputs and
    inputs that share a scale, 0: all of them; less: what the stored zero points lack."""

    way: str
    bits: int
    rows: int
    group: int
    less: int = 0


def read_quantization(folder: Path) -> Quantization | None:
    """What the folder's config.json says of its weights; None where they are floats. Raises UnsupportedModelError for a
    way that is not known."""
    return quantization_of(read_config_json(folder), folder)


def quantization_of(raw: Mapping[str, Any], folder: Path | None = None) -> Quantization | None:
    """As `read_quantization`, of a parsed config.json."""
    text = raw.get("text_config")
    section = None
    for source in (raw, text if isinstance(text, Mapping) else {}):
        section = section or source.get("quantization_config", source.get("compression_config"))
    if section is None and folder is not None and (folder / OF_MODELOPT).is_file():
        section = read_config_json(folder, OF_MODELOPT).get("quantization")
        section = {**section, "quant_method": "modelopt"} if isinstance(section, Mapping) else section
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise ModelFileError(f"{folder}: quantization_config is {section!r:.80}, expected an object")
    keys = Keys(section, {})
    method = keys.text("quant_method", "")
    if method not in _READERS:
        raise UnsupportedModelError(
            f"{folder or 'config.json'}: weights are quantised by {method!r:.80}; supported are {', '.join(_READERS)}"
        )
    return _READERS[method](keys)


def _gptq(keys: Keys) -> Quantization:
    version = keys.text("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(f"GPTQ's checkpoint_format is {version!r:.80}; supported are gptq, gptq_v2")
    group, bits = keys.integer("group_size", -1, 1 << 20, -1), keys.integer("bits", 1, 32)
    if bits not in (4, 8):
        raise UnsupportedModelError(f"GPTQ weights of {bits} bits; supported are 4 and 8")
    return Quantization("gptq", bits, 1, max(group, 0), int(version == "gptq"))


def _awq(keys: Keys) -> Quantization:
    version = keys.text("version", "gemm").lower()
    if version != "gemm":
        raise UnsupportedModelError(f"AWQ's version is {version!r:.80}; supported is gemm")
    bits = keys.integer("bits", 1, 32, keys.integer("w_bit", 1, 32, 4))
    if bits != 4:
        raise UnsupportedModelError(f"AWQ weights of {bits} bits; supported are 4")
    return Quantization("awq", bits, 1, max(keys.integer("group_size", -1, 1 << 20, 128), 0))


def _fp8(keys: Keys) -> Quantization:
    kind, experts = keys.text("fmt", "e4m3"), keys.text("expert_dtype", "fp8")
    if kind not in ("e4m3", "float8_e4m3fn") or experts != "fp8":
        raise UnsupportedModelError(f"FP8 weights in {kind!r:.80}, experts in {experts!r:.80}; supported are e4m3, fp8")
    return Quantization("float-quantized", 8, *_block_size(keys, "weight_block_size"))


def _block_size(keys: Keys, name: str) -> tuple[int, int]:
    """Outputs and inputs of a block, or all of them where none are given."""
    size = keys.get(name)
    if size is None:
        return _TENSOR
    if type(size) is not list or len(size) != 2 or any(type(n) is not int or not 1 <= n <= 1 << 20 for n in size):
        raise ModelFileError(f"{name} is {size!r:.80}, expected two integers from 1 to {1 << 20}")
    return size[0], size[1]


def _modelopt(keys: Keys) -> Quantization:
    algorithm = keys.text("quant_algo", "").upper()
    if algorithm not in _MODELOPT:
        raise UnsupportedModelError(f"modelopt's quant_algo is {algorithm!r:.80}; supported are {', '.join(_MODELOPT)}")
    way, bits, rows, group = _MODELOPT[algorithm]
    return Quantization(way, bits, rows, group)


def _compressed(keys: Keys) -> Quantization:
    way = keys.text("format", "")
    if way not in _COMPRESSED:
        raise UnsupportedModelError(
            f"compressed-tensors' format is {way!r:.80}; supported are {', '.join(_COMPRESSED)}"
        )
    groups = keys.table("config_groups")
    schemes = {_scheme(name, group, way) for name, group in groups.items()}
    if len(schemes) != 1:
        raise UnsupportedModelError(f"compressed-tensors with {len(schemes)} schemes of weights; supported is one")
    return schemes.pop()


def _scheme(name: str, group: Any, way: str) -> Quantization:
    weights = Keys(Keys(group if isinstance(group, dict) else {}, {}).table("weights"), {})
    kind, strategy = weights.text("type", "int"), weights.text("strategy", "tensor")
    bits = weights.integer("num_bits", 1, 32, 8)
    of_type, widths, strategies = _COMPRESSED[way]
    if kind != of_type or strategy not in strategies or bits not in widths:
        raise UnsupportedModelError(
            f"compressed-tensors' {name!r:.80} has weights of type {kind!r:.80} by {strategy!r:.80} in {bits} bits; "
            f"{way} is supported of {of_type}, by {' or '.join(strategies)}, in {' or '.join(map(str, widths))} bits"
        )
    if strategy == "block":
        return Quantization(way, bits, *_block_size(weights, "block_structure"))
    size = weights.integer("group_size", -1, 1 << 20, 0) if "group" in strategy else 0
    if kind == "float" and bits == 4 and size != (fixed := 16 if way.startswith("nv") else 32):
        raise UnsupportedModelError(f"{way} in groups of {size}; supported are {fixed}")
    return Quantization(way, bits, int(strategy != "tensor"), max(size, 0))


_READERS = {
    "fp8": _fp8,
    "fbgemm_fp8": lambda keys: Quantization("float-quantized", 8, *_CHANNEL),
    "mxfp4": lambda keys: Quantization("mxfp4", 4, 1, 32),
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
}
