"""Attention workers whose membership another process relays."""

from __future__ import annotations

import threading

import pytest

from lamina.deploy import relayed_attention
from lamina.deploy.relayed_attention import RelayedWorkers
from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import WorkersUnavailable

A, B, C = (WorkerAddress(name, f"10.0.0.1:{port}") for port, name in enumerate("abc", 1))


class Told:
    """Relayed workers, and the events that they delivered."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        self.heard: list[str] = []
        self.members = RelayedWorkers(self.lost.append)

    def watch(self) -> None:
        self.members.watch(
            lambda member: self.heard.append(f"+{member.name}"), lambda name: self.heard.append(f"-{name}")
        )


def test_start_waits_for_the_first_relayed_workers() -> None:
    told = Told()
    threading.Timer(0.05, told.members.there, [[A, B]]).start()
    assert told.members.start() == (A, B)
    told.watch()
    assert told.heard == []


def test_changes_are_events_that_wait_for_a_listener() -> None:
    told = Told()
    told.members.there([A, B])
    told.members.start()
    told.members.there([B, C])
    told.members.joined(A)
    told.members.there([B, C, A])
    told.members.left("b")
    told.members.left("nobody")
    assert told.heard == []
    told.watch()
    assert told.heard == ["-a", "+c", "+a", "-b"]


def test_lost_worker_is_reported_to_the_other_side() -> None:
    told = Told()
    told.members.lost("a")
    assert told.lost == ["a"]


def test_start_fails_in_time_when_no_worker_is_relayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relayed_attention, "_WORKERS_UP", 0.05)
    with pytest.raises(WorkersUnavailable, match=r"within 0\.05 s"):
        Told().members.start()
    closed = Told()
    closed.members.close()
    with pytest.raises(WorkersUnavailable, match="no attention worker is up"):
        closed.members.start()
