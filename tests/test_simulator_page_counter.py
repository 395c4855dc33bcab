"""A counter of pages answers as a real holder would, also over random operations."""

from __future__ import annotations

import random

from lamina.simulator.page_counter import PageCounter
from lamina_protocols.messages import Close, Fork, Open, Row
from lamina_workers.routes import HolderShare, Route

SIZE = 4
FAR = 1 << 20


def tell(counter: PageCounter, first: int, *operations: object, rows: tuple[tuple[int, int, int], ...] = ()) -> bool:
    routes = tuple(
        Route(at, (0,), Row(handle, start, count, None, True), (start, start + count))
        for at, (handle, start, count) in enumerate(rows)
    )
    return counter.take(HolderShare(first, operations, routes))  # type: ignore[arg-type]


def test_pages_are_taken_as_tokens_come_and_given_back() -> None:
    counter = PageCounter(10, SIZE)
    assert tell(counter, 0, Open(1, (0,), 0, FAR), rows=((1, 0, 9),))
    assert counter.free == 7
    for position in range(9, 12):
        assert tell(counter, 1, rows=((1, position, 1),))
    assert counter.free == 7
    assert tell(counter, 1, rows=((1, 12, 1),))
    assert counter.free == 6
    tell(counter, 1, Close(1))
    assert (counter.free, counter.parts) == (10, 0)


def test_what_does_not_fit_is_refused_and_takes_nothing() -> None:
    counter = PageCounter(3, SIZE)
    assert not tell(counter, 0, Open(1, (0,), 0, FAR), rows=((1, 0, 13),))
    assert counter.free == 3
    assert tell(counter, 0, Open(1, (0,), 0, FAR), rows=((1, 0, 12),))  # the operation is not applied twice
    assert (counter.free, counter.parts) == (0, 1)


def test_forks_share_pages_and_copy_the_one_they_write_into() -> None:
    counter = PageCounter(10, SIZE)
    tell(counter, 0, Open(1, (0,), 0, FAR), rows=((1, 0, 10),))
    tell(counter, 1, Fork(2, 1, 10))
    assert counter.free == 7
    assert tell(counter, 2, rows=((2, 10, 1),))
    assert counter.free == 6  # page 3 is the fork's own now
    assert tell(counter, 2, rows=((1, 10, 1),))
    assert counter.free == 6  # and the parent's is its own again
    tell(counter, 2, Close(1))
    assert counter.free == 7
    tell(counter, 3, Close(2))
    assert counter.free == 10


def test_a_parent_copies_too_where_it_writes_first() -> None:
    counter = PageCounter(10, SIZE)
    tell(counter, 0, Open(1, (0,), 0, FAR), rows=((1, 0, 6),))
    tell(counter, 1, Fork(2, 1, 6))
    assert tell(counter, 2, rows=((1, 6, 1),))
    assert counter.free == 7
    tell(counter, 2, Close(1), Close(2))
    assert counter.free == 10


def test_a_part_of_a_range_keeps_its_range_only() -> None:
    counter = PageCounter(10, SIZE)
    tell(counter, 0, Open(1, (0,), 8, 16), rows=((1, 0, 11),))
    assert counter.free == 9
    assert tell(counter, 1, rows=((1, 11, 30),))
    assert counter.free == 8


def test_pages_are_neither_lost_nor_given_twice() -> None:
    chance = random.Random(3)
    for _ in range(40):
        counter, lengths, number, handle = PageCounter(60, SIZE), dict[int, int](), 0, 0
        for _ in range(120):
            handle += 1
            choice = chance.random()
            if choice < 0.25 or not lengths:
                operation: object = Open(handle, (0,), 0, FAR)
                lengths[handle] = 0
            elif choice < 0.45:
                parent = chance.choice(list(lengths))
                length = chance.randint(0, lengths[parent])
                operation, lengths[handle] = Fork(handle, parent, length), length
            elif choice < 0.6:
                operation = Close(chance.choice(list(lengths)))
                del lengths[operation.handle]
            else:
                grown, count = chance.choice(list(lengths)), chance.randint(1, 9)
                if tell(counter, number, rows=((grown, lengths[grown], count),)):
                    lengths[grown] += count
                continue
            tell(counter, number, operation)
            number += 1
            used = {page for part in counter._parts.values() for page in part.pages}
            assert len(used) + counter.free == 60
            assert all(len(part.pages) == -(-lengths[at] // SIZE) for at, part in counter._parts.items())
        for at in list(lengths):
            tell(counter, number, Close(at))
            number += 1
        assert counter.free == 60
