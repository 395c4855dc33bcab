"""Shapes of models: published counts, the config's many forms, and what a config may not say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import InvalidRequest
from lamina.simulator.costs.model_configs import PRESETS, from_config, from_folder, model
from lamina.simulator.costs.shapes import ModelShape

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 10}
INDEX = {"q_lora_rank": 20, "index_topk": 16, "index_head_dim": 12, "index_n_heads": 3}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "head_dim": 8,
}
MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 48}
GRANITE = {**MAMBA, "shared_intermediate_size": 30, "layer_types": ["linear_attention", "full_attention"] * 2}
NEMOTRON = {
    **MOE,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    "n_routed_experts": 5,
    "moe_shared_expert_intermediate_size": 28,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "head_dim": 8,
}
DSA = {"model_type": "glm_moe_dsa", "n_routed_experts": 8, **MOE, **MLA, **INDEX}
M3 = {
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 30,
    "dense_intermediate_size": 44,
    "head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}


def small(**more: Any) -> ModelShape:
    return from_config({**SMALL, **more}, "small")


def active_parameters(shape: ModelShape) -> int:
    """What one token uses, the input table included, as models' names count ("A22B")."""
    idle = sum(group.layers * (group.experts - group.top_k) * group.expert for group in shape.groups)
    return shape.parameters - idle


@pytest.mark.parametrize(
    ("name", "active", "tolerance"),
    [  # what the models' cards say, rounded there to the billion; all parameters are in test_mixers
        ("mixtral-8x7b", 12.9e9, 0.005),
        ("mixtral-8x22b", 39e9, 0.005),
        ("qwen3-30b-a3b", 3.3e9, 0.02),
        ("qwen3-235b-a22b", 22e9, 0.01),
        ("deepseek-v2", 21e9, 0.02),
        ("deepseek-v3", 37e9, 0.02),
    ],
)
def test_active_parameters_are_those_published(name: str, active: float, tolerance: float) -> None:
    assert active_parameters(model(name)) == pytest.approx(active, rel=tolerance)


def test_a_paper_s_weights_stand_for_the_count() -> None:
    shape = model("llama-3-70b")
    assert shape.weight_bytes == 137.5e9
    read = shape.parameters - shape.embedding
    assert shape.weights_read(1) == pytest.approx(137.5e9 * read / shape.parameters)
    assert replace(shape, published_weight_bytes=None).weight_bytes == 2 * shape.parameters


def test_exchange_of_grouped_queries_is_the_paper_s_formula() -> None:
    shape = model("llama-3-70b")
    assert shape.exchange_bytes() == (2 + 2 / 8) * 2 * 8192 * 80 == 2_949_120
    assert shape.attention_flops(1000) == 4 * 8192 * 80 * 1000
    assert shape.kv_bytes_read(1000, 1.0) == shape.kv_bytes_per_token(1.0) * 1000


def test_projections() -> None:
    shape = model("llama-65b")
    assert shape.kv_projection_flops(3) == 3 * 80 * 4 * 8192 * 8192
    groups = [(group.layers, group.projections + group.mlp + group.top_k * group.expert) for group in shape.groups]
    multiplied = sum(layers * parameters for layers, parameters in groups) + shape.head
    assert shape.dense_flops(7) == 14 * multiplied
    assert shape.dense_flops(7, sampled=1) == shape.dense_flops(7) - 12 * shape.head


def test_values_of_another_width() -> None:
    (group,) = small(head_dim=12, v_head_dim=8).groups
    assert (group.kv_elements, group.query_elements, group.output_elements) == (2 * 20, 6 * 12, 6 * 8)
    assert group.projections == 48 * (6 * 12 + 2 * 20 + 6 * 8)
    assert group.score_flops == 2 * 6 * 20


def test_absorbed_latent_attention() -> None:
    shape = model("deepseek-v3")
    assert shape.layers == 61
    assert shape.kv_bytes_per_token() == 61 * 576 * 2
    dense, sparse = shape.groups
    assert (dense.layers, sparse.layers) == (3, 58)
    assert (sparse.kv_heads, sparse.experts, sparse.top_k) == (1, 256, 8)
    assert (sparse.query_elements, sparse.output_elements) == (128 * 576, 128 * 512)
    assert sparse.score_flops == 2 * 128 * (2 * 512 + 64)
    assert sparse.kv_projections == 7168 * 576
    assert model("deepseek-v2-lite").groups[0].vectors == 512 + 2 * 2048  # no norm of queries, as they have no rank


