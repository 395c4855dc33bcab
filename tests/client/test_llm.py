"""`LLM` as an object of a Python program: what it shows, and how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_workers import write_tiny_model

import lamina
from lamina import LLM, InvalidRequest
from lamina.system.progress import StderrBars


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(write_tiny_model(tmp_path_factory.mktemp("tiny")), dtype="float32", kv_memory="16M", threads=1) as llm:
        yield llm


def test_it_shows_its_model_and_its_state(llm: LLM) -> None:
    assert repr(llm).startswith("<LLM '")
    assert repr(llm).endswith(f": running, context of {llm.max_model_len} tokens>")
    assert llm.tokenizer.encode("w7 ") == [7]


def test_without_max_tokens_an_answer_may_fill_the_context(llm: LLM) -> None:
    whole = llm.generate([3, 1, 4], max_tokens=None, ignore_eos=True)
    assert isinstance(whole, lamina.Completion)
    assert (whole.usage.completion_tokens, whole.finish_reason) == (llm.max_model_len - 3, "length")


def test_a_completion_is_short_to_look_at_and_whole_as_a_dict(llm: LLM) -> None:
    completion = llm.generate([3, 1, 4], max_tokens=40, ignore_eos=True, logprobs=1)
    assert len(repr(completion)) < 120
    assert isinstance(completion, lamina.Completion)
    found = json.loads(json.dumps(completion.to_dict()))
    assert found["samples"][0]["token_ids"] == list(completion.token_ids)
    assert len(found["samples"][0]["logprobs"]) == 40


def test_it_closes_at_the_end_of_async_with(tmp_path: Path) -> None:
    async def use() -> LLM:
        async with LLM(write_tiny_model(tmp_path / "tiny"), dtype="float32", kv_memory="16M", threads=1) as llm:
            await llm.agenerate([1], max_tokens=1)
        return llm

    closed = asyncio.run(use())
    assert not closed.alive
    assert repr(closed).endswith(": closed>")


def test_a_misspelt_keyword_names_the_nearest() -> None:
    with pytest.raises(InvalidRequest, match="unknown keyword 'kv_memmory' for LLM: did you mean kv_memory"):
        LLM("x", kv_memmory="1T")  # type: ignore[call-arg]


def test_bars_on_stderr_go_when_they_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    bars = StderrBars()
    for done in (1, 3, 4):
        bars("loading", done, 4)
    bars("compiling", 0, None)
    bars.close()
    assert "loading" in shown.getvalue()
    assert not shown.getvalue().rpartition("\r")[2].strip()
