"""Drafts on models with states: the text stays that without drafts, wherever the states are and whatever goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hybrid_engines import (
    PROMPTS,
    TOKENS,
    Texts,
    be_restless,
    counters,
    every_family,
    fail_in_layers,
    kill_at,
    lose_answers,
    one_family,
    texts,
    texts_alone,
    written_models,
)
from hybrid_families import VOCABULARY
from real_workers import WorkerProcess, until
from scripted_drafts import Always, Scripted, texts_of
from whole_engines import engine, streamed

from lamina import LLM
from lamina.engine.drafting import NgramProposer
from lamina.launch import kv_sizing
from lamina.scheduling.speculation import Speculation


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return written_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, Texts]:
    return texts_alone(models)


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch, family: str, expected: dict[str, Texts]) -> None:
    """Some right and some wrong ones, as many as there can be, for the texts that are expected."""
    drafts_of(monkeypatch, PROMPTS, [[text] for text in expected[family]])


def drafts_of(patch: pytest.MonkeyPatch, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Any]]) -> None:
    scripted = Scripted(texts_of(prompts, answers), "some", VOCABULARY)
    patch.setattr(Speculation, "depths", Always.depths)
    patch.setattr(NgramProposer, "propose", lambda self, wanted: scripted.propose(wanted))


def accepted_some(llm: LLM) -> bool:
    counts = llm._runtime.engine._drafting.counts  # type: ignore[union-attr]
    return counts is not None and 20 < counts.accepted_tokens < counts.draft_tokens


@every_family
@pytest.mark.usefixtures("drafts")
@pytest.mark.parametrize("count", [0, 1, 2])
def test_drafts_change_no_text(
    family: str, count: int, models: dict[str, Path], workers: list[WorkerProcess], expected: dict[str, Texts]
) -> None:
    with engine(models[family], workers[:count], speculate="ngram") as llm:
        assert texts(llm) == expected[family]
        assert accepted_some(llm)


@one_family
@pytest.mark.usefixtures("drafts")
@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_tokens": 16, "lanes": 2},
        {"num_speculative_tokens": 1},
        {"kv_memory": 1_350_000, "sequence_tokens": 40, "prefix_cache": False},
    ],
    ids=["chunks and lanes", "one draft", "preempted"],
)
def test_drafts_with_other_settings(
    family: str, options: dict[str, Any], models: dict[str, Path], expected: dict[str, Texts]
) -> None:
    with engine(models[family], speculate="ngram", **options) as llm:
        assert texts(llm) == expected[family]
        assert accepted_some(llm)
        assert (counters(llm).preempted > 0) == ("kv_memory" in options)


@every_family
@pytest.mark.usefixtures("drafts")
def test_a_verification_that_fails_in_any_layer_runs_again(
    family: str, models: dict[str, Path], expected: dict[str, Texts], monkeypatch: pytest.MonkeyPatch
) -> None:
    struck = fail_in_layers(monkeypatch)
    with engine(models[family], speculate="ngram") as llm:
        assert texts(llm) == expected[family]
        assert accepted_some(llm)
    assert len(struck) > 3


@one_family
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.usefixtures("drafts")
def test_a_verification_of_which_one_worker_has_done_more_runs_again(
    family: str, lanes: int, models: dict[str, Path], workers: list[WorkerProcess], expected: dict[str, Texts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    struck = lose_answers(monkeypatch, 0.02)
    with engine(models[family], workers, lanes=lanes, speculate="ngram") as llm:
        assert texts(llm) == expected[family]
        assert accepted_some(llm)
    assert len(struck) > 2


@every_family
def test_drafted_text_is_shared_and_sampled_from_where_states_are_kept(
    family: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second turn begins with what the first one has said."""
    monkeypatch.setattr(kv_sizing, "SNAPSHOT_TOKENS", 32)
    prompt = PROMPTS[3][:100]
    sampled: dict[str, Any] = {"n": 3, "temperature": 0.9, "seed": 7, "max_tokens": 60, "ignore_eos": True}

    def samples(llm: LLM) -> list[tuple[int, ...]]:
        return [sample.token_ids for sample in llm.generate(prompt, **sampled).samples]

    with engine(models[family], prefix_cache=False) as llm:
        (first,), siblings = texts(llm, [prompt]), samples(llm)
        turn = [*prompt, *first, 5, 6, 7]
        (second,) = texts(llm, [turn])
    drafts_of(monkeypatch, [prompt, turn], [siblings, [second]])
    with engine(models[family], speculate="ngram") as llm:
        assert samples(llm) == siblings
        assert accepted_some(llm)
    drafts_of(monkeypatch, [prompt, turn], [[first], [second]])
    with engine(models[family], speculate="ngram") as llm:
        assert texts(llm, [prompt]) == [first]
        assert texts(llm, [turn]) == [second]
        assert counters(llm).found_tokens == 128  # drafts do not step over a place where states are kept
        assert accepted_some(llm)


@every_family
@pytest.mark.usefixtures("drafts")
def test_sequences_with_drafts_move_between_the_tiers(
    family: str, models: dict[str, Path], workers: list[WorkerProcess], expected: dict[str, Texts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    be_restless(monkeypatch)
    options: dict[str, Any] = {"local_share": 0.5, "lanes": 2, "prefix_cache": False, "speculate": "ngram"}
    with engine(models[family], workers, **options) as llm:
        assert texts(llm) == expected[family]
        assert accepted_some(llm)
        assert llm._runtime.engine._tiering._migration.sequences > 3  # type: ignore[union-attr]
        assert counters(llm).preempted == 0
        for worker in workers:
            until(lambda worker=worker: worker.status().parts == 0)  # type: ignore[misc]


@pytest.mark.real
@one_family
@pytest.mark.usefixtures("drafts")
@pytest.mark.parametrize("at", [1, 60])
def test_a_worker_killed_beside_drafts_changes_no_text(
    family: str, at: int, models: dict[str, Path], expected: dict[str, Texts]
) -> None:
    with engine(models[family], attention_workers=2, max_batch_tokens=16, lanes=2, speculate="ngram") as llm:
        assert streamed(llm, PROMPTS, TOKENS, kill_at(llm, at)) == expected[family]
        assert accepted_some(llm)
