"""A converted GGUF is the model it was made of; what cannot be converted is named."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_writing import FAMILIES, tiny, write_gguf
from model_export import export
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lamina.errors import LaminaError, ModelFileError, UnsupportedModelError
from lamina.models.gguf_conversion import convert
from lamina.models.gguf_files import GgufFile
from lamina.sampling_params import SamplingParams


def converted(path: Path) -> Path:
    """The folder that a GGUF file becomes."""
    folder = path.with_suffix("")
    folder.mkdir()
    convert(GgufFile(path), folder, str(path), {})
    return folder


def unpacked(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The same as transformers reads it."""
    return export(converted(path), path.with_suffix(".unpacked"), dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_gguf_is_the_model_it_was_made_of(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    folder = unpacked(write_gguf(tmp_path / "x.gguf", model.config, weights))
    written = load_file(folder / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(written[name], tensor), name
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 300, (1, 77), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # it takes every Qwen3 to have heads of 128
def test_the_model_is_the_one_that_transformers_reads_from_the_gguf(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    weights = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items() if name != "lm_head.weight"}
    path = write_gguf(tmp_path / "x.gguf", model.config, weights)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(unpacked(path), dtype=torch.float32).eval()
    if family == "gemma3":  # the scale of its scores is not in the file, and they always take 256
        assert ours.config.query_pre_attn_scalar == 8
        theirs.config.query_pre_attn_scalar = 8
        for layer in theirs.model.layers:
            layer.self_attn.scaling = 8**-0.5
    ids = torch.randint(0, 300, (1, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)


def test_keys_that_a_gemma_3_may_have_reach_its_config(tmp_path: Path) -> None:
    model = tiny("gemma3")
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    extra = {"gemma3__attention__sliding_window_pattern": 3}
    config = json.loads(
        (converted(write_gguf(tmp_path / "x.gguf", model.config, weights, **extra)) / "config.json").read_text()
    )
    assert [kind.split("_")[0] for kind in config["layer_types"]] == ["sliding", "sliding", "full"] * 2 + ["sliding"]
    assert config["sliding_window"] == 32
    assert "hidden_act" not in config


def test_what_a_file_advises_of_sampling_is_for_requests_that_say_nothing(tmp_path: Path) -> None:
    """In the keys of llama.cpp, whose fractions are of 32 bits."""
    model = tiny("llama")
    advice = {"temp": 0.7, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "penalty_repeat": 1.05, "penalty_last_n": 64}
    extra: dict[str, Any] = {f"general__sampling__{name}": value for name, value in advice.items()}
    folder = converted(write_gguf(tmp_path / "x.gguf", model.config, model.state_dict(), **extra))
    params = SamplingParams().with_defaults(json.loads((folder / "generation_config.json").read_text()))
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.95, 20)
    assert (params.min_p, params.repetition_penalty) == (0.05, 1.05)
    plain = converted(write_gguf(tmp_path / "plain.gguf", model.config, model.state_dict()))
    assert SamplingParams().with_defaults(json.loads((plain / "generation_config.json").read_text())).temperature == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"general__sampling__temp": 1}, "general.sampling.temp is 1; expected a float"),
        ({"llama__expert_count": 8}, "llama.expert_used_count is None"),
        ({"llama__expert_count": 8, "llama__expert_used_count": 2}, "no tensor 'ffn_down_exps.weight' in any layer"),
        ({"llama__attention__value_length": 16}, "values"),
        ({"llama__attention__sliding_window": 1 << 31}, "sliding_window"),
        ({"llama__attention__key_length": 15}, r"x\.gguf has a head_dim of 15; RoPE needs an even one"),
    ],
)
def test_what_is_not_implemented_is_named(tmp_path: Path, extra: dict[str, int], message: str) -> None:
    model = tiny("llama")
    path = write_gguf(tmp_path / "x.gguf", model.config, model.state_dict(), **extra)
    with pytest.raises(LaminaError, match=message):
        converted(path)


def test_experts_of_a_dense_family_are_refused(tmp_path: Path) -> None:
    model = tiny("qwen3")
    path = write_gguf(tmp_path / "x.gguf", model.config, model.state_dict(), qwen3__expert_count=8)
    with pytest.raises(UnsupportedModelError, match="mixture of experts; of 'qwen3' only dense"):
        converted(path)


def test_a_kind_that_cannot_be_read_is_refused_with_those_that_can(tmp_path: Path) -> None:
    model = tiny("llama")
    path = write_gguf(tmp_path / "x.gguf", model.config, model.state_dict())
    file = GgufFile(path)
    tensor = file.tensors["blk.1.ffn_down.weight"]
    file.tensors["blk.1.ffn_down.weight"] = replace(tensor, kind=gguf.GGMLQuantizationType.TQ1_0)
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedModelError, match=r"blk\.1\.ffn_down.* as TQ1_0; supported are F64, .*MXFP4.*IQ4_XS"):
        convert(file, tmp_path / "out", str(path), {})


def test_a_gguf_that_contradicts_itself_names_tensor_and_shapes(tmp_path: Path) -> None:
    model = tiny("llama")
    weights = model.state_dict()
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(70, 48)
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_up\.weight.*\[70, 48\].*\[72, 48\]"):
        converted(write_gguf(tmp_path / "a.gguf", model.config, weights))
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelFileError, match=r"no tensor 'blk\.1\.ffn_up\.weight'"):
        converted(write_gguf(tmp_path / "b.gguf", model.config, weights))


def test_an_unknown_architecture_lists_what_is_supported(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    key = struct.pack("<Q20sIQ5s", 20, b"general.architecture", 8, 5, b"mamba")
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, mistral, mixtral, qwen2, .*kimi-linear"):
        converted(path)


def test_rope_factors_are_not_read_before_their_shape_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be as large as the file, which can have a hole of a terabyte, and were all read into memory."""
    model = tiny("llama3")
    path = write_gguf(tmp_path / "x.gguf", model.config, model.state_dict())
    file = GgufFile(path)
    factors = file.tensors["rope_freqs.weight"]
    file.tensors["rope_freqs.weight"] = replace(factors, shape=(1 << 30, 4))
    monkeypatch.setattr(GgufFile, "rows", None)
    with pytest.raises(UnsupportedModelError, match=r"'rope_freqs.weight' has shape \[1073741824, 4\]; supported"):
        convert(file, tmp_path / "out", str(path), {})
