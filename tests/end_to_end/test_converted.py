"""A converted model behind the whole engine: alone, with attention workers, and with two model workers in turns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate import tiny_models
from tokenizers import Tokenizer

from lamina import LLM, SamplingParams
from lamina.models.resolve import resolve

TOKENS = 8

pytestmark = [
    pytest.mark.data,
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param({}, id="alone"),
        pytest.param({"attention_workers": 2}, id="attention workers", marks=pytest.mark.real),
        pytest.param(
            {"attention_workers": 2, "model_workers": 2, "model_parallel": "replicas"},
            id="replicas",
            marks=pytest.mark.real,
        ),
    ],
)
def test_greedy_tokens_equal_transformers(workers: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_models.make("exaone4", tmp_path, vocab_size=49152, head_dim=32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("smollm2-135m") / name, tmp_path / name)
    prompts = ["The tide comes in", "Two harbours, one ferry, and a timetable that nobody has read since spring"]
    with LLM(tmp_path, dtype="float32", kv_memory="64MiB", **workers) as llm:
        found = llm.generate(prompts, SamplingParams(max_tokens=TOKENS, temperature=0))
    for prompt, completion in zip(prompts, found, strict=True):
        ids = list(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(prompt).ids)
        with torch.inference_mode():
            for _ in range(TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert list(completion.token_ids) == ids[-TOKENS:]