def test_experts_that_a_batch_is_expected_to_read() -> None:
    shape = model("mixtral-8x7b")
    (group,) = shape.groups
    assert group.experts_read(0) == 0
    assert group.experts_read(1) == pytest.approx(2)
    assert group.experts_read(2) == pytest.approx(8 * (1 - 0.75**2))
    assert group.experts_read(1000) == pytest.approx(8)
    assert shape.weights_read(0) == 0
    assert shape.weights_read(1) == pytest.approx(2 * (active_parameters(shape) - shape.embedding))
    assert shape.weights_read(10_000) == pytest.approx(2 * (shape.parameters - shape.embedding))


def test_a_tied_table_is_kept_once_and_read_as_the_head() -> None:
    tied, untied = small(tie_word_embeddings=True), small()
    assert untied.parameters - tied.parameters == tied.head == 131 * 48
    assert tied.weights_read(3) == untied.weights_read(3) == 2 * tied.parameters


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, [None] * 4),
        ({"sliding_window": 7, "sliding_window_pattern": 3}, [7, 7, None, 7]),
        ({"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2}, [7, None, 7, None]),
        ({"attention_chunk_size": 5, "layer_types": ["full_attention"] + ["chunked_attention"] * 3}, [None, 5, 5, 5]),
    ],
)
def test_windows(more: dict[str, Any], expected: list[int | None]) -> None:
    shape = small(**more)
    widths = {window: expected.count(window) for window in expected}
    assert {group.window: group.layers for group in shape.groups} == widths
    read = sum(min(100, 100 if window is None else window) for window in expected)
    assert shape.kv_bytes_read(100) == read * 2 * 2 * shape.groups[0].kv_elements / 2
    assert shape.attention_flops(100) == read * shape.groups[0].score_flops


