"""A counter of pages answers as the real `KVStore` does, over random operations and rows."""

from __future__ import annotations

import random

import pytest

from lamina.simulator.event_loop.counters import Groups, HolderCounter, PageCounter, Window
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Close, Fork, Open, Operation, Row
from lamina_protocols.messages.routes import HolderBatch, Route
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.kv_pages.kv_store import KVStore, PoolExhausted

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


def test_pages_are_taken_as_tokens_come_and_given_back() -> None:
    tell = Told(10)
    assert tell(Open(1, 0, (0,), 0, FAR), rows=(row(1, 0, 9),)) == [0]
    assert tell.pool.free == 7
    for position in range(9, 12):
        tell(rows=(row(1, position, 1),))
    assert tell.pool.free == 7
    tell(rows=(row(1, 12, 1),))
    assert tell.pool.free == 6
    tell(Close(1))
    assert tell.pool.free == 10


def test_what_does_not_fit_is_refused_and_takes_nothing() -> None:
    tell = Told(3)
    assert tell(Open(1, 0, (0,), 0, FAR), rows=(row(1, 0, 13),)) is None
    assert tell.pool.free == 3
    tell.number = 0  # the same operation comes again, as after a refusal, and is not applied twice
    assert tell(Open(1, 0, (0,), 0, FAR), rows=(row(1, 0, 12),)) == [0]
    assert tell.pool.free == 0


def test_each_head_and_layer_takes_pages_of_its_own() -> None:
    tell = Told(100, ((2, None), (1, Window(4))))
    tell(Open(1, 0, (0, 1, 2), 0, FAR), rows=(row(1, 0, 8),))
    assert tell.pool.free == 100 - 2 * 3 * 3
    assert tell(rows=(row(1, 8, 1),)) == [7]  # the windowed layer let its first page go
    assert tell.pool.free == 100 - 2 * 3 * 3 - 2 * 3 - 3 + 3


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("windows", [(None,), (None, 6), (9, None, 5)])
def test_it_answers_as_the_real_store(seed: int, windows: tuple[int | None, ...]) -> None:
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
