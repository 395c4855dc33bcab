"""`LLM` as an object of a Python program: what it shows, and how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lamina
from lamina import LLM, EngineError, InvalidRequest
from lamina.system.progress import StderrBars


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, dtype="float32", kv_memory="16M", threads=1, max_model_len=256) as llm:
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


def test_it_closes_at_the_end_of_async_with_and_says_so(model: Path) -> None:
    async def use() -> LLM:
        async with LLM(model, dtype="float32", kv_memory="16M", threads=1) as llm:
            completion = await llm.agenerate("w1 w2 ", max_tokens=4)
            texts = [event.text async for event in llm.astream("w1 w2 ", max_tokens=4)]
            assert "".join(texts) == completion.text  # type: ignore[union-attr]
        return llm

    closed = asyncio.run(use())
    assert not closed.alive
    assert repr(closed).endswith(": closed>")
    closed.close()
    for call in (lambda: closed.generate("x"), lambda: closed.stream("x"), lambda: closed.model_path):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_bad_arguments_of_a_stream_are_refused_before_it_is_iterated(llm: LLM) -> None:
    for method in (llm.stream, llm.astream):
        with pytest.raises(InvalidRequest, match="top_p"):
            method("w1 ", top_p=7)


def test_the_module_keeps_its_model(model: Path) -> None:
    first = lamina.generate("w1 w2 ", model=model, max_tokens=4)
    kept = lamina.api._kept
    second = lamina.generate(["w1 w2 "], lamina.SamplingParams(max_tokens=4), model=model)
    one, (same, other) = lamina.embed("w1 ", model=model), lamina.embed(["w1 ", "w5 w7 "], model=model)  # type: ignore[misc]
    assert lamina.api._kept is kept
    assert [first.text] == [completion.text for completion in second]  # type: ignore[union-attr]
    alike, unlike = (sum(a * b for a, b in zip(one.embedding, e.embedding, strict=True)) for e in (same, other))  # type: ignore[union-attr]
    assert alike > 0.999 > unlike
    lamina.close()
    assert lamina.api._kept is None


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
