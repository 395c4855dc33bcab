"""An engine whose workers follow its load: the real decisions, joins and drains, with workers in this process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

import pytest
from engine_rig import Rig, holder_config, tiny_decoder

from lamina.deploy.worker_events import AttentionWorkers
from lamina.engine.engine import Engine
from lamina.engine.observers import EngineStats
from lamina.kv.placement import Holder
from lamina.launch import attention_pool
from lamina.launch.attention_pool import Autoscaling
from lamina.messages.snapshot import Snapshot
from lamina.scheduling.autoscaling import Autoscaler, Decision, KvLoad, kv_load
from lamina.scheduling.control_plane import ControlPlane
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.ports.port import LocalAttention

PAGES = 180  # 20 pages of 16 tokens of a sequence: three layers, three heads
PROMPTS = [[(7 * at + 3 * number) % 101 for at in range(100)] for number in range(8)]


@pytest.fixture(scope="module")
def decoder() -> Any:
    return tiny_decoder()


class Pool:
    """Workers that join at once, and end when they are retired."""

    def __init__(self, rig: Rig, decoder: Any) -> None:
        self.rig = rig
        self.config = holder_config(decoder, PAGES)
        self.ends = queue.SimpleQueue[str]()
        self.names = ["worker-1"]

    def grow(self, count: int) -> None:
        for _ in range(count - len(self.names)):
            name = f"worker-{len(self.names) + 1}"
            self.names.append(name)
            self.rig.engine.join(LocalAttention(AttentionWorker(self.config), name), Holder((PAGES,)))

    def retire(self, name: str) -> None:
        self.names.remove(name)
        self.ends.put(name)


def looked(engine: Engine, look: Callable[[ControlPlane, EngineStats], Any]) -> Any:
    """What a look between two batches gives."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engine.look(lambda control, stats: answers.put(look(control, stats)))
    return answers.get(timeout=60)


def test_workers_join_while_requests_wait_and_leave_when_idle(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_pool, "PERIOD", 0.01)
    plain = Rig(decoder, shard="heads")
    expected = plain.generate(PROMPTS, max_tokens=24)
    plain.close()
    rig = Rig(decoder, shard="heads", pages=PAGES)
    pool = Pool(rig, decoder)
    scaling = Autoscaling(rig.engine, cast("AttentionWorkers", pool), Autoscaler(1, 3, patience=0.1))
    scaling.begin()
    assert rig.generate(PROMPTS, max_tokens=24) == expected
    assert {pool.ends.get(timeout=60), pool.ends.get(timeout=60)} < {"worker-1", "worker-2", "worker-3"}
    assert len(pool.names) == 1
    snapshots: queue.SimpleQueue[Snapshot] = queue.SimpleQueue()
    rig.engine.snapshot(snapshots.put)
    snapshot = snapshots.get(timeout=60)
    assert (snapshot.workers_wanted, snapshot.joined_holders, snapshot.failed_batches) == (1, 2, 0)
    assert Snapshot.from_dict(snapshot.as_dict()) == snapshot
    scaling.close()
    rig.close()


def test_a_load_counts_tokens_at_holders_that_take_sequences(decoder: Any) -> None:
    rig = Rig(decoder, shard="heads", weights=(1, 1), pages=PAGES)
    load = looked(rig.engine, lambda control, stats: kv_load(control, stats.generation_tokens))
    empty = KvLoad({"worker-1": 0, "worker-2": 0}, 320, 640, 640, 0, False, 0)
    assert load == empty
    rig.engine.drain("worker-2").result(60)
    rig.generate(PROMPTS[:1], max_tokens=5)
    load = looked(rig.engine, lambda control, stats: kv_load(control, stats.generation_tokens))
    assert load == KvLoad({"worker-1": 0}, 320, 320, 320, 0, False, 5)
    rig.close()


def test_an_error_of_a_decision_leaves_the_engine_as_it_is(decoder: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Autoscaler):
        def decide(self, load: KvLoad, now: float) -> Any:
            raise RuntimeError("a bug")

    rig = Rig(decoder, shard="heads", pages=PAGES)
    scaling = Autoscaling(rig.engine, cast("AttentionWorkers", Pool(rig, decoder)), Broken(1, 2))
    done = threading.Event()
    rig.engine.look(lambda control, stats: (scaling.decide(control, stats), done.set()))  # type: ignore[arg-type, func-returns-value]
    assert done.wait(60)
    assert "could not be decided" in caplog.text
    assert len(rig.generate(PROMPTS[:1], max_tokens=3)[0][0]) == 3
    scaling.close()
    rig.close()


def test_more_are_wanted_while_a_worker_is_drained(decoder: Any) -> None:
    class Asked:
        """An engine that keeps drains open, and workers that note what they are asked for."""

        def __init__(self) -> None:
            self.calls: list[object] = []
            self.drains: dict[str, Future[int]] = {}

        def drain(self, name: str) -> Future[int]:
            self.drains[name] = Future()
            return self.drains[name]

        def grow(self, count: int) -> None:
            self.calls.append(count)

        def retire(self, name: str) -> None:
            self.calls.append(name)

    class Told(Autoscaler):
        def decide(self, load: KvLoad, now: float) -> Decision:
            decision = decisions.pop(0)
            self.wanted = decision.wanted
            return decision

    decisions = [Decision(1, leaves="worker-2", reason="idle"), Decision(2, reason="a burst")]
    rig = Rig(decoder, shard="heads", weights=(1, 1), pages=PAGES)
    asked: Any = Asked()
    scaling = Autoscaling(asked, asked, Told(1, 2))
    for _ in range(2):
        looked(rig.engine, scaling.decide)
    asked.drains["worker-2"].set_result(0)
    assert asked.calls == [3, "worker-2", 2]  # the one that goes is beside the wanted ones, and another takes its slot
    rig.close()
