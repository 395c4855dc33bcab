"""The share of KV that is attended in the engine's process, through `LLM` over a real worker process."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from real_workers import WorkerProcess, worker_process

from lamina import LLM
from lamina.cli.options import EngineOptions
from lamina.config import EngineConfig
from lamina.engine.holders import HolderChange
from lamina.engine.tiering import TierController
from lamina.errors import InvalidRequest
from lamina.messages.snapshot import Snapshot
from lamina.scheduling.step_tuner import StepTuner
from lamina_workers.ports.timing import Times

chance = random.Random(3)
PROMPTS = [[chance.randrange(101) for _ in range(n)] for n in (5, 60, 33, 90, 48, 71)]
TOKENS = 60


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    with worker_process() as one:
        yield one


def running(model: Path, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "threads": 1, "page_size": 16, "kv_memory": "16MiB", "prefix_cache": False}
    return LLM(model, **{**defaults, "max_batch_tokens": 128, "lanes": 1, **options})


def tokens(llm: LLM) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in PROMPTS]
    for event in llm.stream(PROMPTS, max_tokens=TOKENS, temperature=0, ignore_eos=True):
        found[event.prompt_index].append(event.token_id)
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with running(model) as llm:
        return tokens(llm)


def look(llm: LLM) -> Snapshot:
    seen: list[Snapshot] = []
    there = threading.Event()
    llm._runtime.engine.snapshot(lambda taken: (seen.append(taken), there.set())[1])  # type: ignore[union-attr]
    assert there.wait(30)
    return seen[0]


@pytest.mark.parametrize("share", [0, 0.5, 1, "auto"])
def test_text_stays_the_same_at_any_local_share(model, worker, expected, share):
    with running(model, attention_workers=[worker.address], local_share=share) as llm:
        assert tokens(llm) == expected
        assert {holder.name: holder.keeps for holder in look(llm).holders}["local"] == (share != 0)


def test_fixed_local_share_is_kept(model, worker):
    with running(model, attention_workers=[worker.address], local_share=0.5) as llm:
        shares = []
        for count, _ in enumerate(llm.stream(PROMPTS, max_tokens=TOKENS, temperature=0, ignore_eos=True)):
            if count > 30 and count % 10 == 0 and count < TOKENS * 5:
                shares.append(look(llm).local_share)
        assert all(0.3 < share < 0.7 for share in shares)


@pytest.mark.parametrize(("share", "queries"), [(1, False), (0, True)])
def test_worker_is_asked_only_when_the_local_share_is_below_one(model, worker, share, queries):
    with running(model, attention_workers=[worker.address], local_share=share) as llm:
        tokens(llm)
        exchanges = {holder.name: sum(holder.exchange_counts) for holder in look(llm).holders if not holder.local}
        assert all((count > 0) == queries for count in exchanges.values())


@pytest.mark.parametrize("share", [-0.1, 1.1, "half", True, None, float("nan")])
def test_config_refuses_a_local_share_out_of_range_and_names_it(share):
    with pytest.raises(InvalidRequest, match=r'local_share is .*; allowed are 0 to 1, or "auto"'):
        EngineConfig(local_share=share)


def test_command_line_passes_the_local_share_on():
    assert EngineOptions(local_share="0.25").config()["local_share"] == 0.25
    assert EngineOptions(local_share="auto").config()["local_share"] == "auto"
    assert "local_share" not in EngineOptions().config()


class Deployment:
    """Decode batches of eight sequences under a tier controller. `seconds(fused, lanes)`: what one takes."""

    def __init__(self, seconds: Any) -> None:
        self.tuner = StepTuner((1, 2), 0.0, (True, False))
        placement = SimpleNamespace(tiers=False, local_share=0.0)
        control = SimpleNamespace(tuner=self.tuner, placement=placement, scheduler=SimpleNamespace(running=[]))
        migration = SimpleNamespace(under_way={}, abandon=lambda at: None)
        self.tiering = TierController(control, migration, float)  # type: ignore[arg-type]
        self.seconds, self.now = seconds, 0.0
        self.tried: list[tuple[int, bool]] = []

    def decode(self, batches: int, **changes: Any) -> None:
        for _ in range(batches):
            lanes, fused = self.tuner.lanes, self.tuner.fused
            self.tried.append((lanes, fused))
            self.now += self.seconds(fused, lanes)
            done = {"prefill": False, "sampled": 8 // lanes, "running": 8, "now": self.now, "local_tokens": 0}
            done |= {"remote_tokens": 800 // lanes, "times": Times(remote=0.002, answered=0.003)}
            self.tiering.batch_done(SimpleNamespace(**(done | changes)))  # type: ignore[arg-type]


def test_lanes_and_order_are_chosen_by_the_batches_of_the_engine() -> None:
    deployment = Deployment(lambda fused, lanes: (0.030 if fused else 0.020) * (0.4 if lanes == 2 else 1))
    deployment.decode(150)
    assert {*deployment.tried} == {(1, True), (2, True), (2, False)}
    assert deployment.tried[-1] == (2, False)


def test_batches_with_prompts_and_those_after_them_teach_nothing() -> None:
    deployment = Deployment(lambda fused, lanes: 0.010)
    for _ in range(40):
        deployment.decode(5)
        deployment.decode(1, prefill=True)
    assert {*deployment.tried} == {(1, True)}
    deployment.decode(20)
    assert len({*deployment.tried}) > 1


def test_where_kv_is_read_is_said_once_for_each_place(caplog: pytest.LogCaptureFixture) -> None:
    deployment = Deployment(lambda fused, lanes: 0.010)
    tuner = deployment.tuner = deployment.tiering._control.tuner = StepTuner()
    for seconds, share in ((0, 1.0), (1, 1.0), (2, 0.0), (100, 0.0), (200, 0.0)):
        tuner.share, tuner.reason, tuner._settled = share, f"decode: {share}", SimpleNamespace()  # type: ignore[assignment]
        with caplog.at_level("INFO", logger="lamina.choices"):
            deployment.tiering._say(seconds)
    assert [record.getMessage() for record in caplog.records] == ["decode: 1.0", "decode: 0.0"]


def test_other_holders_are_measured_anew() -> None:
    deployment = Deployment(lambda fused, lanes: 0.020 if lanes == 1 else 0.030)
    deployment.decode(150)
    assert deployment.tuner.settled
    deployment.tiering.holders_changed(HolderChange("lost", ("a",)))
    assert not deployment.tuner.settled
