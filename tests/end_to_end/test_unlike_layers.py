"""A model whose layers keep KV of two shapes, behind the whole engine: each shape has a pool of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate import tiny_models
from tokenizers import Tokenizer, models

from lamina import LLM, SamplingParams

TOKENS, VOCABULARY = 20, 96

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param({}, id="alone"),
        pytest.param({"attention_workers": 2, "shard": "heads+sequence"}, id="both shards", marks=pytest.mark.real),
        pytest.param({"attention_workers": 2, "local_share": 0, "lanes": 2}, id="lanes", marks=pytest.mark.real),
    ],
)
def test_greedy_tokens_equal_transformers(
    workers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny_models.NAMES, "mimo_v2_flash", "MiMoV2FlashForCausalLM")
    full, near = "full_attention", "sliding_attention"
    model = tiny_models.make(
        "mimo_v2_flash", tmp_path, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=24,
        v_head_dim=16, sliding_window=9, layer_types=[full, near, near, full], vocab_size=VOCABULARY,
        mlp_layer_types=["dense"] * 4,
    )  # fmt: skip
    words = {f"w{index} ": index for index in range(VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token="w0 ")).save(str(tmp_path / "tokenizer.json"))
    draw = random.Random(1)
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in (3, 70, 41)]
    prompts.append([*prompts[1][:64], 5, 6, 7])
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    with LLM(tmp_path, dtype="float32", kv_memory="4MiB", page_size=16, max_batch_tokens=32, **workers) as llm:
        assert {pool for _, pool in llm._runtime.engine._control.placement.pages} == {0, 1}
        found = llm.generate(prompts, sampling)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert list(completion.token_ids) == ids[-TOKENS:]
