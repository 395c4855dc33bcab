"""The decoder against transformers, on tiny random checkpoints of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from dense_attention import DenseAttention
from engine_rig import DEVICE
from hybrid_families import FAMILIES as HYBRIDS
from reference_models import Tensors, check_against, load, reference
from safetensors.torch import load_file

from lamina_kernels.dense.dense import repacks
from lamina_workers.decoder.model import Batch, Decoder, Forward, KeyValueReady, QueryReady
from lamina_workers.decoder.rope import Rotary
from lamina_workers.errors import ModelFileError
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_config.families import FAMILIES as NATIVE
from lamina_workers.model_config.rope_config import RopeConfig

# Newer transformers would rather have it called `cache`, older ones know only this name.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")

GEMMA = {"head_dim": 24, "sliding_window": 9, "query_pre_attn_scalar": 20, "tie_word_embeddings": True}
FAMILIES = {
    "llama mha": ("llama", {"num_key_value_heads": 4}),
    "llama mqa tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama biased, odd group": (
        "llama",
        {"num_attention_heads": 6, "hidden_size": 72, "attention_bias": True, "mlp_bias": True},
    ),
    "llama wide heads": ("llama", {"head_dim": 40}),
    "mistral window": ("mistral", {"sliding_window": 9}),
    "mistral full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"num_attention_heads": 6, "hidden_size": 60, "tie_word_embeddings": True}),
    "qwen2 window in late layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 32}),
    "qwen3 layer types": (
        "qwen3",
        {
            "head_dim": 32,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}),
    "smollm3 window": (
        "smollm3",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 11}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        }
        | {"mlp_only_layers": [1]},
    ),
    "qwen3_moe unnormalised": (
        "qwen3_moe",
        {"head_dim": 24, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 10},
    ),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "phi3 fused maps": ("phi3", {"sliding_window": 9}),
    "phi4 mini": ("phi3", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True} | {"head_dim": 16}),
    "granite": (
        "granite",
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 5.0},
    ),
    "ernie4_5 interleaved": ("ernie4_5", {"head_dim": 24, "use_bias": True}),
    "seed_oss": ("seed_oss", {"head_dim": 24, "attention_bias": True, "mlp_bias": True}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 24}),
    "hunyuan with another base": (
        "hunyuan_v1_dense",
        {"head_dim": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0}},
    ),
    "glm4": ("glm4", {"head_dim": 24}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"num_hidden_layers": 4, "sliding_window": 9}),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "sliding_window": 9, "logit_scale": 0.7}),
}
FAMILIES |= {
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56}
        | {"mlp_only_layers": [1]},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 24, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 9, "swiglu_limit": 0.6}
        | {"num_hidden_layers": 4},
    ),
    "gpt_oss without windows": (
        "gpt_oss",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 3, "swiglu_alpha": 0.7}
        | {"num_attention_heads": 6, "hidden_size": 96, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 12, "v_head_dim": 20}
LATENT |= {"qk_rope_head_dim": 16}
EXPERTS = LATENT | {"n_routed_experts": 8, "moe_intermediate_size": 40, "num_experts_per_tok": 3, "n_group": 4}
EXPERTS |= {"topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
FAMILIES |= {
    "deepseek_v2": ("deepseek_v2", EXPERTS | {"topk_method": "group_limited_greedy", "n_shared_experts": 2}),
    "deepseek_v2 lite": (
        "deepseek_v2",
        EXPERTS
        | {"q_lora_rank": None, "n_group": None, "topk_group": None, "num_attention_heads": 3, "hidden_size": 60}
        | {"num_key_value_heads": 3, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        EXPERTS | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.3}, "max_position_embeddings": 64},
    ),
    "deepseek_v3 in halves": (
        "deepseek_v3",
        EXPERTS | {"q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "first_k_dense_replace": 0},
    ),
    "minicpm3": ("minicpm3", LATENT | {"scale_emb": 3.0, "scale_depth": 0.9, "dim_model_base": 40}),
    "minicpm3 longrope": (
        "minicpm3",
        LATENT
        | {"v_head_dim": None, "tie_word_embeddings": False}
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0 + i / 8 for i in range(8)],
                "long_factor": [2.0 + i for i in range(8)],
                "original_max_position_embeddings": 44,
            }
        },
    ),
}
INDEX = EXPERTS | {
    "index_topk": 9,
    "index_n_heads": 24,
    "index_head_dim": 32,
}  # of few heads, scores of 0 would be alike
FAMILIES |= {
    "deepseek_v32": ("deepseek_v32", INDEX | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.3}}),
    "glm_moe_dsa": ("glm_moe_dsa", INDEX | {"index_head_dim": 16}),
}
M3 = {
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "intermediate_size": 40,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 48,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "swiglu_limit": 0.6,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 8,
    "index_topk_blocks": 2,
    "layer_types": ["minimax_m3_sparse"] * 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
FAMILIES |= {
    "glm4_moe": (
        "glm4_moe",
        {"head_dim": 24, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2, "routed_scaling_factor": 1.7},
    ),
    "minimax_m2": ("minimax_m2", {"head_dim": 24, "num_local_experts": 6, "num_experts_per_tok": 2, "rotary_dim": 12}),
    "minimax_m3": ("minimax_m3_vl_text", M3),
    "minimax_m3 with full layers": (
        "minimax_m3_vl_text",
        M3 | {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], "index_block_size": 5},
    ),
    "minimax_m3 without local blocks": (
        "minimax_m3_vl_text",
        M3 | {"index_local_blocks": 0, "num_attention_heads": 6, "rope_parameters": {"rope_theta": 1e4}},
    ),
}
# Trained for 32 positions; the test's sequences are longer.
ROPES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "longrope, longer than before while decoding": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 44,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn with a factor of its own": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
        "truncate": False,
    },
}


def test_every_native_type_has_a_tiny_checkpoint() -> None:
    met = {kind.removesuffix("_text") for kind, _ in (*FAMILIES.values(), *HYBRIDS.values())}
    assert {family.model_type.removesuffix("_text") for family in NATIVE.values()} == met


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_transformers(family: str, tmp_path: Path) -> None:
    model = reference(*FAMILIES[family])
    check_against(model, load(model, tmp_path))


@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling_equals_transformers(rope: str, tmp_path: Path) -> None:
    model = reference("llama", {"max_position_embeddings": 32, "rope_parameters": {"rope_theta": 500.0, **ROPES[rope]}})
    check_against(model, load(model, tmp_path))


def rope(kind: str, **fields: float) -> RopeConfig:
    defaults = {"theta": 1e4, "positions": 64, "original": 64, "factor": 4.0}
    return RopeConfig(kind, **{**defaults, **fields})  # type: ignore[arg-type]


def test_dynamic_depends_on_the_length_beyond_what_it_was_trained_for() -> None:
    rotary = Rotary(rope("dynamic"), 16)
    positions = torch.full((4,), 30)
    cos, sin = rotary(positions, torch.tensor([31, 64, 65, 640]))
    assert torch.equal(cos[0], cos[1])
    assert not torch.equal(cos[1], cos[2])
    plain_cos, plain_sin = Rotary(rope("default"), 16)(positions[:1], None)
    torch.testing.assert_close(cos[:1], plain_cos)
    # The slowest pair turns 1 / (factor * n / positions - (factor - 1)) as fast: the exponent is made for that.
    torch.testing.assert_close(sin[3, -1].asin() * (4 * 640 / 64 - 3), plain_sin[0, -1].asin())


def test_dynamic_without_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="rope_lengths"):
        Rotary(rope("dynamic"), 16)(torch.tensor([1]), None)


@pytest.mark.parametrize(
    ("kind", "context"), [("default", 64), ("llama3", 64), ("linear", 256), ("dynamic", 256), ("yarn", 128)]
)
def test_context_counts_the_factor_where_the_config_does_not(kind: str, context: int) -> None:
    assert rope(kind, original=32).context == context


Tiny = tuple[transformers.PreTrainedModel, ModelConfig, Tensors]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tied Llama, its config and its tensors."""
    model = reference("llama", {"tie_word_embeddings": True})
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return model, ModelConfig.from_folder(folder), Tensors(load_file(folder / "model.safetensors"))


