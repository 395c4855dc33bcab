"""A counter of states answers as the real `StateStore` does, over random operations and rows."""

from __future__ import annotations

import random

import pytest

from lamina.errors import EngineError
from lamina.simulator.costs.hardware import load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated
from lamina.simulator.event_loop.counters import RecordCounter
from lamina.simulator.event_loop.simulate import simulate
from lamina.simulator.traces.arrivals import Arrival, Trace
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Close, Fork, Open, Operation, Row
from lamina_workers.errors import PoolExhausted
from lamina_workers.kv_pages.state_store import StateStore

FAR = 1 << 20


def row(handle: int, start: int, count: int) -> Row:
    return Row(handle, start, count, (0, start) if start else None, True)


def test_a_part_has_two_records_of_each_state_whatever_its_length() -> None:
    counter = RecordCounter(20, 3)
    counter.apply(Open(1, 1, (0, 1), 0, FAR))
    for start, count, free in ((0, 100, 14), (100, 1, 8), (101, 1, 8), (102, 5000, 8)):
        assert counter.reserve([row(1, start, count)])
        counter.take([row(1, start, count)])
        assert (counter.free, counter.floor(1)) == (free, start)
    counter.apply(Close(1))
    assert counter.free == 20


def test_what_is_shared_is_not_written_over() -> None:
    counter = RecordCounter(3, 1)
    counter.apply(Open(1, 1, (0,), 0, FAR))
    counter.take([row(1, 0, 64)])
    counter.apply(Fork(2, 1, 64))  # a snapshot takes nothing
    assert counter.free == 2
    counter.take([row(1, 64, 1)])
    assert counter.free == 1
    counter.take([row(1, 65, 1)])  # its older record is the snapshot's too
    assert counter.free == 0
    assert counter.reserve([row(1, 66, 1)])
    assert not counter.reserve([row(2, 64, 1)])
    counter.apply(Close(1))
    assert counter.free == 2


def test_rows_and_forks_begin_where_states_are() -> None:
    counter = RecordCounter(9, 1)
    counter.apply(Open(1, 1, (0,), 0, FAR))
    counter.take([row(1, 0, 8)])
    with pytest.raises(EngineError, match="was forked at 7"):
        counter.apply(Fork(2, 1, 7))
    with pytest.raises(EngineError, match="begins where its part has no states"):
        counter.take([row(1, 7, 1)])


@pytest.mark.parametrize("seed", range(30))
def test_it_answers_as_the_real_store(seed: int) -> None:
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
            row(each, chance.choice([store.part(each).held, store.part(each).before]), chance.randint(1, 9))
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
