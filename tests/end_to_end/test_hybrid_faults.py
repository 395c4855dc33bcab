"""Models with states when something goes wrong, moves or is shared: the text stays that of one process."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import threading
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
from real_workers import WorkerProcess, until, worker_process
from whole_engines import engine, first_logprobs, shifts, streamed

from lamina import LLM
from lamina.errors import EngineError, InvalidRequest
from lamina.launch import kv_sizing
from lamina_workers.errors import ModelFileError, RanksError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return written_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, Texts]:
    return texts_alone(models)


@every_family
def test_a_batch_that_fails_in_any_layer_runs_again(
    family: str, models: dict[str, Path], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck = fail_in_layers(monkeypatch)
    with engine(models[family]) as llm:
        assert texts(llm) == expected[family]
    assert len(struck) > 3


@one_family
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_batch_of_which_one_worker_has_done_more_runs_again(
    family: str, lanes: int, models: dict[str, Path], workers: list[WorkerProcess], expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    struck = lose_answers(monkeypatch, 0.01)
    with engine(models[family], workers, lanes=lanes) as llm:
        assert texts(llm) == expected[family]
    assert len(struck) > 2


@every_family
def test_prompts_are_shared_and_sampled_from_where_states_are_kept(
    family: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_sizing, "SNAPSHOT_TOKENS", 32)
    prompts = [PROMPTS[3][:100] + [at] * at for at in range(3, 7)]
    sampled: dict[str, Any] = {"n": 3, "temperature": 0.9, "seed": 7, "max_tokens": 20, "ignore_eos": True}

    def samples(llm: LLM) -> list[tuple[int, ...]]:
        return [sample.token_ids for sample in llm.generate(prompts[0], **sampled).samples]

    with engine(models[family], prefix_cache=False) as llm:
        right, siblings = texts(llm, prompts), samples(llm)
    with engine(models[family]) as llm:
        assert texts(llm, prompts[:1]) == right[:1]
        assert texts(llm, prompts[1:]) == right[1:]
        assert counters(llm).found_tokens == 3 * 96  # three snapshots of 32 tokens each
        assert samples(llm) == siblings
        assert texts(llm, prompts) == right


@one_family
def test_what_is_preempted_begins_anew(family: str, models: dict[str, Path], expected: Any) -> None:
    """A usual sequence is said to be short, so states get most of the memory, and KV lacks room."""
    with engine(models[family], kv_memory=1_200_000, sequence_tokens=64, prefix_cache=False) as llm:
        assert texts(llm) == expected[family]
        assert counters(llm).preempted > 0


@pytest.mark.real
@one_family
def test_ranks_dtypes_and_policies_over_workers(
    family: str, models: dict[str, Path], workers: list[WorkerProcess], expected: Any
) -> None:
    """What changes the text of the attention layers changes it in one way, wherever they are."""
    with engine(models[family], workers, model_workers=2) as llm:
        assert texts(llm) == expected[family]
    for options in ({"kv_dtype": "int8"}, {"policy": "streaming(sink=2, recent=24)"}):
        with engine(models[family], **options) as llm:
            alone = texts(llm)
        assert alone != expected[family]
        with engine(models[family], workers, **options) as llm:
            assert texts(llm) == alone


@pytest.mark.real
@one_family
def test_a_drained_workers_states_move(family: str, models: dict[str, Path], expected: Any) -> None:
    with engine(models[family], attention_workers=2, prefix_cache=False) as llm:
        moved: list[int] = []
        drain = threading.Thread(target=lambda: moved.append(llm._runtime.drain("attention-0")))  # type: ignore[union-attr]
        assert streamed(llm, PROMPTS, TOKENS, lambda count: count == 20 and drain.start()) == expected[family]
        drain.join()
        assert moved[0] > 0
        assert counters(llm).preempted == 0
        assert counters(llm).admitted == len(PROMPTS)
        assert texts(llm) == expected[family]


@every_family
def test_sequences_move_between_the_tiers(
    family: str, models: dict[str, Path], workers: list[WorkerProcess], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_restless(monkeypatch)
    with engine(models[family], workers, local_share=0.5, lanes=2, prefix_cache=False) as llm:
        assert texts(llm) == expected[family]
        assert llm._runtime.engine._tiering._migration.sequences > 3  # type: ignore[union-attr]
        assert counters(llm).preempted == 0
        for worker in workers:
            until(lambda worker=worker: worker.status().parts == 0)  # type: ignore[misc]


@pytest.mark.real
@one_family
@pytest.mark.parametrize("at", [1, 60])
def test_a_worker_killed_changes_no_text(family: str, at: int, models: dict[str, Path], expected: Any) -> None:
    """While prompts are read, and in decode. It joins again."""
    with engine(models[family], attention_workers=2, max_batch_tokens=16, lanes=2) as llm:
        assert streamed(llm, PROMPTS, TOKENS, kill_at(llm, at)) == expected[family]
        names = llm._runtime.engine._holders.names  # type: ignore[union-attr]
        until(lambda: sorted(names.values()) == ["attention-0.1", "attention-1"], 30.0)
        assert texts(llm) == expected[family]


@pytest.mark.real
@one_family
def test_the_next_engine_goes_on_with_states_that_workers_have_kept(
    family: str, models: dict[str, Path], tmp_path: Path
) -> None:
    code = """
