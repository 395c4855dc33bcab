"""Counters of pages and of states answer as the real `KVStore` and `StateStore` do, over random operations and rows."""

from __future__ import annotations

import random

import pytest

from lamina.errors import EngineError
from lamina.simulator.costs.hardware import load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated
from lamina.simulator.event_loop.counters import Groups, HolderCounter, PageCounter, RecordCounter, Window
from lamina.simulator.event_loop.simulate import simulate
from lamina.simulator.traces.arrivals import Arrival, Trace
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Close, Fork, Open, Operation, Row
from lamina_protocols.messages.routes import HolderBatch, Route
from lamina_workers.errors import PoolExhausted
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.kv_pages.state_store import StateStore

SIZE = 4
FAR = 1 << 20
PLAIN: Groups = ((1, None),)


class Told:
    """A counter, and what it is told, numbered."""

    def __init__(self, pages: int, groups: Groups = PLAIN) -> None:
        self.pool, self.number = PageCounter(pages, SIZE, groups), 0
        self.counter = HolderCounter([self.pool])

    def __call__(self, *operations: Operation, rows: tuple[Row, ...] = ()) -> list[int] | None:
        routes = tuple(Route(at, (0,), row, (row.start, row.start + row.count)) for at, row in enumerate(rows))
        floors = self.counter.take(HolderBatch(self.number, operations, routes))
        self.number += len(operations)
        return floors


def row(handle: int, start: int, count: int) -> Row:
    return Row(handle, start, count, None, True)


def test_what_does_not_fit_is_refused_and_takes_nothing() -> None:
    tell = Told(3)
    assert tell(Open(1, 0, (0,), 0, FAR), rows=(row(1, 0, 13),)) is None
    assert tell.pool.free == 3
    tell.number = 0  # the same operation comes again, as after a refusal, and is not applied twice
    assert tell(Open(1, 0, (0,), 0, FAR), rows=(row(1, 0, 12),)) == [0]
    assert tell.pool.free == 0


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("windows", [(None,), (None, 6), (9, None, 5)])
def test_a_counter_of_pages_answers_as_the_real_store(seed: int, windows: tuple[int | None, ...]) -> None:
    chance, heads = random.Random(seed), 3
    layers = tuple(LayerSpec(at, heads, heads, 8, 8, 1.0, window) for at, window in enumerate(windows))
    config = HolderConfig(layers, SIZE, "float32", 1 << 20)
    pages = 40 * heads
    store = KVStore(config, HeadPolicies.of(config), pages)
    tell = Told(pages, tuple((1, None if window is None else Window(window)) for window in windows))
    held: dict[int, tuple[int, int, int]] = {}  # length, floor, lo of each part
    for handle in range(1, 151):
        choice = chance.random()
        operation: Operation | None = None
        if choice < 0.2 or not held:
            lo = chance.choice([0, 0, 0, SIZE])
            mine = tuple(sorted(chance.sample(range(heads), chance.randint(1, heads))))
            operation, held[handle] = Open(handle, 0, mine, lo, FAR), (lo, 0, lo)
        elif choice < 0.35:
            parent = chance.choice(list(held))
            length, floor, lo = held[parent]
            cut = chance.randint(max(floor, lo), length)
            operation, held[handle] = Fork(handle, parent, cut), (cut, floor, lo)
        elif choice < 0.45:
            gone = chance.choice(list(held))
            operation = Close(gone)
            del held[gone]
        if operation is not None:
            store.update((operation,), ())
            tell(operation)
        else:
            grown = chance.sample(list(held), min(len(held), chance.randint(1, 3)))
            rows = tuple(row(each, held[each][0], chance.choice([1, 1, 1, 2, 7])) for each in grown)
            try:
                floors = list(store.update((), rows).floors)
                store.stored(rows)
            except PoolExhausted:
                assert tell(rows=rows) is None
                return  # the store has let nothing go, the counter may have: they may differ from here on
            assert tell(rows=rows) == floors
            for each, floor in zip(rows, floors, strict=True):
                held[each.handle] = (each.start + each.count, floor, held[each.handle][2])
        assert tell.pool.free == store.free_pages


