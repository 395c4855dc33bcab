"""Configs are read as transformers reads them, and refused by name where they are absurd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": [2, 7],
}


def test_reads_the_facts() -> None:
    config = ModelConfig.from_dict(LLAMA)
    assert (config.head_dim, config.rope.theta, config.rms_norm_eps) == (16, 10_000, 1e-6)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 7))
    spec = config.layer_specs()[3]
    assert (len(config.layer_specs()), spec.kv_layer, spec.heads, spec.kv_heads, spec.group) == (4, 3, 4, 2, 2)
    assert (spec.d_k, spec.d_v, spec.scale, spec.window, spec.soft_cap) == (16, 16, 0.25, None, None)


@pytest.mark.parametrize(
    ("kind", "options", "windows"),
    [
        ("mistral", {"sliding_window": 8}, (8, 8, 8, 8)),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("mixtral", {"sliding_window": 8}, (8, 8, 8, 8)),
        ("qwen2", {"sliding_window": 8}, (None,) * 4),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, (None, None, None, 8)),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, (8, 8, 8, 8)),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 2}, (None, 8, None, 8)),
    ],
)
def test_windows(kind: str, options: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    """The same from what transformers writes, and from a config without the lists that it derives."""
    sizes = {key: value for key, value in LLAMA.items() if key not in ("architectures", "model_type")}
    written = transformers.AutoConfig.for_model(kind, **sizes, **options).to_dict()
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    for raw in (written, {"model_type": kind, **sizes, **options, **experts}):
        assert ModelConfig.from_dict(raw).windows == windows


def test_smollm3_names_its_layers_with_rope() -> None:
    raw = {**LLAMA, "architectures": ["SmolLM3ForCausalLM"]}
    assert ModelConfig.from_dict(raw).rotary == (True, True, True, False)
    assert ModelConfig.from_dict({**raw, "no_rope_layers": [0, 1, 1, 0, 1]}).rotary == (False, True, True, False)


def test_both_spellings_of_rope_are_one() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "yarn", **scaling}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **scaling}}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    assert ModelConfig.from_dict(old).max_position_embeddings == 256


def test_another_rope_scaling() -> None:
    config = ModelConfig.from_dict({**LLAMA, "rope_theta": 5e5})
    longer = config.with_rope_scaling({"rope_type": "linear", "factor": 2.0})
    assert (longer.rope.kind, longer.rope.theta, longer.max_position_embeddings) == ("linear", 5e5, 256)
    assert longer.with_rope_scaling({"rope_type": "default"}) == config
    assert longer != config == ModelConfig.from_dict({**LLAMA, "rope_theta": 5e5})
    with pytest.raises(ModelFileError, match="factor is missing"):
        config.with_rope_scaling({"rope_type": "dynamic"})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported; supported: Llama"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: Llama"),
        ({"architectures": None, "model_type": ["x"]}, r"model_type \['x'\]"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "RoPE type 'su' is not supported; supported: default, linear"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}}, "RoPE parameter 'mrope_section'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ],
)
def test_says_what_is_not_supported(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedModelError, match=complaint):
        ModelConfig.from_dict({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": True}, "hidden_size is True, expected an integer from 1 to 131072"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected an integer from 1 to 1024"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide num_attention_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"vocab_size": "100"}, "vocab_size is '100'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"eos_token_id": -2}, "eos_token_id is -2"),
        ({"eos_token_id": [[2]]}, r"eos_token_id is \[\[2\]\]"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], expected an object"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor is inf"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor is 4, expected more than low_freq_factor 4",
        ),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]},
            "no_rope_layers has 2 entries, expected 4",
        ),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [2] * 4}, "expected a list of 0, 1"),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 5}, "from 1 to 4"),
    ],
)
def test_says_what_is_wrong(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelFileError, match=complaint):
        ModelConfig.from_dict({**LLAMA, **changes})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*LLAMA, "rope_scaling", "rope_theta", "head_dim", "layer_types", "sliding_window", "use_sliding_window"]


@pytest.mark.fault("F26")
@given(
    architecture=st.sampled_from(["LlamaForCausalLM", "Qwen3MoeForCausalLM", "SmolLM3ForCausalLM"]),
    changes=st.dictionaries(st.sampled_from([*KEYS, "num_experts", "mlp_only_layers", "no_rope_layers"]), json_values),
)
def test_any_json_gives_a_config_or_a_clear_error(architecture: str, changes: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_dict({**LLAMA, "architectures": [architecture], **changes})
    except (ModelFileError, UnsupportedModelError):
        return
    assert len(config.windows) == len(config.rotary) == len(config.sparse) == config.num_hidden_layers


def test_from_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content, complaint in [
        (None, "cannot read"),
        (b"{", "cannot read"),
        (b"\xff", "cannot read"),
        (b"[" * 100_000, "cannot read"),
        (b"[]", "holds a list, expected an object"),
        (b" " * (4 << 20) + b"{}", "allowed are 4194304"),
    ]:
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ModelFileError, match=complaint):
            ModelConfig.from_folder(tmp_path)
    file.write_text(json.dumps(LLAMA))
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(LLAMA)


@pytest.mark.parametrize("named", [{"architectures": ["x" * 100_000]}, {"model_type": "x" * 100_000}])
def test_long_names_make_no_long_errors(named: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        ModelConfig.from_dict(named)
    assert len(str(refused.value)) < 5000
