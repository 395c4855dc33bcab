"""Drafts of a model's own head for a token more (MTP): what its layers say, and the text stays as it is."""

from __future__ import annotations

import copy
import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf_layouts import architecture
from gguf_writing import write_gguf
from mtp_heads import MODELS, Head
from real_workers import write_tiny_model
from safetensors.torch import load_file
from scripted_drafts import Always
from whole_engines import engine, streamed, texts

from lamina import LLM
from lamina.engine import mtp
from lamina.engine.drafting import Wanted
from lamina.engine.mtp import MtpProposer
from lamina.errors import InvalidRequest
from lamina.scheduling.speculation import Speculation, SpeculationCounts
from lamina_workers.errors import HolderFault

draw = random.Random(9)
PROMPTS = [[draw.randrange(3, 97) for _ in range(length)] for length in (2, 90, 41)]
TOKENS = 24
QWEN = {"fc": "eh_proj", "norm": "shared_head.norm", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm"}
Proposed = list[tuple[tuple[int, ...], tuple[int, ...]]]


@pytest.fixture
def proposed(monkeypatch: pytest.MonkeyPatch) -> Proposed:
    """The texts and their drafts, as many as there can be."""
    pairs: Proposed = []
    propose = MtpProposer.propose

    def notes(proposer: MtpProposer, wanted: Sequence[Wanted]) -> list[tuple[int, ...]]:
        drafts = propose(proposer, wanted)
        pairs.extend((tuple(want.sequence.tokens), own) for want, own in zip(wanted, drafts, strict=True))
        return drafts

    monkeypatch.setattr(Speculation, "depths", Always.depths)
    monkeypatch.setattr(MtpProposer, "propose", notes)
    return pairs


def counts(llm: LLM) -> SpeculationCounts:
    found = llm._runtime.engine._drafting.counts  # type: ignore[union-attr]
    assert found is not None
    return found


@pytest.mark.parametrize("family", MODELS)
def test_drafts_are_what_the_layers_of_transformers_say(family: str, tmp_path: Path, proposed: Proposed) -> None:
    head = Head(family, tmp_path)
    with engine(tmp_path) as llm:
        expected = texts(llm, PROMPTS, TOKENS)
    with engine(tmp_path, speculate="mtp", num_speculative_tokens=3, prefix_cache=False) as llm:
        assert texts(llm, PROMPTS, TOKENS) == expected
        assert counts(llm).draft_tokens > 3 * TOKENS
    assert all(drafts == head.drafts(text, len(drafts)) for text, drafts in proposed[::5])
    assert sum(bool(drafts) for _, drafts in proposed) > TOKENS


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid whose head knows, with its texts."""
    folder = tmp_path_factory.mktemp("good")
    Head("qwen3_next", folder, good=True)
    return folder


@pytest.fixture(scope="module")
def expected(good: Path) -> Iterator[list[tuple[int, ...]]]:
    with engine(good) as llm:
        yield texts(llm, PROMPTS, TOKENS)


@pytest.mark.usefixtures("proposed")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"deterministic": True},
        {"lanes": 2, "max_batch_tokens": 16},
        {"kv_memory": 600_000, "sequence_tokens": 40, "prefix_cache": False},
    ],
    ids=["", "deterministic", "chunks and lanes", "preempted"],
)
def test_right_drafts_are_accepted_and_change_no_text(
    options: dict[str, Any], good: Path, expected: list[tuple[int, ...]]
) -> None:
    with engine(good, speculate="mtp", num_speculative_tokens=3, **options) as llm:
        assert texts(llm, PROMPTS, TOKENS) == expected
        assert counts(llm).accepted_tokens > 0.7 * counts(llm).draft_tokens > TOKENS
        preempted = llm._runtime.engine._scheduler.counters.preempted  # type: ignore[union-attr]
        assert (preempted > 0) == ("kv_memory" in options)


def test_measured_drafts_count_where_they_pay(good: Path, expected: list[tuple[int, ...]]) -> None:
    with engine(good, speculate="mtp") as llm:
        assert texts(llm, PROMPTS, TOKENS) == expected
        sampled = llm.generate(PROMPTS[1], n=2, temperature=0.9, seed=3, max_tokens=TOKENS)
    with engine(good) as llm:
        again = llm.generate(PROMPTS[1], n=2, temperature=0.9, seed=3, max_tokens=TOKENS)
    assert [one.token_ids for one in sampled.samples] == [one.token_ids for one in again.samples]


def test_what_was_not_heard_costs_drafts_alone(
    tmp_path: Path, proposed: Proposed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached prefixes, prompts longer than what is kept, and failures: the head then reads from a later token on."""
    head = Head("qwen3_5", tmp_path)
    with engine(tmp_path) as llm:
        expected = texts(llm, PROMPTS, TOKENS)
    monkeypatch.setattr(mtp, "CHUNK", 32)
    with engine(tmp_path, speculate="mtp", num_speculative_tokens=2) as llm:
        for _ in range(2):
            assert texts(llm, PROMPTS, TOKENS) == expected
    long = [(text, drafts) for text, drafts in proposed if list(text[:90]) == PROMPTS[1] and drafts]
    assert any(drafts != head.drafts(text, 2) for text, drafts in long)
    assert long[0][1] == head.drafts(long[0][0], 2, first=91 - 1 - 32)


@pytest.mark.real
@pytest.mark.usefixtures("proposed")
@pytest.mark.parametrize("at", [1, 40])
def test_a_worker_killed_beside_drafts_changes_no_text(at: int, good: Path, expected: list[tuple[int, ...]]) -> None:
    with engine(good, attention_workers=2, lanes=2, speculate="mtp", num_speculative_tokens=2) as llm:
        members = llm._runtime.pools.attention.workers  # type: ignore[union-attr]

        def strike(count: int) -> None:
            if count == at:
                os.kill(members.status()[0].process or 0, signal.SIGKILL)

        assert streamed(llm, PROMPTS, TOKENS, strike) == expected
        assert counts(llm).accepted_tokens > TOKENS


def test_a_head_that_fails_is_read_anew(
    good: Path, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, proposed: Proposed
) -> None:
    given, calls = MtpProposer._given, []

    def fails(proposer: MtpProposer, pieces: Sequence[Any]) -> Any:
        calls.append(pieces)
        if len(calls) in (5, 12):
            raise HolderFault("made to fail")
        return given(proposer, pieces)

    monkeypatch.setattr(MtpProposer, "_given", fails)
    with engine(good, speculate="mtp", num_speculative_tokens=2) as llm:
        assert texts(llm, PROMPTS, TOKENS) == expected
        assert counts(llm).accepted_tokens > TOKENS
    assert len(calls) > 12
    assert all(len(text) > len(PROMPTS[0]) for text, _ in proposed)


@pytest.mark.parametrize("family", ["qwen3_5", "deepseek_v3"])
def test_a_head_of_a_gguf_file(family: str, tmp_path: Path, proposed: Proposed) -> None:
    head = Head(family, tmp_path / "hf")
    layers = head.model.config.num_hidden_layers
    behind = f"model.layers.{layers}."
    own = {name.replace("mtp.layers.0.", behind): weight for name, weight in head.tensors.items()}
    for theirs, name in QWEN.items():
        own = {key.replace(f"mtp.{theirs}.", f"{behind}{name}."): weight for key, weight in own.items()}
    config = copy.deepcopy(head.model.config)
    config.__dict__["num_hidden_layers"] = layers + 1
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if name not in head.tensors}
    kind = architecture(config)
    path = write_gguf(tmp_path / "x.gguf", config, weights | own, **{f"{kind}.nextn_predict_layers": 1})
    with engine(tmp_path / "hf") as llm:
        expected = texts(llm, PROMPTS, TOKENS)
    with engine(path, speculate="mtp", num_speculative_tokens=2, prefix_cache=False) as llm:
        assert texts(llm, PROMPTS, TOKENS) == expected
    assert all(drafts == head.drafts(text, len(drafts)) for text, drafts in proposed[::5])
    assert sum(bool(drafts) for _, drafts in proposed) > TOKENS


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        ("plain", {}, "have no head for a token more"),
        ("good", {"model_workers": 2}, "model_workers is 2, and the head runs beside one alone"),
    ],
)
def test_it_is_refused_by_name_where_it_cannot_be(
    model: str, options: dict[str, Any], why: str, good: Path, tmp_path: Path
) -> None:
    folder = good if model == "good" else write_tiny_model(tmp_path / "plain")
    with pytest.raises(InvalidRequest, match=f"speculate is 'mtp', but .*{why}.*; allowed here are"):
        engine(folder, speculate="mtp", **options)