@pytest.mark.parametrize(
    ("more", "sparse"),
    [
        ({"num_local_experts": 5}, 4),
        ({"num_experts": 5, "decoder_sparse_step": 2}, 2),
        ({"num_experts": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, 1),
        ({"n_routed_experts": 5, "first_k_dense_replace": 3, "n_shared_experts": 2}, 1),
        ({"n_routed_experts": 5, "moe_layer_freq": 4}, 1),
    ],
)
def test_which_layers_have_experts(more: dict[str, Any], sparse: int) -> None:
    shape = small(**MOE, **more)
    assert sum(group.layers for group in shape.groups if group.experts) == sparse
    assert {group.expert for group in shape.groups if group.experts} == {3 * 48 * 24}
    shared = {group.mlp for group in shape.groups if group.experts}
    assert shared == {48 * 5 + more.get("n_shared_experts", 0) * 3 * 48 * 24}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen2_moe", {"num_experts": 6, **MOE, "shared_expert_intermediate_size": 40}),
        ("qwen3", {"head_dim": 8}),
        ("qwen3_moe", {"num_experts": 6, **MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        ("mixtral", {"num_local_experts": 5}),
        ("gemma2", {"head_dim": 12}),
        ("gemma3_text", {"head_dim": 12}),
        ("phi3", {}),
        ("granite", {"attention_bias": True}),
        ("ernie4_5", {"head_dim": 8, "use_bias": True}),
        ("seed_oss", {"head_dim": 8, "mlp_bias": True}),
        ("hunyuan_v1_dense", {"head_dim": 8}),
        ("glm4", {"head_dim": 8}),
        ("olmo2", {"attention_bias": True}),
        ("olmo3", {}),
        ("cohere2", {}),
        ("gpt_oss", {"head_dim": 12, "num_local_experts": 5}),
        ("smollm3", {}),
        ("deepseek_v2", {"n_routed_experts": 8, **MOE, **MLA, "q_lora_rank": None, "first_k_dense_replace": 2}),
        ("deepseek_v3", {"n_routed_experts": 8, **MOE, **MLA, "q_lora_rank": 20, "first_k_dense_replace": 1}),
        ("deepseek_v32", {"n_routed_experts": 8, **MOE, **MLA, **INDEX}),
        ("glm_moe_dsa", {"n_routed_experts": 8, **MOE, **MLA, **INDEX}),
        ("glm_moe_dsa", {"n_routed_experts": 8, **MOE, **MLA, **INDEX, "indexer_types": ["full", "shared"] * 2}),
        ("minicpm3", {**MLA, "q_lora_rank": 20, "v_head_dim": None}),
        ("minimax", {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16}),
        (
            "minimax",
            {"num_local_experts": 5, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2},
        ),
        ("qwen3_next", {**DELTA, **MOE, "num_experts": 6, "shared_expert_intermediate_size": 40}),
        ("qwen3_5_text", DELTA),
        ("qwen3_5_moe_text", {**DELTA, **MOE, "num_experts": 6, "shared_expert_intermediate_size": 40}),
        ("nemotron_h", NEMOTRON),
        ("nemotron_h", {**NEMOTRON, "use_bias": True, "mlp_bias": True, "use_conv_bias": False}),
        ("nemotron_h", {**NEMOTRON, "moe_latent_size": 20, "attention_bias": True}),
        ("granitemoehybrid", {**GRANITE, "num_local_experts": 5}),
        ("granitemoehybrid", {**GRANITE, "num_local_experts": 0, "mamba_proj_bias": True, "attention_bias": True}),
        ("falcon_h1", {**MAMBA, "mamba_d_ssm": 96, "head_dim": 8, "projectors_bias": True}),
        ("falcon_h1", {**MAMBA, "mamba_d_ssm": 96, "mamba_rms_norm": True, "mlp_bias": True, "mamba_proj_bias": True}),
        (
            "kimi_linear",
            {**MOE, **MLA, "num_local_experts": 5, "linear_head_dim": 16, "linear_num_heads": 4, "q_lora_rank": None},
        ),
        ("minimax_m3_vl_text", M3),
    ],
)
def test_parameters_are_those_that_transformers_makes(kind: str, more: dict[str, Any]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    routing = {"n_group": 1, "topk_group": 1} if kind.startswith(("deepseek", "glm_moe")) else {}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    asked = {**SMALL, **tokens, **routing, **more}
    if kind == "nemotron_h":
        del asked["num_hidden_layers"]  # which follow from the list
    config = transformers.AutoConfig.for_model(kind, **asked)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config)
    assert from_config(config.to_dict(), kind).parameters == sum(each.numel() for each in module.parameters())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_hidden_layers": 16**5000}, "small: "),
        ({"num_local_experts": 4}, "num_experts_per_tok is missing"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size is missing"),
        ({"moe_num_experts": 4}, "the config has moe_num_experts, but none of n_routed_experts"),
        ({**MLA, "qk_rope_head_dim": None}, "qk_rope_head_dim is missing"),
        ({**MLA, "v_head_dim": None}, "v_head_dim is missing"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": ["linear_attention"] * 4}, "expected a list of 'full_attention'"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window is missing"),
        ({"mamba_d_state": 16}, "the config has mamba_d_state; layers of that kind are not described"),
        ({"index_topk": 2048}, "index_topk"),
        ({"is_encoder_decoder": True}, "only decoders"),
        (
            {
                "sliding_window": 7,
                "attention_chunk_size": 5,
                "layer_types": ["sliding_attention", "chunked_attention"] * 2,
            },
            "windows of two widths",
        ),
        ({"model_type": "qwen3_5_text", **DELTA, "linear_key_head_dim": 12}, "a state has 12 x 32 numbers"),
        ({**DSA, "index_topk_pattern": "FXFF"}, "index_topk_pattern is 'FXFF'; allowed are F and S, one a layer"),
    ],
)
def test_what_a_config_may_not_say(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        small(**more)


@pytest.mark.parametrize(
    "more",
    [
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "unheard of"}},
        {"partial_rotary_factor": 0.5},
        {"architectures": ["LlamaForCausalLM"], "model_type": "relabelled"},
    ],
)
def test_what_the_engine_refuses_is_counted_where_it_costs_nothing(more: dict[str, Any]) -> None:
    assert small(**{"model_type": "llama", **more}) == small(model_type="llama") == small()