FAR = 1 << 20


def state_row(handle: int, start: int, count: int) -> Row:
    return Row(handle, start, count, (0, start) if start else None, True)


def test_what_is_shared_is_not_written_over() -> None:
    counter = RecordCounter(3, 1)
    counter.apply(Open(1, 1, (0,), 0, FAR))
    counter.take([state_row(1, 0, 64)])
    counter.apply(Fork(2, 1, 64))  # a snapshot takes nothing
    assert counter.free == 2
    counter.take([state_row(1, 64, 1)])
    assert counter.free == 1
    counter.take([state_row(1, 65, 1)])  # its older record is the snapshot's too
    assert counter.free == 0
    assert counter.reserve([state_row(1, 66, 1)])
    assert not counter.reserve([state_row(2, 64, 1)])
    counter.apply(Close(1))
    assert counter.free == 2


def test_rows_and_forks_begin_where_states_are() -> None:
    counter = RecordCounter(9, 1)
    counter.apply(Open(1, 1, (0,), 0, FAR))
    counter.take([state_row(1, 0, 8)])
    with pytest.raises(EngineError, match="was forked at 7"):
        counter.apply(Fork(2, 1, 7))
    with pytest.raises(EngineError, match="begins where its part has no states"):
        counter.take([state_row(1, 7, 1)])


@pytest.mark.parametrize("seed", range(30))
def test_a_counter_of_states_answers_as_the_real_store(seed: int) -> None:
    chance, heads, pages = random.Random(seed), 3, 40
    layers = tuple(LayerSpec(at, heads, heads, 4, 4, 1.0, kind="lightning", key_heads=heads) for at in range(2))
    store, counter = StateStore(HolderConfig(layers, 16, "float32", 1 << 20), pages), RecordCounter(pages, 2)
    held: set[int] = set()
    for handle in range(1, 200):
        operation: Operation | None = None
        choice = chance.random()
        if choice < 0.2 or not held:
            mine = tuple(sorted(chance.sample(range(heads), chance.randint(1, heads))))
            operation = Open(handle, 0, mine, 0, FAR)
        elif choice < 0.4:
            parent = chance.choice(sorted(held))
            part = store.part(parent)
            operation = Fork(handle, parent, chance.choice([part.held, part.before]))
        elif choice < 0.5:
            operation = Close(chance.choice(sorted(held)))
        if operation is not None:
            store.update((operation,), ())
            store.commit()
            counter.apply(operation)
            held = set(store.parts())
        rows = [
            state_row(each, chance.choice([store.part(each).held, store.part(each).before]), chance.randint(1, 9))
            for each in chance.sample(sorted(held), min(len(held), chance.randint(0, 3)))
        ]
        fits = counter.reserve(rows)
        try:
            store.update((), rows)
        except PoolExhausted:
            assert not fits
            continue
        assert fits
        store.commit()
        store.stored(rows)
        counter.take(rows)
        assert counter.free == store.free_pages
        assert [counter.floor(each.handle) for each in rows] == [store.part(each.handle).before for each in rows]


def test_prefixes_of_models_with_states_are_shared_where_states_are_kept() -> None:
    """Rows of prompts end at each 1024th token, and a prompt that begins like another one goes on from there."""
    blocks = tuple(range(5))
    trace = Trace("twice", (Arrival(0.0, 2560, 8, blocks), Arrival(60.0, 2560, 8, blocks)))
    system = Colocated(model=model("qwen3-next-80b-a3b"), device=load().device("h200"), tensor_parallel=4)
    found = simulate(system, trace)
    assert (found.finished, found.reused_tokens) == (2, 2048)
    assert simulate(system, trace, prefix_cache=False).reused_tokens == 0