import os, sys
from lamina import LLM
options = dict(page_size=16, kv_memory="16MiB", lanes=1, local_share=0, dtype="float32", threads=1)
llm = LLM(sys.argv[1], attention_workers=[sys.argv[2]], journal=sys.argv[3], **options)
prompts = [[5, 6, 7], list(range(3, 93))]
for seen, event in enumerate(llm.stream(prompts, max_tokens=150, ignore_eos=True, temperature=0.0)):
    if seen == 60:
        os.kill(os.getpid(), 9)
"""
    with worker_process() as worker:
        program = [sys.executable, "-c", code, str(models[family]), worker.address, str(tmp_path)]
        assert subprocess.run(program, timeout=100, check=False).returncode == -9
        with engine(models[family], journal=tmp_path, attention_workers=[worker.address]) as llm:
            found = llm.resume()
            assert llm._runtime.engine._stats.batch_tokens < 300  # type: ignore[union-attr]  # no prompt is read again
            prompts = [[5, 6, 7], list(range(3, 93))]
            right = llm.generate(prompts, max_tokens=150, ignore_eos=True, temperature=0.0)
            assert sorted(each.token_ids for each in found) == sorted(each.token_ids for each in right)


@pytest.mark.real
@every_family
def test_bfloat16_changes_logits_by_little(family: str, models: dict[str, Path], workers: list[WorkerProcess]) -> None:
    with engine(models[family]) as llm:
        exact = first_logprobs(llm, PROMPTS)
    for count in (0, 1, 2):
        with engine(models[family], workers[:count], dtype="bfloat16") as llm:
            rounded = first_logprobs(llm, PROMPTS)
        # in the mean: one prompt may get other experts, in transformers' bfloat16 too
        assert 0 < statistics.fmean(shifts(exact, rounded)) < 0.1


# What cannot be is refused at the start, with the values.


def changed(folder: Path, target: Path, **values: Any) -> Path:
    """The same files with another config.json."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


@pytest.mark.parametrize(
    ("family", "values", "says"),
    [
        (
            "gated delta",
            {"layer_types": ["linear_attention", "flash"] * 2},
            r"must be in \('full_attention', .*'flash'",
        ),
        ("gated delta", {"linear_num_value_heads": 5}, "has 5 heads; allowed: multiples of 2"),
        ("mamba2 beside attention", {"mamba_n_groups": 4}, "mamba_n_groups 4 must divide mamba_n_heads 6"),
    ],
)
def test_a_model_that_cannot_be_is_refused(
    family: str, values: dict[str, Any], says: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=says):
        engine(changed(models[family], tmp_path / "model", **values))


def test_more_ranks_than_heads_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(RanksError, match="among 5 ranks: it has 4 query heads"):
        engine(models["gated delta"], model_workers=5)


def test_states_too_large_for_a_workers_memory_are_refused(models: dict[str, Path]) -> None:
    folder = models["mamba2 beside attention"]
    with pytest.raises(InvalidRequest, match=r"kv_memory is 40000 bytes; allowed are \d+ .*two records of each state"):
        engine(folder, kv_memory=40_000)
    too_few = r"of 40000 bytes of KV memory, for mamba2 .* is \d+ bytes; the least is \d"
    with worker_process("--kv-memory", "40000") as worker, pytest.raises(EngineError, match=too_few):
        engine(folder, [worker])
    no_token = r"has \d+ bytes for mamba2 layers, and one token takes 108288 there"
    with worker_process("--kv-memory", "200000") as worker, pytest.raises(InvalidRequest, match=no_token):
        engine(folder, [worker])