def test_layers_that_take_the_choice_of_the_one_before() -> None:
    shape = small(**DSA, indexer_types=["full", "full", "shared", "full"])
    choices = [(group.layers, group.choice and group.choice.key_elements) for group in shape.groups]
    assert choices == [(2, 12), (1, 0), (1, 12)]
    assert small(**DSA, index_topk_pattern="FFSF") == shape
    assert small(**DSA, index_topk_freq=2) == shape
    assert {group.choice and group.choice.key_elements for group in small(**DSA).groups} == {12}


def test_a_model_of_text_and_pictures_is_what_it_decodes_with() -> None:
    assert from_config({"model_type": "gemma3", "text_config": SMALL}, "small") == small()


keys = st.sampled_from(
    [
        *SMALL,
        *MLA,
        *MOE,
        *("model_type", "head_dim", "num_experts", "n_routed_experts", "num_local_experts", "n_shared_experts"),
        *("q_lora_rank", "first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "mlp_only_layers"),
        *("sliding_window", "use_sliding_window", "sliding_window_pattern", "layer_types", "max_window_layers"),
        *DELTA,
        *MAMBA,
        *NEMOTRON,
        *M3,
        *INDEX,
        *(
            "hybrid_override_pattern",
            "attn_type_list",
            "linear_attn_config",
            "indexer_types",
            "full_attention_interval",
        ),
        *("moe_layer_freq", "sparse_attention_config", "index_topk_freq", "index_topk_pattern", "linear_head_dim"),
        *("attention_bias", "mlp_bias", "tie_word_embeddings", "text_config", "shared_expert_intermediate_size"),
    ]
)
numbers = st.integers(-2, 9) | st.integers() | st.floats()
_WORDS = """minimax qwen3_next qwen3_5_text nemotron_h granitemoehybrid falcon_h1 kimi_linear glm_moe_dsa minicpm3
minimax_m3_vl linear_attention MEM*- FSSF qwen2 qwen3_moe deepseek_v3 gemma2 full_attention sliding_attention"""
words = st.sampled_from(["", *_WORDS.split()])
values = st.recursive(
    st.none() | st.booleans() | numbers | words | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(keys | st.text(max_size=5), values, max_size=12), st.booleans())
def test_no_config_does_worse_than_to_be_refused(raw: dict[str, Any], usable: bool) -> None:
    try:
        shape = from_config({**SMALL, **raw} if usable else raw, "random")
    except InvalidRequest:
        return
    assert shape.layers >= 1
    assert 0 < active_parameters(shape) <= shape.parameters
    assert (shape.attentions > 0) <= (0 < shape.kv_projection_bytes < shape.weights_read(1))
    assert (shape.attentions > 0) <= (0 < shape.kv_projection_flops(1) < shape.dense_flops(1))
    assert (shape.states > 0) == (shape.state_bytes > 0) == (shape.state_flops > 0)


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 4096), st.integers(1, 200_000))
def test_more_tokens_never_cost_less(name: str, tokens: int, context: int) -> None:
    shape = model(name)
    assert 0 < shape.weights_read(tokens) <= shape.weights_read(tokens + 1) <= shape.weight_bytes
    assert shape.dense_flops(tokens) < shape.dense_flops(tokens + 1)
    assert (
        shape.kv_bytes_read(context) <= shape.kv_bytes_read(context + 1) <= shape.kv_bytes_per_token() * (context + 1)
    )
    assert shape.attention_flops(context) <= shape.attention_flops(context + 1)
    assert shape.prefill_flops(context) <= shape.prefill_flops(context + 1)


def test_a_path_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    assert model(folder) == model(str(folder / "config.json")) == from_folder(folder) == replace(small(), name="mine")


def test_names() -> None:
    assert model("Qwen3-32B") is PRESETS["qwen3-32b"]
    for name in ("qwen3-33b", "", "a\0b", "x" * 5000):
        with pytest.raises(InvalidRequest, match=r"unknown model .*; known are llama-33b"):
            model(name)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '"\ud800"', "{" + " " * (4 << 20) + "}"])
def test_a_file_that_is_no_config(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InvalidRequest, match=r"cannot read the model at|holds a list"):
        from_folder(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", "a/\0"):
        with pytest.raises(InvalidRequest):
            model(path)
