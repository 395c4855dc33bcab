"""Families that differ in what attention, its holders and states do: one text in every placement, and that of
transformers; int8 and bfloat16 change little."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from evaluate import tiny_models
from hybrid_families import FAMILIES, VOCABULARY, word_tokenizer, written
from real_workers import WorkerProcess, write_tiny_model
from tiny_decoders import BLOCK_INDEX, LATENTS, TOKEN_INDEX
from whole_engines import engine, first_logprobs, greedy, shifts, texts, third_quartile

pytestmark = pytest.mark.filterwarnings("ignore")

WINDOW = {"sliding_window": 40, "num_hidden_layers": 4}
LLAMA_LIKE: dict[str, dict[str, Any]] = {
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 5.0, **WINDOW},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 2, **WINDOW},
    "granite": {"architectures": ["GraniteForCausalLM"], "attention_multiplier": 0.3, "residual_multiplier": 0.4},
    "glm4": {"architectures": ["Glm4ForCausalLM"]},
    "olmo3": {"architectures": ["Olmo3ForCausalLM"], **WINDOW},
    "cohere2": {"architectures": ["Cohere2ForCausalLM"], **WINDOW},
    "phi3 longrope": {
        "architectures": ["Phi3ForCausalLM"],
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 80,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0, 2.0, 4.0, 5.0]},
    },
}
PROMPTS = [[(3 * i + n) % 101 for i in range(n)] for n in (1, 17, 70, 150)]
TOKENS = 24
NARROW = {"policy": "streaming(sink=2,recent=24)"}

FULL, NEAR = "full_attention", "sliding_attention"
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # the type for transformers, and its options
    "pools of two shapes": (
        "mimo_v2_flash",
        {"num_attention_heads": 8, "head_dim": 24, "v_head_dim": 16, "mlp_layer_types": ["dense"] * 4}
        | {"layer_types": [FULL, NEAR, NEAR, FULL]},
    ),
    "converted": ("exaone4", {"head_dim": 32}),
}
draw = random.Random(1)
DRAWN = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in (3, 90, 41)]
DRAWN.append([*DRAWN[1][:70], 5, 6, 7])  # it begins as the second does


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_one_text_in_every_placement_and_under_a_policy(
    family: str, workers: list[WorkerProcess], tmp_path: Path
) -> None:
    """Whole, by heads, by ranges; then the same under a policy inside the model's own windows."""
    folder = write_tiny_model(tmp_path / "model", **LLAMA_LIKE[family])

    def of(count: int = 0, **options: Any) -> list[tuple[int, ...]]:
        with engine(folder, workers[:count], **options) as llm:
            return texts(llm, PROMPTS, TOKENS)

    whole, narrow = of(), of(**NARROW)
    assert whole != narrow
    assert of(1) == of(2, shard="heads") == of(2, shard="sequence") == whole
    assert of(2, shard="heads", **NARROW) == narrow


def made(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model in a folder, where a token is a word; as transformers has it."""
    if family in FAMILIES:
        return written(family, folder)
    kind, options = OTHERS[family]
    monkeypatch.setitem(tiny_models.NAMES, "mimo_v2_flash", "MiMoV2FlashForCausalLM")
    word_tokenizer(folder, VOCABULARY)
    return tiny_models.make(kind, folder, vocab_size=VOCABULARY, **options)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_texts_are_those_of_transformers_in_every_placement(
    family: str, workers: list[WorkerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, at one worker, at two by heads; the prompts come in chunks of at most 64 tokens."""
    right = greedy(made(family, tmp_path, monkeypatch), DRAWN, 16)
    placements: list[tuple[int, dict[str, Any]]] = [(0, {}), (1, {}), (2, {"lanes": 2})]
    if family == "pools of two shapes":
        placements.append((2, {"shard": "heads+sequence", "max_batch_tokens": 32}))
    for count, options in placements:
        with engine(tmp_path, workers[:count], **options) as llm:
            if family == "pools of two shapes":
                pages = llm._runtime.engine._control.placement.pages  # type: ignore[union-attr]
                assert {pool for _, pool in pages} == {0, 1}
            assert texts(llm, DRAWN, 16) == right


@pytest.mark.real
def test_model_workers_take_turns_at_a_converted_model(
    workers: list[WorkerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = greedy(made("converted", tmp_path, monkeypatch), DRAWN, 16)
    with engine(tmp_path, workers, model_workers=2, model_parallel="replicas", lanes="auto") as llm:
        assert texts(llm, DRAWN, 16) == right


CHOOSING = {"blocks of MiniMax-M3": BLOCK_INDEX, "tokens of DeepSeek V3.2": TOKEN_INDEX}


@pytest.mark.parametrize("family", [*LLAMA_LIKE, "minicpm3", *CHOOSING])
def test_int8_kv_changes_first_tokens_by_little(family: str, tmp_path: Path) -> None:
    """The logits of the token behind each prompt, whose past is in int8, against those of float32. Where an index
    chooses keys, it may choose another for one prompt, which moves much in a random model: most are looked at."""
    folder = write_tiny_model(tmp_path / "model", **(LLAMA_LIKE | LATENTS | CHOOSING)[family])
    logprobs = []
    for kv_dtype in ("float32", "int8"):
        with engine(folder, kv_dtype=kv_dtype) as llm:
            logprobs.append(first_logprobs(llm, PROMPTS))
    moved = shifts(*logprobs)
    if family in CHOOSING:
        assert 0 < third_quartile(moved) < 0.1
    else:
        assert 0 < (third_quartile(moved) if family in LATENTS else moved[-1]) < 0.2


@pytest.mark.parametrize("family", LATENTS)
@pytest.mark.parametrize("count", [0, 1])
def test_bfloat16_changes_first_tokens_of_latents_by_little(
    family: str, count: int, workers: list[WorkerProcess], tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "model", **LATENTS[family])
    with engine(folder) as llm:
        exact = first_logprobs(llm, PROMPTS)
    with engine(folder, workers[:count], dtype="bfloat16") as llm:
        assert 0 < third_quartile(shifts(exact, first_logprobs(llm, PROMPTS))) < 0.1
