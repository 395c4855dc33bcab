"""Models by name: presets of published configs, and any folder or file with a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamina.errors import InvalidRequest
from lamina.simulator.costs.model_configs import from_config, from_folder
from lamina.simulator.costs.shapes import LayerGroup, ModelShape

__all__ = ["PRESETS", "LayerGroup", "ModelShape", "from_config", "from_folder", "model"]


def model(name: str | Path) -> ModelShape:
    """A preset by its name, in any case; or the shape of a folder or config.json, which `./` sets apart from presets.

    Raises InvalidRequest, which lists the presets where the name means nothing.
    """
    text = str(name)
    if (preset := PRESETS.get(text.lower())) is not None:
        return preset
    try:
        is_path = "/" in text or "\\" in text or Path(text).exists()
    except (OSError, ValueError):  # too long, a null character
        is_path = False
    if text and is_path:
        return from_folder(text)
    raise InvalidRequest(f"unknown model {text!r:.200}; known are {', '.join(PRESETS)}, or a path to a config.json")


_SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip


def _published(
    name: str, *sizes: int, more: Mapping[str, Any] | None = None, weight_bytes: float | None = None
) -> ModelShape:
    """A preset, from its published config.json: `sizes` in the order of `_SIZES`, and `more` keys."""
    config = dict(zip(_SIZES, sizes, strict=True)) | dict(more or {})
    return replace(from_config(config, name), published_weight_bytes=weight_bytes)


def _experts(count: int, top_k: int, size: int | None = None) -> dict[str, int | None]:
    return {"num_experts": count, "num_experts_per_tok": top_k, "moe_intermediate_size": size}


def _deepseek(rank: int | None, shared: int, dense: int) -> dict[str, Any]:
    """Keys of its MLA, of `shared` experts that every token uses, and of the `dense` first layers without experts."""
    widths = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    return {**widths, "q_lora_rank": rank, "n_shared_experts": shared, "first_k_dense_replace": dense}


_TIED = {"tie_word_embeddings": True}
_QWEN2, _QWEN3 = {"model_type": "qwen2"}, {"model_type": "qwen3"}
_QWEN3_MOE = {"model_type": "qwen3_moe", "head_dim": 128}
_GEMMA2 = {"model_type": "gemma2"}
_V2_LITE = _deepseek(None, 2, 1) | _experts(64, 6, 1408)
_FP8 = {"quantization_config": {"quant_method": "fp8"}}
_V2, _V3 = _deepseek(1536, 2, 1) | _experts(160, 6, 1536), _deepseek(1536, 1, 3) | _experts(256, 8, 2048) | _FP8

PRESETS: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        # The Lamina paper's three, with its weights (arXiv 2405.01814v2, table 3).
        _published("llama-33b", 60, 6656, 52, 52, 17920, 32000, 2048, weight_bytes=64.7e9),
        _published("llama-65b", 80, 8192, 64, 64, 22016, 32000, 2048, weight_bytes=130.1e9),
        _published("llama-3-70b", 80, 8192, 64, 8, 28672, 128256, 8192, weight_bytes=137.5e9),
        _published("llama-2-7b", 32, 4096, 32, 32, 11008, 32000, 4096),
        _published("llama-2-13b", 40, 5120, 40, 40, 13824, 32000, 4096),
        _published("llama-2-70b", 80, 8192, 64, 8, 28672, 32000, 4096),
        _published("llama-3-8b", 32, 4096, 32, 8, 14336, 128256, 8192),
        _published("llama-3.1-8b", 32, 4096, 32, 8, 14336, 128256, 131072),
        _published("llama-3.1-70b", 80, 8192, 64, 8, 28672, 128256, 131072),
        _published("llama-3.1-405b", 126, 16384, 128, 8, 53248, 128256, 131072),
        _published("llama-3.2-1b", 16, 2048, 32, 8, 8192, 128256, 131072, more=_TIED),
        _published("llama-3.2-3b", 28, 3072, 24, 8, 8192, 128256, 131072, more=_TIED),
        _published("mistral-7b", 32, 4096, 32, 8, 14336, 32000, 32768, more={"sliding_window": 4096}),
        _published("mistral-7b-v0.3", 32, 4096, 32, 8, 14336, 32768, 32768),
        _published("mixtral-8x7b", 32, 4096, 32, 8, 14336, 32000, 32768, more=_experts(8, 2)),
        _published("mixtral-8x22b", 56, 6144, 48, 8, 16384, 32000, 65536, more=_experts(8, 2)),
        _published("qwen2.5-7b", 28, 3584, 28, 4, 18944, 152064, 131072, more=_QWEN2),
        _published("qwen2.5-32b", 64, 5120, 40, 8, 27648, 152064, 131072, more=_QWEN2),
        _published("qwen2.5-72b", 80, 8192, 64, 8, 29568, 152064, 131072, more=_QWEN2),
        _published("qwen3-8b", 36, 4096, 32, 8, 12288, 151936, 40960, more=_QWEN3),
        _published("qwen3-32b", 64, 5120, 64, 8, 25600, 151936, 40960, more=_QWEN3),
        _published("qwen3-30b-a3b", 48, 2048, 32, 4, 6144, 151936, 40960, more=_QWEN3_MOE | _experts(128, 8, 768)),
        _published("qwen3-235b-a22b", 94, 4096, 64, 4, 12288, 151936, 40960, more=_QWEN3_MOE | _experts(128, 8, 1536)),
        _published("deepseek-v2-lite", 27, 2048, 16, 16, 10944, 102400, 163840, more=_V2_LITE),
        _published("deepseek-v2", 60, 5120, 128, 128, 12288, 102400, 163840, more=_V2),
        _published("deepseek-v3", 61, 7168, 128, 128, 18432, 129280, 163840, more=_V3),
        _published("gemma-2-9b", 42, 3584, 16, 8, 14336, 256000, 8192, more=_GEMMA2),
        _published("gemma-2-27b", 46, 4608, 32, 16, 36864, 256000, 8192, more=_GEMMA2 | {"head_dim": 128}),
        _published("smollm2-135m", 30, 576, 9, 3, 1536, 49152, 8192, more=_TIED),
        _published("smollm2-360m", 32, 960, 15, 5, 2560, 49152, 8192, more=_TIED),
        _published("smollm2-1.7b", 24, 2048, 32, 32, 8192, 49152, 8192, more=_TIED),
    )
}
"""Models with published configs, by name."""
