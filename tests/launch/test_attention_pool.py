"""How an engine takes attention workers, holds back those that fail again and again, and lets all go."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from attention_servers import until

from lamina.config import EngineConfig
from lamina.deploy.breakers import BreakerLimits
from lamina.deploy.worker_events import WorkerAddress
from lamina.journal.journal import Facts, Journal
from lamina.launch.attention_pool import AttentionPool
from lamina.launch.journal_setup import Identity, identify
from lamina_protocols.channels.grpc_client import WorkerUnreachable
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_workers.errors import HolderLost

HOLDER = HolderConfig((LayerSpec(0, 4, 2, 16, 16, 0.25),), 16, "float32", 1 << 20)
SOON = BreakerLimits(threshold=2, window=100.0, timeout=0.05, longest=0.1)
LATE = BreakerLimits(threshold=2, window=100.0, timeout=3600.0, longest=3600.0)


class Workers:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def watch(self, on_joined: Any, on_left: Any) -> None:
        self.joined, self.left = on_joined, on_left

    def lost(self, name: str) -> None:
        self._log.append(f"{name} lost")

    def close(self) -> None:
        self._log.append("workers")


def pool_of(workers: Workers, config: EngineConfig = EngineConfig(), **options: Any) -> AttentionPool:  # noqa: B008
    return AttentionPool(cast(Any, workers), config, HOLDER, "model", "float32", Identity(), **options)


@pytest.mark.fault("F28")
def test_an_engine_without_the_journal_that_was_asked_for_leaves_no_kv_behind(tmp_path: Path) -> None:
    config = EngineConfig(journal=str(tmp_path), worker_linger=7)
    assert identify(config, None) == Identity()
    journal = Journal(tmp_path, Facts("m", 16, "float32", 1))
    assert identify(config, journal) == Identity(journal.engine, 0, linger=7)
    journal.close()
    assert identify(EngineConfig(model_workers=2, worker_linger=7), None).linger == 7


class Port:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def close(self) -> None:
        self._log.append("closed")

    def parted(self) -> None:
        self._log.append("parted")


def test_workers_that_do_not_answer_are_waited_for_together() -> None:
    log: list[str] = []
    pool = pool_of(Workers(log))
    pool._ports = cast(Any, [Port(log) for _ in range(3)])
    pool.close()
    assert log == ["closed"] * 3 + ["parted"] * 3 + ["workers"]


def test_events_go_on_while_a_worker_that_joins_does_not_answer() -> None:
    """The handshake ran on the thread of the events, for up to 30 s: no other worker was started again meanwhile."""
    log: list[str] = []
    workers = Workers(log)
    pool = pool_of(workers)
    answers, here = threading.Event(), threading.get_ident()

    def connect(worker: Any) -> Any:
        assert threading.get_ident() != here
        assert answers.wait(10)
        raise WorkerUnreachable(f"{worker.name} does not answer")

    pool._connect = connect  # type: ignore[method-assign]
    pool.watch(cast(Any, SimpleNamespace(leave=lambda name: None, leaving=lambda name: None)))
    workers.joined(WorkerAddress("a", "x:1"))
    answers.set()
    pool.close()
    assert log == ["a lost", "workers"]
    workers.joined(WorkerAddress("b", "x:2"))  # harmless, it is closed


def test_worker_that_leaves_during_its_handshake_does_not_join() -> None:
    """It joined after it had left: the engine kept it, and beside it its next name at the same address."""
    log: list[str] = []
    workers = Workers(log)
    pool = pool_of(workers)
    answers = threading.Event()

    def connect(worker: Any) -> Any:
        assert answers.wait(10)
        return Port(log)

    pool._connect = connect  # type: ignore[method-assign]
    pool._seat = lambda port: None  # type: ignore[method-assign,assign,return-value]
    joins = lambda *what: log.append("joined")  # noqa: E731
    pool.watch(cast(Any, SimpleNamespace(leave=log.append, leaving=log.append, join=joins)))
    workers.joined(WorkerAddress("a", "x:1"))
    workers.left("a")
    answers.set()
    pool.close()
    assert log == ["a", "closed", "workers"]


def test_worker_that_is_lost_again_and_again_is_not_connected_to() -> None:
    log: list[str] = []
    workers = Workers(log)
    pool = pool_of(workers)
    pool._ports = cast(
        Any, [SimpleNamespace(closed=False, close=int, parted=int, watch=lambda *_: None)]
    )  # another one

    def connect(worker: Any) -> Any:
        raise WorkerUnreachable("no answer")

    pool._connect = connect  # type: ignore[method-assign]
    pool.watch(cast(Any, SimpleNamespace(leave=lambda name: None, leaving=lambda name: None)))
    for number in range(4):
        workers.joined(WorkerAddress(f"a.{number}", "x:1", place="x:1"))
        until(lambda number=number: len(log) == min(number + 1, 3))
    assert log == ["a.0 lost", "a.1 lost", "a.2 lost"]
    assert pool.held_back() == {"a.3": "open"}
    pool.close()


@pytest.mark.fault("F04")
def test_worker_on_trial_gets_no_kv_before_it_has_answered_heartbeats() -> None:
    log: list[str] = []
    pool = pool_of(Workers(log), EngineConfig(worker_timeout=0.1))
    began = time.monotonic()
    pool._try(cast(Any, SimpleNamespace(closed=False)))
    assert time.monotonic() - began >= 0.2
    with pytest.raises(HolderLost, match="attention worker a was lost on trial, before it had any KV"):
        pool._try(cast(Any, SimpleNamespace(closed=True, name="a", close=int)))
    pool.close()


class Engine:
    """Uses workers when it may; `others`: whether it has another one. `tried` has the names of those on trial."""

    def __init__(self, flapping: BreakerLimits = LATE, quarantine: BreakerLimits = LATE) -> None:
        self.others = True
        self.used: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.tried: list[str] = []
        self.workers = Workers([])
        self.pool = pool_of(self.workers, limits=(flapping, quarantine))
        self.pool._connect = self._connect  # type: ignore[method-assign]
        self.pool._try = lambda port: self.tried.append(port.name)  # type: ignore[method-assign]
        self.pool._alone = lambda: not self.others  # type: ignore[method-assign]
        joins = lambda port, *_: self.used.put(port.name)  # noqa: E731
        self.pool.watch(cast(Any, SimpleNamespace(join=joins, leave=lambda name: None, leaving=None)))

    def joins(self, name: str, place: str = "") -> None:
        self.workers.joined(WorkerAddress(name, "h:1", place=place))

    def loses(self, name: str, place: str = "") -> None:
        self.joins(name, place)
        assert self.used.get(timeout=5) == name
        self.pool.lost(name)

    @staticmethod
    def _connect(worker: WorkerAddress) -> Any:
        return SimpleNamespace(
            name=worker.name, capacity=1 << 20, resumed=False, page_layout="", watch=lambda *_: None, close=lambda: None
        )


@pytest.mark.fault("F04")
def test_worker_that_flaps_is_held_back_by_its_place_until_the_time_is_over() -> None:
    engine = Engine(SOON)
    engine.loses("w", "slot")
    engine.loses("w.1", "slot")
    engine.joins("w.2", "slot")
    assert engine.pool.held_back() == {"w.2": "open"}
    engine.joins("v")
    assert engine.used.get(timeout=5) == "v"  # nobody else waits
    assert engine.used.get(timeout=5) == "w.2"
    assert engine.tried == ["w.2"]
    assert engine.pool.held_back() == {}
    engine.pool.lost("w.2")
    engine.joins("w.3", "slot")
    assert engine.pool.held_back() == {"w.3": "open"}
    engine.pool.close()


def test_worker_that_leaves_while_it_is_held_back_is_not_used() -> None:
    engine = Engine(SOON)
    engine.loses("w", "slot")
    engine.loses("w.1", "slot")
    engine.joins("w.2", "slot")
    engine.workers.left("w.2")
    assert engine.pool.held_back() == {}
    time.sleep(0.1)
    assert engine.used.empty()


@pytest.mark.fault("F04")
def test_last_worker_is_used_though_its_breaker_is_open() -> None:
    engine = Engine()
    engine.loses("w", "slot")
    engine.loses("w.1", "slot")
    engine.joins("w.2", "slot")
    assert engine.used.empty()
    engine.loses("v")
    engine.others = False
    engine.pool.lost("v")  # it was the only other one
    assert engine.used.get(timeout=5) == "w.2"
    engine.pool.lost("w.2")
    engine.joins("w.3", "slot")
    assert engine.used.get(timeout=5) == "w.3"
    assert engine.tried == []
    engine.pool.close()


@pytest.mark.fault("F08")
def test_quarantined_worker_is_not_used_even_where_it_is_the_last() -> None:
    engine = Engine()
    engine.others = False
    for name in ("w", "w.1"):
        engine.joins(name, "slot")
        assert engine.used.get(timeout=5) == name
        engine.pool.corrupt(name)
        engine.pool.lost(name)
    engine.joins("w.2", "slot")
    engine.pool.lost("v")
    assert engine.pool.held_back() == {"w.2": "quarantined"}
    engine.pool.close()
    assert engine.used.empty()


def test_worker_that_failed_and_has_joined_again_is_held_back_all_the_same() -> None:
    """Its connection was still being made when it left and came back: its place was forgotten, and the snapshot, which
    asks who is held back, ended the engine."""
    engine = Engine()
    engine.loses("w", "slot")
    engine.joins("w", "slot")
    assert engine.used.get(timeout=5) == "w"  # it connects
    engine.pool.lost("w")
    engine.joins("w", "slot")
    engine.pool.lost("w")
    assert engine.pool.held_back() == {"w": "open"}
    engine.pool.close()


def test_failures_of_unknown_workers_count_for_nobody() -> None:
    engine = Engine()
    for _ in range(5):
        engine.pool.lost("w")
        engine.pool.corrupt("w")
    engine.joins("w")
    assert engine.used.get(timeout=5) == "w"
