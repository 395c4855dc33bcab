"""How an engine lets its attention workers go."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from attention_servers import until

from lamina.config import EngineConfig
from lamina.deploy.worker_events import WorkerAddress
from lamina.launch.attention_pool import AttentionPool
from lamina.launch.journal_setup import Identity
from lamina_protocols.channels.grpc_client import WorkerUnreachable
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_workers.errors import HolderLost

HOLDER = HolderConfig((LayerSpec(0, 4, 2, 16, 16, 0.25),), 16, "float32", 1 << 20)


class Workers:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def watch(self, on_joined: Any, on_left: Any) -> None:
        self.joined, self.left = on_joined, on_left

    def lost(self, name: str) -> None:
        self._log.append(f"{name} lost")

    def close(self) -> None:
        self._log.append("workers")


class Port:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def close(self) -> None:
        self._log.append("closed")

    def parted(self) -> None:
        self._log.append("parted")


def test_workers_that_do_not_answer_are_waited_for_together() -> None:
    log: list[str] = []
    pool = AttentionPool(cast(Any, Workers(log)), EngineConfig(), HOLDER, "model", "float32", Identity())
    pool._ports = cast(Any, [Port(log) for _ in range(3)])
    pool.close()
    assert log == ["closed"] * 3 + ["parted"] * 3 + ["workers"]


def test_events_go_on_while_a_worker_that_joins_does_not_answer() -> None:
    """The handshake ran on the thread of the events, for up to 30 s: no other worker was started again meanwhile."""
    log: list[str] = []
    workers = Workers(log)
    pool = AttentionPool(cast(Any, workers), EngineConfig(), HOLDER, "model", "float32", Identity())
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
    pool = AttentionPool(cast(Any, workers), EngineConfig(), HOLDER, "model", "float32", Identity())
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
    pool = AttentionPool(cast(Any, workers), EngineConfig(), HOLDER, "model", "float32", Identity())
    pool._ports = cast(
        Any, [SimpleNamespace(closed=False, close=int, parted=int, watch=lambda *_: None)]
    )  # another one

    def connect(worker: Any) -> Any:
        pool.breakers.known(worker)
        raise WorkerUnreachable("no answer")

    pool._connect = connect  # type: ignore[method-assign]
    pool.watch(cast(Any, SimpleNamespace(leave=lambda name: None, leaving=lambda name: None)))
    for number in range(4):
        workers.joined(WorkerAddress(f"a.{number}", "x:1", place="x:1"))
        until(lambda number=number: len(log) == min(number + 1, 3))
    assert log == ["a.0 lost", "a.1 lost", "a.2 lost"]
    assert pool.breakers.held() == {"a.3": "open"}
    pool.close()


def test_worker_on_trial_gets_no_kv_before_it_has_answered_heartbeats() -> None:
    log: list[str] = []
    pool = AttentionPool(
        cast(Any, Workers(log)), EngineConfig(worker_timeout=0.1), HOLDER, "model", "float32", Identity()
    )
    began = time.monotonic()
    pool._try(cast(Any, SimpleNamespace(closed=False)))
    assert time.monotonic() - began >= 0.2
    with pytest.raises(HolderLost, match="attention worker a was lost on trial, before it had any KV"):
        pool._try(cast(Any, SimpleNamespace(closed=True, name="a", close=int)))
    pool.close()