def batch(tokens: int, sampled: list[int] | None = None) -> Batch:
    wanted = torch.arange(tokens) if sampled is None else torch.tensor(sampled, dtype=torch.int64)
    return Batch(torch.arange(tokens) * 7 % 97, torch.arange(tokens), wanted)


def drive(
    decoder: Decoder, batch: Batch, answer: torch.Tensor, query_first: bool = False
) -> tuple[list[QueryReady | KeyValueReady], torch.Tensor]:
    """Every event, and the logits, where attention always yields `answer`."""
    forward = decoder.forward(batch, query_first=query_first)
    events = [next(forward)]
    while True:
        try:
            asked = isinstance(events[-1], KeyValueReady)
            events.append(forward.send(answer) if asked else next(forward))
        except StopIteration as end:
            return events, end.value


def test_events_have_the_promised_order_shapes_and_dtype(tiny: Tiny) -> None:
    decoder = Decoder.load(tiny[1], tiny[2], torch.bfloat16)
    events, logits = drive(decoder, batch(5), torch.zeros(5, 64, dtype=torch.bfloat16))
    for index, event in enumerate(events):
        assert event.layer == index // 2
        if index % 2 == 0:
            assert isinstance(event, QueryReady)
            assert (event.q.shape, event.q.dtype) == ((5, 4, 16), torch.bfloat16)
        else:
            assert isinstance(event, KeyValueReady)
            assert (event.k.shape, event.v.shape, event.v.dtype) == ((5, 2, 16), (5, 2, 16), torch.bfloat16)
    assert len(events) == 6
    assert (logits.shape, logits.dtype) == ((5, 97), torch.float32)


