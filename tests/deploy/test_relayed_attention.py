"""Attention workers whose membership another process relays."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from lamina.deploy import relayed_attention
from lamina.deploy.relayed_attention import AttentionRelay, Drained, Grow, Lost, RelayedWorkers, Retire, Wish
from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import WorkersUnavailable

A, B, C = (WorkerAddress(name, f"10.0.0.1:{port}") for port, name in enumerate("abc", 1))


class Relayed:
    """Relayed workers, and the events that they delivered."""

    def __init__(self) -> None:
        self.told: list[Wish] = []
        self.events: list[str] = []
        self.workers = RelayedWorkers(self.told.append)

    def watch(self) -> None:
        self.workers.watch(
            lambda worker: self.events.append(f"+{worker.name}"), lambda name: self.events.append(f"-{name}")
        )


def test_start_waits_for_the_first_relayed_workers() -> None:
    relayed = Relayed()
    threading.Timer(0.05, relayed.workers.update, [[A, B]]).start()
    assert relayed.workers.start() == (A, B)
    relayed.watch()
    assert relayed.events == []


def test_changes_are_events_that_wait_for_a_listener() -> None:
    relayed = Relayed()
    relayed.workers.update([A, B])
    relayed.workers.start()
    relayed.workers.update([B, C])
    relayed.workers.update([B, C, A])
    relayed.workers.update([B, C, A])
    relayed.workers.update([C, A])
    assert relayed.events == []
    relayed.watch()
    assert relayed.events == ["-a", "+c", "+a", "-b"]


def test_start_takes_none_where_none_is_needed() -> None:
    workers = RelayedWorkers(print, optional=True)
    workers.update([])
    assert workers.start() == ()
    workers = RelayedWorkers(print)
    workers.update([])
    with pytest.raises(WorkersUnavailable, match="no attention worker is up"):
        workers.start()


def test_what_the_engine_wants_is_told_to_the_other_side() -> None:
    relayed = Relayed()
    relayed.workers.lost("a")
    relayed.workers.grow(3)
    relayed.workers.retire("b")
    assert relayed.told == [Lost("a"), Grow(3), Retire("b")]


def test_start_fails_in_time_when_no_worker_is_relayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relayed_attention, "_WORKERS_UP", 0.05)
    with pytest.raises(WorkersUnavailable, match=r"within 0\.05 s"):
        Relayed().workers.start()
    closed = Relayed()
    closed.workers.close()
    with pytest.raises(WorkersUnavailable, match="no attention worker is up"):
        closed.workers.start()


class Owner:
    """The owner's side: its relay, what its pool was asked for, and what the engine got. The test moves the clock."""

    def __init__(self, count: int = 2) -> None:
        self.now = 0.0
        self.asked: list[tuple[str, str | int]] = []
        self.sent: list[tuple[WorkerAddress, ...]] = []
        self.relay = AttentionRelay(count, 3, lambda: self.now)

    def lost(self, name: str) -> None:
        self.asked.append(("lost", name))

    def grow(self, count: int) -> None:
        self.asked.append(("grow", count))

    def retire(self, name: str) -> None:
        self.asked.append(("retire", name))

    def begin(self, *workers: WorkerAddress) -> None:
        self.relay.begin(cast(Any, self), workers)

    def serve(self) -> None:
        self.relay.serve(self.sent.append)


def test_engine_gets_the_workers_once_they_are_up_and_then_each_change() -> None:
    owner = Owner()
    owner.serve()
    assert (owner.sent, owner.relay.due) == ([], None)
    owner.begin(A, B)
    owner.relay.joined(C)
    owner.relay.left("a")
    owner.relay.left("unknown")
    assert owner.sent == [(A, B), (A, B, C), (B, C)]


def test_next_engine_waits_for_all_workers_and_then_for_some() -> None:
    owner = Owner()
    owner.begin()
    owner.serve()
    assert (owner.sent, owner.relay.due, owner.relay.has("a")) == ([], 10.0, False)
    owner.now = 10.0
    owner.relay.introduce()
    assert (owner.sent, owner.relay.due) == ([], 11.0)
    owner.now = 11.0
    owner.relay.joined(A)
    assert (owner.sent, owner.relay.due, owner.relay.has("a")) == ([(A,)], None, True)
    owner.relay.serve(None)
    owner.relay.joined(B)
    assert not owner.relay.has("a")
    owner.serve()
    assert owner.sent == [(A,), (A, B)]


def test_pool_does_what_the_engine_wants_and_the_next_engine_expects_as_many() -> None:
    owner = Owner(1)
    owner.begin(A)
    owner.serve()
    for event in (Grow(1), Grow(9), Lost("a"), Retire("a"), Drained("a")):
        owner.relay.take(event)
    assert owner.asked == [("grow", 3), ("lost", "a")]
    for worker in (A, B, C):
        owner.relay.joined(worker)
    owner.relay.take(Retire("b"))
    owner.relay.take(Drained("c"))
    assert owner.asked[2:] == [("retire", "b")]
    owner.serve()
    assert owner.sent[-1] == (A,)
