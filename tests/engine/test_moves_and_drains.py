"""Moves and drains over a control plane alone: which copies are made, and when a worker goes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lamina.engine.holders import Drains
from lamina.engine.kv_migration import KvMigration, _moves
from lamina.errors import EngineError
from lamina.kv.kv_shares import Layout, Part, Share
from lamina.kv.pages import PageGroup
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import Request, ScheduledSequence, SchedulerConfig
from lamina.scheduling.control_plane import ControlPlane
from lamina_protocols.messages.routes import HolderBatch
from lamina_workers.model_worker.interface import Waiting
from lamina_workers.model_worker.kv_copy import Move

END = 1024


class Copied:
    """A model worker whose copies are made at once; `moves` has them."""

    def __init__(self) -> None:
        self.moves: list[Move] = []

    def copy(
        self, moves: Sequence[Move], shares: Mapping[int, HolderBatch], accepted: Callable[[], None]
    ) -> Generator[Waiting, None, bool]:
        self.moves += moves
        accepted()
        return True
        yield


class Scene:
    """Two holders with a pool of KV and one of states each, and what moves between them."""

    def __init__(self) -> None:
        placement = Placement(
            {number: Holder((100, 100)) for number in (1, 2)}, heads=((2, 2),), page_size=16, max_model_len=END,
            states=(1,),
        )  # fmt: skip
        config = SchedulerConfig(64, 8, END, 16, ((PageGroup(1),), ()), prefix_cache=False, states={1: 1})
        self.control = ControlPlane(config, placement)
        self.worker = Copied()
        self.migration = KvMigration(cast(Any, self.worker), self.control, lambda: 0.0)
        self.seconds = 0.0

    def at(self, holder: int) -> Layout:
        return tuple(Share(holder, (0, 1), 0, END, pool) for pool in (0, 1))

    def running(self, computed: int, floor: int) -> ScheduledSequence:
        """A sequence at holder 1, whose first tokens have KV; its states are kept at the floor too."""
        running = self.control.scheduler.running
        sequence = ScheduledSequence(Request("0", (1,) * (computed + 1), 100), 0, 0, [1] * (computed + 1))
        running.open(sequence, self.at(1))
        sequence.computed = sequence.planned = computed
        sequence.floor, sequence.records = floor, (floor, computed)
        self.control.scheduler.ledger.took(running.pages(sequence))
        return sequence


@pytest.mark.parametrize("computed", [40, 48, 300])
def test_a_move_copies_every_token_once_and_states_at_both_positions(computed: int) -> None:
    scene = Scene()
    sequence = scene.running(computed, floor=32)
    assert scene.migration.begin(sequence, scene.at(2))
    while not scene.migration.sequences:
        scene.migration.step(1.0, waits=True)
    ranges = {pool: [(move.lo, move.hi) for move in scene.worker.moves if move.pool == pool] for pool in (0, 1)}
    assert [lo for lo, _ in ranges[0]] == [0, *(hi for _, hi in ranges[0][:-1])]
    assert ranges[0][-1][1] == computed == scene.migration.tokens
    assert ranges[1] == [(0, 32), (0, computed)]
    assert sequence.layout == scene.at(2)


def test_heads_are_taken_from_where_the_old_part_has_them() -> None:
    """Of the local tier's part, which has all heads, each worker gets its own."""
    old = [Part(5, Share(0, (0, 1, 2, 3), 0, END))]
    new = [Part(7, Share(1, (1,), 0, END)), Part(8, Share(2, (2, 3), 0, END))]
    moves = {
        (move.to, move.target): (move.heads, move.source_first, move.source_heads, move.target_first, move.target_heads)
        for move in _moves(old, new, 0, 32, 16)
    }
    assert moves == {(1, 7): (1, 1, 4, 0, 1), (2, 8): (2, 2, 4, 0, 2)}
    back = [(move.target_first, move.source_first) for move in _moves(new, old, 0, 32, 16)]
    assert back == [(1, 0), (2, 0)]


def test_a_drained_worker_stays_while_a_batch_that_concerns_it_is_in_flight() -> None:
    scene, gone = Scene(), list[tuple[int, ...]]()
    holders = SimpleNamespace(
        numbers={"one": [1], "two": [2]}.get, names={1: "one", 2: "two"}, let_go=gone.append, returns=0
    )
    drains, done = Drains(scene.control, cast(Any, holders), scene.migration, lambda: scene.seconds), Future[int]()
    drains.begin("one", done)
    drains.step({1, 2})
    assert not gone
    assert drains.under_way
    drains.step({2})
    assert gone == [(1,)]
    assert done.result(0) == 0


@pytest.mark.fault("F18")
def test_a_drain_in_which_nothing_goes_on_ends_with_an_error() -> None:
    """Whatever asked for it waited for ever."""
    scene = Scene()
    holders = SimpleNamespace(numbers={"one": [1], "two": [2]}.get, names={1: "one", 2: "two"}, returns=0)
    drains, done = Drains(scene.control, cast(Any, holders), scene.migration, lambda: scene.seconds), Future[int]()
    sequence = scene.running(computed=40, floor=32)
    sequence.tokens += [1] * 50  # of its prompt, which is not computed any further
    drains.begin("one", done)
    for scene.seconds in (0.0, 500.0, 599.0):
        drains.step(set())
    sequence.computed = sequence.planned = 41
    for scene.seconds in (601.0, 1200.0):
        drains.step(set())
        assert not done.done()
    scene.seconds = 1202.0
    drains.step(set())
    with pytest.raises(EngineError, match="one could not be drained: nothing has moved for 600 s"):
        done.result(0)
    assert not drains.under_way
    assert not scene.control.placement.draining


@pytest.mark.fault("F18")
def test_the_time_in_which_a_model_worker_is_missing_is_no_time_in_which_a_drain_stands_still() -> None:
    """Nothing is computed or moved then, so a drain had ended as soon as the worker was back."""
    scene = Scene()
    holders = SimpleNamespace(numbers={"one": [1], "two": [2]}.get, names={1: "one", 2: "two"}, returns=0)
    drains, done = Drains(scene.control, cast(Any, holders), scene.migration, lambda: scene.seconds), Future[int]()
    scene.running(computed=40, floor=32).tokens += [1] * 50
    drains.begin("one", done)
    drains.step(set())
    scene.seconds = 2000.0
    holders.returns += 1
    drains.step(set())
    assert not done.done()
    scene.seconds = 2601.0
    drains.step(set())
    assert done.exception(0)