def test_an_answer_may_keep_its_heads_apart(tiny: Tiny) -> None:
    decoder = Decoder.load(tiny[1], tiny[2], torch.float32)
    answer = torch.randn(5, 4, 16)
    assert torch.equal(drive(decoder, batch(5), answer)[1], drive(decoder, batch(5), answer.reshape(5, 64))[1])


@pytest.mark.parametrize("sampled", [[], [4], [3, 0, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_sampled_tokens_get_logits(tiny: Tiny, sampled: list[int], dtype: torch.dtype) -> None:
    decoder, answer = Decoder.load(tiny[1], tiny[2], dtype), torch.randn(5, 64).to(dtype)
    _, everything = drive(decoder, batch(5), answer)
    _, found = drive(decoder, batch(5, sampled), answer)
    torch.testing.assert_close(found, everything[sampled], rtol=0, atol=1e-5 if dtype is torch.float32 else 0.1)


def test_starts_at_any_layer_and_leaves_hidden_alone(tiny: Tiny) -> None:
    model, config, tensors = tiny
    tokens = list(range(3, 20))
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]), output_hidden_states=True)
        for layer in range(config.num_hidden_layers):
            hidden = expected.hidden_states[layer][0]
            before = hidden.clone()
            sequence = DenseAttention(Decoder.load(config, tensors, torch.float32, DEVICE), len(tokens))
            logits = sequence.run(tokens, hidden, layer)
            torch.testing.assert_close(logits, expected.logits[0], rtol=0, atol=1e-4)
            assert torch.equal(hidden, before)


@pytest.mark.parametrize(("first_layer", "hidden"), [(-1, torch.zeros(5, 64)), (3, torch.zeros(5, 64)), (1, None)])
def test_refuses_layers_that_do_not_exist(tiny: Tiny, first_layer: int, hidden: torch.Tensor | None) -> None:
    decoder = Decoder.load(tiny[1], tiny[2], torch.float32)
    with pytest.raises(ValueError, match=f"first_layer is {first_layer}, allowed is 0 to 2"):
        next(decoder.forward(batch(5), hidden, first_layer))


def test_refuses_attention_without_the_layer_before_it(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="above 0 with hidden"):
        next(Decoder.load(tiny[1], tiny[2], torch.float32).forward(batch(5), None, 0, torch.zeros(1)))


def test_refuses_to_go_on_without_attention(tiny: Tiny) -> None:
    forward = Decoder.load(tiny[1], tiny[2], torch.float32).forward(batch(5))
    next(forward)
    next(forward)
    with pytest.raises(ValueError, match="layer 0 needs the output"):
        next(forward)


def test_bfloat16_stays_near_float32(tiny: Tiny) -> None:
    model, config, tensors = tiny
    tokens = list(range(3, 40))
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
        found = DenseAttention(Decoder.load(config, tensors, torch.bfloat16, DEVICE), len(tokens)).run(tokens)
    assert (found - expected).abs().mean() < 0.03 * expected.std()
    assert (found - expected).abs().max() > 0


