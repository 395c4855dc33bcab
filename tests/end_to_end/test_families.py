"""Families that differ from Llama in what attention and its holders do, over real attention workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from real_workers import WorkerProcess, until, worker_process, write_tiny_model

from lamina import LLM

WINDOW = {"sliding_window": 40, "num_hidden_layers": 4}
FAMILIES: dict[str, dict[str, Any]] = {
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


@pytest.fixture(scope="module")
def workers() -> Iterator[list[WorkerProcess]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(worker_process()) for _ in range(2)]


def texts(model: Path, workers: Sequence[WorkerProcess] = (), **options: Any) -> list[tuple[int, ...]]:
    for worker in workers:
        until(lambda worker=worker: not worker.status().session)  # the last engine's
    options = {"dtype": "float32", "threads": 1, "page_size": 16, "kv_memory": "8MiB", "lanes": 1} | options
    if workers:
        options |= {"attention_workers": [worker.address for worker in workers], "local_share": 0}
    with LLM(model, max_batch_tokens=64, **options) as llm:
        return [c.token_ids for c in llm.generate(PROMPTS, max_tokens=24, temperature=0, ignore_eos=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_text_in_every_placement_and_under_a_policy(family: str, workers: list[WorkerProcess], tmp_path: Path):
    """Whole, by heads, by ranges; then the same under a policy inside the model's own windows."""
    model = write_tiny_model(tmp_path / "model", **FAMILIES[family])
    expected = texts(model)
    assert texts(model, workers[:1]) == expected
    assert texts(model, workers, shard="heads") == expected
    assert texts(model, workers, shard="sequence") == expected
    narrow = {"policy": "streaming(sink=2,recent=24)"}
    under_policy = texts(model, **narrow)
    assert under_policy != expected
    assert texts(model, workers, shard="heads", **narrow) == under_policy


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_kv_changes_first_tokens_by_little(family: str, tmp_path: Path):
    """The logits of the token behind each prompt, whose past is in int8, against those of float32."""
    model = write_tiny_model(tmp_path / "model", **FAMILIES[family])

    def first(kv_dtype: str) -> dict[tuple[int, int], float]:
        with LLM(model, dtype="float32", kv_dtype=kv_dtype, threads=1, kv_memory="8MiB", max_batch_tokens=64) as llm:
            found = llm.generate(PROMPTS, max_tokens=1, temperature=0, ignore_eos=True, logprobs=20)
        return {
            (number, each.token_id): each.logprob
            for number, completion in enumerate(found)
            for each in completion.logprobs[0].top
        }

    exact, rounded = first("float32"), first("int8")
    both = exact.keys() & rounded.keys()
    assert len(both) > 0.8 * len(exact)
    spread = max(exact.values()) - min(exact.values())
    assert 0 < max(abs(exact[key] - rounded[key]) for key in both) < 0.2 * spread
