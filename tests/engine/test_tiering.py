"""The share of KV that is attended in the engine's process, through `LLM` over a real worker process."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from real_workers import WorkerProcess, worker_process, write_tiny_model

from lamina import LLM
from lamina.cli.options import EngineOptions
from lamina.config import EngineConfig
from lamina.engine.tiering import TierController
from lamina.errors import InvalidRequest
from lamina.messages.snapshot import Snapshot
from lamina.scheduling.lane_tuner import LaneTuner
from lamina.scheduling.order_tuner import OrderTuner
from lamina_workers.ports.timing import Times

chance = random.Random(3)
PROMPTS = [[chance.randrange(101) for _ in range(n)] for n in (5, 60, 33, 90, 48, 71)]
TOKENS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


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
        names = [holder.name for holder in look(llm).holders]
        assert ("here" in names) == (share != 0)


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


def test_local_memory_goes_to_prompts_when_there_is_too_little_for_both(model, worker):
    least = 3 * 3 * 2 * 16 * 4 * 16  # a page for each layer and head
    with running(model, attention_workers=[worker.address], kv_memory=3 * least) as llm:
        assert "here" not in [holder.name for holder in look(llm).holders]


@pytest.mark.real
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 6))])
def test_text_stays_the_same_when_a_worker_is_killed_during_moves(model, expected, seed):
    """One of two workers is killed at a random moment, while the wanted share changes all the time."""
    rng = random.Random(seed)
    with worker_process() as one, worker_process() as two:
        options = {"attention_workers": [one.address, two.address], "worker_timeout": 3.0}
        with running(model, local_share=0.5, lanes=1 + seed % 2, **options) as llm:
            engine = llm._runtime.engine  # type: ignore[union-attr]
            over = threading.Event()

            def change() -> None:
                while not over.wait(rng.random() * 0.02):
                    engine._control.local_share.share = rng.choice((0.0, 0.5, 1.0))

            changing = threading.Thread(target=change)
            changing.start()
            try:
                found: list[list[int]] = [[] for _ in PROMPTS]
                last = rng.randrange(TOKENS * 4)
                for count, event in enumerate(llm.stream(PROMPTS, max_tokens=TOKENS, temperature=0, ignore_eos=True)):
                    found[event.prompt_index].append(event.token_id)
                    if count == last:
                        one.process.send_signal(signal.SIGKILL)
                        time.sleep(0.01)
            finally:
                over.set()
                changing.join()
            assert found == expected
            engine._scheduler.check_integrity()


class Deployment:
    """Decode batches of eight sequences under a tier controller. `seconds(fused, lanes)`: what one takes."""

    def __init__(self, seconds: Any, tiers: bool = False) -> None:
        self.share = SimpleNamespace(settled=True, share=0.5, completed=self._measured, interrupted=lambda: None)
        self.placement = SimpleNamespace(
            tiers=tiers, local_share=0.0, local_tokens=lambda kept: (len([*kept]), 100), is_local=lambda layout: False
        )
        self.lanes, self.order = LaneTuner(1, 2), OrderTuner(True)
        control = SimpleNamespace(
            lanes=self.lanes, order=self.order, local_share=self.share, placement=self.placement,
            scheduler=SimpleNamespace(running=[]),
        )  # fmt: skip
        self.migration = SimpleNamespace(under_way={}, abandon=lambda: None)
        self.tiering = TierController(control, self.migration, float)  # type: ignore[arg-type]
        self.seconds, self.now, self.shared = seconds, 0.0, 0
        self.tried: list[tuple[bool, bool]] = []

    def _measured(self, batch: Any, moving: bool) -> None:
        self.shared += 1
        assert not self.lanes.trying
        assert not self.order.trying

    def decode(self, batches: int, **changes: Any) -> None:
        for _ in range(batches):
            self.now += self.seconds(self.order.fused, self.lanes.count)
            done = {"prefill": False, "sampled": 8 // self.lanes.count, "running": 8, "now": self.now}
            done |= {"attended": 0.0, "local_tokens": 10, "remote_tokens": 90, "times": Times()}
            self.tiering.batch_done(SimpleNamespace(**(done | changes)))  # type: ignore[arg-type]
            self.tried.append((self.lanes.trying, self.order.trying))


def test_lanes_are_tried_first_then_the_order_and_never_both() -> None:
    deployment = Deployment(lambda fused, lanes: (0.030 if fused else 0.020) * (0.4 if lanes == 2 else 1))
    deployment.decode(300)
    assert (True, True) not in deployment.tried
    ended = max(at for at, (lanes, _) in enumerate(deployment.tried) if lanes)
    assert not any(order for _, order in deployment.tried[: ended + 1])
    assert (deployment.lanes.count, deployment.order.fused) == (2, False)


def test_the_order_waits_for_the_local_share_and_starts_anew_behind_prompts() -> None:
    deployment = Deployment(lambda fused, lanes: 0.020 if fused else 0.010, tiers=True)
    deployment.share.settled = False
    deployment.decode(200)
    assert deployment.tried == [(False, False)] * 200
    assert deployment.shared > 100  # it is measured
    deployment.share.settled = True
    while deployment.order.fused:
        deployment.decode(1)
    deployment.decode(3, prefill=True)
    assert deployment.order.fused  # nothing is tried beside a prompt
    deployment.decode(10)
    deployment.share.settled = False
    deployment.decode(1)
    assert (deployment.order.fused, deployment.order.trying) == (True, False)
    measured = deployment.shared
    deployment.decode(10)
    assert deployment.shared > measured
    deployment.share.settled = True
    deployment.decode(300)
    assert not deployment.order.fused


def test_nothing_is_tried_while_all_kv_is_local() -> None:
    deployment = Deployment(lambda fused, lanes: 0.010, tiers=True)
    deployment.placement.local_tokens = lambda kept: (100, 100)
    deployment.decode(200)
    assert deployment.tried == [(False, False)] * 200
    assert deployment.order.fused
