"""How an engine hears of model workers that come back."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lamina.errors import EngineError
from lamina.launch import model_pool
from lamina.launch.model_pool import ModelWorkerPool
from lamina_workers.parallel import peer_messages
from lamina_workers.parallel.peers import Peer


class Engine:
    def __init__(self) -> None:
        self.back: list[Peer] = []

    def rank_back(self, peer: Peer) -> None:
        self.back.append(peer)


class Interleaved(queue.SimpleQueue[Any]):
    """Has `watch` run while an item is about to be put."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self.watch()
        super().put(item, block, timeout)


@pytest.mark.parametrize("watched", ["before", "meanwhile", "afterwards"])
def test_worker_that_is_ready_while_the_engine_begins_to_watch_is_told_once(watched: str) -> None:
    """A worker that was ready between two lines of `watch` was put aside, where nobody looked any more: a rank that had
    come back stayed missing, and the engine halted until its deadline."""
    processes = SimpleNamespace(host=None, credentials=None, lost=lambda name: None, close=lambda: None)
    pool = ModelWorkerPool(cast(Any, processes), [])
    engine, peer = Engine(), Peer(1, "model-1", cast(Any, None), peer_messages.Ready("cpu"))
    if watched == "before":
        pool.watch(cast(Any, engine))
    elif watched == "meanwhile":
        pool._started = Interleaved()
        pool._started.watch = lambda: pool.watch(cast(Any, engine))  # type: ignore[attr-defined]
    pool._ready(peer)
    if watched == "afterwards":
        pool.watch(cast(Any, engine))
    pool.close()
    assert engine.back == [peer]


@pytest.mark.fault("F04")
def test_process_that_stops_before_it_connects_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stood still without an end that anything would tell, and the engine's start with it."""
    monkeypatch.setattr(model_pool, "_CONNECTING_S", 0.05)
    processes = SimpleNamespace(host=None, credentials=None, lost=lambda name: None, close=lambda: None)
    pool = ModelWorkerPool(cast(Any, processes), cast(Any, [SimpleNamespace(rank=1), SimpleNamespace(rank=2)]))
    pool._listener.invite(1, "model-1")
    pool._listener.invite(2, "model-2")
    pool._listener.revoke("model-1")
    pool._ready(Peer(1, "model-1", cast(Any, None), peer_messages.Ready("cpu")))
    with pytest.raises(EngineError, match=r"model-2 did not connect within 0\.05 s"):
        pool.peers()
    pool.close()


@pytest.mark.fault("F04")
def test_process_that_is_started_again_and_stops_before_it_connects_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waited for it: its rank stayed missing until somebody killed it."""
    monkeypatch.setattr(model_pool, "_CONNECTING_S", 0.05)
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    processes = SimpleNamespace(host=None, credentials=None, lost=ended.put, close=lambda: None)
    pool = ModelWorkerPool(cast(Any, processes), [])
    pool.watch(cast(Any, Engine()))
    pool._invite(1, "model-1.1")
    pool._listener.revoke("model-1.1")  # this one ends by itself
    pool._invite(1, "model-1.2")
    assert ended.get(timeout=30) == "model-1.2"
    assert ended.empty()
    pool.close()
