"""Attention workers whose membership another process relays."""

from __future__ import annotations

import threading

import pytest

from lamina.deploy import relayed_attention
from lamina.deploy.relayed_attention import RelayedWorkers
from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import WorkersUnavailable

A, B, C = (WorkerAddress(name, f"10.0.0.1:{port}") for port, name in enumerate("abc", 1))


class Relayed:
    """Relayed workers, and the events that they delivered."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str | int]] = []
        self.events: list[str] = []
        self.workers = RelayedWorkers(lambda *what: self.told.append(what))

    def watch(self) -> None:
        self.workers.watch(
            lambda worker: self.events.append(f"+{worker.name}"), lambda name: self.events.append(f"-{name}")
        )


def test_start_waits_for_the_first_relayed_workers() -> None:
    relayed = Relayed()
    threading.Timer(0.05, relayed.workers.there, [[A, B]]).start()
    assert relayed.workers.start() == (A, B)
    relayed.watch()
    assert relayed.events == []


def test_changes_are_events_that_wait_for_a_listener() -> None:
    relayed = Relayed()
    relayed.workers.there([A, B])
    relayed.workers.start()
    relayed.workers.there([B, C])
    relayed.workers.joined(A)
    relayed.workers.there([B, C, A])
    relayed.workers.left("b")
    relayed.workers.left("unknown")
    assert relayed.events == []
    relayed.watch()
    assert relayed.events == ["-a", "+c", "+a", "-b"]


def test_start_takes_none_where_none_is_needed() -> None:
    workers = RelayedWorkers(print, optional=True)
    workers.there([])
    assert workers.start() == ()
    workers = RelayedWorkers(print)
    workers.there([])
    with pytest.raises(WorkersUnavailable, match="no attention worker is up"):
        workers.start()


def test_what_the_engine_wants_is_told_to_the_other_side() -> None:
    relayed = Relayed()
    relayed.workers.lost("a")
    relayed.workers.grow(3)
    relayed.workers.retire("b")
    assert relayed.told == [("lost", "a"), ("grow", 3), ("retire", "b")]


def test_start_fails_in_time_when_no_worker_is_relayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relayed_attention, "_WORKERS_UP", 0.05)
    with pytest.raises(WorkersUnavailable, match=r"within 0\.05 s"):
        Relayed().workers.start()
    closed = Relayed()
    closed.workers.close()
    with pytest.raises(WorkersUnavailable, match="no attention worker is up"):
        closed.workers.start()