@pytest.mark.parametrize("query_first", [False, True])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"num_attention_heads": 6, "hidden_size": 96, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"vocab_size": 100}),
        ("qwen3", {"head_dim": 32, "vocab_size": 100}),
        ("gemma3_text", {"head_dim": 32, "sliding_window": 3, "tie_word_embeddings": True}),
        ("gemma2", {"head_dim": 32, "final_logit_softcapping": 3.0, "vocab_size": 100}),
        ("glm4", {"head_dim": 32}),
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True}),
    ],
)
def test_spans_change_no_bit(
    kind: str, more: dict[str, object], query_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reference(kind, more)
    decoder = load(model, tmp_path, torch.bfloat16)
    monkeypatch.setattr("lamina_workers.decoder.model.decoder_spans", lambda *_, **__: None)
    plain = load(model, tmp_path, torch.bfloat16)
    monkeypatch.undo()
    tokens = batch(5, [4, 0])
    answer = torch.randn(5, decoder.config.num_attention_heads * decoder.config.head_dim).bfloat16()
    with torch.inference_mode():
        found, logits = drive(decoder, tokens, answer, query_first)
        expected, expected_logits = drive(plain, tokens, answer, query_first)
        assert torch.equal(logits, expected_logits)
        for event, other in zip(found, expected, strict=True):
            assert event.layer == other.layer
            for name in ("q",) if isinstance(event, QueryReady) else ("k", "v", "hidden"):
                assert torch.equal(getattr(event, name), getattr(other, name))
        # From each cut on: behind an attention, and before one.
        for event in found:
            if not isinstance(event, KeyValueReady) or event.hidden is None:
                continue
            for attended in (None, answer):
                rest = decoder.forward(tokens, event.hidden, event.layer, attended, query_first)
                assert torch.equal(finish(rest, answer), logits)


def finish(forward: Forward, answer: torch.Tensor) -> torch.Tensor:
    """The logits, where attention always yields `answer`."""
    try:
        event = next(forward)
        while True:
            event = forward.send(answer if isinstance(event, KeyValueReady) else None)
    except StopIteration as end:
        logits: torch.Tensor = end.value
        return logits


def test_an_untied_checkpoint_is_counted_whole(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    reference("llama", {}).save_pretrained(tmp_path)
    tensors = Tensors(load_file(tmp_path / "model.safetensors"))
    config = ModelConfig.from_folder(tmp_path)
    Decoder.load(config, tensors, torch.float32, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i + 1, len(tensors)) for i in range(len(tensors))]
    assert sorted(tensors.released) == sorted(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_releases_each_tensor_once_and_copies_all_but_the_embedding(tiny: Tiny, dtype: torch.dtype) -> None:
    tensors = Tensors({name: tensor.clone() for name, tensor in tiny[2].items()})
    steps = []
    decoder = Decoder.load(tiny[1], tensors, dtype, progress=lambda done, total: steps.append((done, total)))
    assert sorted(tensors.released) == sorted(tensors)
    assert steps == [(i + 1, len(tensors)) for i in range(len(tensors))]
    zeros = torch.zeros(5, 64, dtype=dtype)
    _, logits = drive(decoder, batch(5), zeros)
    for name in tensors:
        if name != "model.embed_tokens.weight":
            tensors[name].zero_()  # what was loaded is a copy
    assert torch.equal(drive(decoder, batch(5), zeros)[1], logits)
    tensors["model.embed_tokens.weight"].zero_()
    kept = drive(decoder, batch(5), zeros)[1]
    if not repacks(tensors["model.embed_tokens.weight"].to(dtype)):  # head and embedding are one
        assert torch.equal(kept, logits)
    else:
        assert kept.count_nonzero() == 0


def test_names_what_is_wrong_with_a_checkpoint(tiny: Tiny) -> None:
    _, config, tensors = tiny
    name = "model.layers.1.self_attn.k_proj.weight"

    def complaint(tensors: dict[str, torch.Tensor]) -> str:
        with pytest.raises(ModelFileError) as error:
            Decoder.load(config, Tensors(tensors), torch.float32)
        return str(error.value)

    assert complaint({k: v for k, v in tensors.items() if k != name}) == f"the checkpoint lacks {name}"
    many = {f"model.extra.{i}": torch.zeros(1) for i in range(7)}
    assert complaint({**tensors, **many}).endswith("model.extra.3, model.extra.4 and 2 more")
    found = complaint({**tensors, name: torch.zeros(64, 64)})
    assert found == f"tensor {name} has shape [64, 64], the config wants [32, 64]"
    assert "torch.int8" in complaint({**tensors, name: torch.zeros(32, 64, dtype=torch.int8)})


def test_ignores_what_is_known_to_be_harmless(tiny: Tiny) -> None:
    _, config, tensors = tiny
    extra = {"lm_head.weight": torch.zeros(97, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    _, found = drive(Decoder.load(config, Tensors({**tensors, **extra}), torch.float32), batch(5), torch.zeros(5, 64))
    _, plain = drive(Decoder.load(config, tensors, torch.float32), batch(5), torch.zeros(5, 64))
    assert torch.equal(found, plain)
