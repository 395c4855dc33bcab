"""Engines with n-grams and with draft models say what engines without say, and count what was accepted."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from real_workers import write_tiny_model

from lamina import LLM, Completion, SamplingParams
from lamina.kv.request import ScheduledSequence
from lamina.messages.snapshot import Snapshot
from lamina.scheduling.speculation import Speculation, left_to_draft

PROMPTS = [[5, 6, 7] * 9, [*[40, 41, 42, 43] * 5, 40, 41], [9]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.8, top_k=30, seed=3, n=2, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=4, repetition_penalty=1.2, max_tokens=25, ignore_eos=True, logprobs=2),
]


def _deepest(self: Speculation, sequences: Sequence[ScheduledSequence]) -> list[int]:
    return [min(self.most, left_to_draft(sequence)) for sequence in sequences]


@pytest.fixture(scope="module")
def plain(model: Path) -> list[list[tuple[int, ...]]]:
    with _engine(model) as llm:
        return [_ids(llm, params) for params in PARAMS]


def _engine(model: Path, **settings: Any) -> LLM:
    return LLM(model, dtype="float32", kv_memory="4MiB", max_model_len=256, threads=1, **settings)


def _completions(llm: LLM, params: SamplingParams) -> list[Completion]:
    found = llm.generate(PROMPTS, params)
    assert isinstance(found, list)
    return found


def _ids(llm: LLM, params: SamplingParams) -> list[tuple[int, ...]]:
    return [sample.token_ids for completion in _completions(llm, params) for sample in completion.samples]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are made whether they pay or not."""
    monkeypatch.setattr(Speculation, "depths", _deepest)


@pytest.mark.usefixtures("always")
def test_ngrams_change_no_text(model: Path, plain: list[list[tuple[int, ...]]]) -> None:
    with _engine(model, speculate="ngram") as llm:
        assert [_ids(llm, params) for params in PARAMS] == plain


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.real)])
def test_a_draft_model_of_the_same_weights_is_always_right(
    model: Path, plain: list[list[tuple[int, ...]]], workers: int
) -> None:
    with _engine(model, speculate=model, num_speculative_tokens=3, attention_workers=workers) as llm:
        for params, expected in zip(PARAMS[:2], plain, strict=False):
            completions = _completions(llm, params)
            assert [sample.token_ids for each in completions for sample in each.samples] == expected
            for each in completions:
                assert each.stats["accepted_tokens"] == each.stats["draft_tokens"] > 0
                assert each.stats["acceptance"] == 1
        assert _ids(llm, PARAMS[2]) == plain[2]


@pytest.mark.usefixtures("always")
def test_a_draft_model_of_other_weights_changes_no_text(
    model: Path, plain: list[list[tuple[int, ...]]], tmp_path: Path
) -> None:
    small = write_tiny_model(tmp_path / "small", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    with _engine(model, speculate=small, num_speculative_tokens=5) as llm:
        assert [_ids(llm, params) for params in PARAMS] == plain
        taken: queue.SimpleQueue[Snapshot] = queue.SimpleQueue()
        llm._runtime.engine.snapshot(taken.put)
        seen = taken.get(timeout=30)
    assert seen.drafts > 0
    assert seen.accepted_tokens == sum(seen.accepted_at) < seen.draft_tokens
    assert len(seen.accepted_at) == 5


def test_a_deterministic_engine_says_the_same_whatever_ran_before(model: Path) -> None:
    """In bfloat16, where a batch of other rows gives other numbers: drafts are as many each time."""
    with LLM(model, dtype="bfloat16", kv_memory="4MiB", threads=1, speculate="ngram", deterministic=True) as llm:
        first = [llm.generate(prompt, PARAMS[0]) for prompt in PROMPTS]
        _completions(llm, PARAMS[1])
        again = [llm.generate(prompt, PARAMS[0]) for prompt in reversed(PROMPTS)][::-1]
    assert [text.token_ids for text in first] == [text.token_ids for text in again]
    assert [text.stats["draft_tokens"] for text in first] == [text.stats["draft_tokens"] for text in again]
    assert sum(text.stats["accepted_tokens"] for text in first) > 0


def test_without_speculation_there_are_no_stats_of_it(model: Path) -> None:
    with _engine(model) as llm:
        found = _completions(llm, PARAMS[0])
    assert all("draft_tokens" not in completion.stats for completion in found)
