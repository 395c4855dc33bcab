"""Pages taken, shared and given back, and how that is undone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lamina_workers.errors import KVError
from lamina_workers.kv_pages.parts import PagePool


def pool(n_pages: int) -> tuple[PagePool, list[Callable[[], None]]]:
    undo: list[Callable[[], None]] = []
    return PagePool(n_pages, undo), undo


def test_two_takes_give_the_pages_of_one() -> None:
    (one, _), (other, _) = pool(10), pool(10)
    assert [*one.take(3), *one.take(4)] == other.take(7).tolist()
    assert one.free == other.free == 3


def test_a_pool_that_nobody_uses_gives_the_pages_of_a_new_one() -> None:
    """Where pages lay depended on what had run before, and so did the rounding of bfloat16: an idle engine gave one
    request several texts."""
    (used, undo), (new, _) = pool(6), pool(6)
    first, second = used.take(2), used.take(3)
    used.release(second)
    undo.clear()
    used.release(first)
    before = used._stack.tolist()
    assert used.take(4).tolist() == new.take(4).tolist()
    for step in reversed(undo):
        step()
    assert used._stack[: used.free].tolist() == before[:4]
    used.check_integrity(np.array([int(page in first) for page in range(6)], np.int32))


def test_a_page_is_free_once_nobody_has_it() -> None:
    pages, _ = pool(4)
    taken = pages.take(2)
    shares = pages.shares
    pages.share(taken[:1])
    assert pages.shares != shares
    assert pages.shared(taken).tolist() == [True, False]
    pages.release(taken)
    assert pages.free == 3
    pages.release(taken[:1])
    assert pages.free == 4
    pages.check_integrity(np.zeros(4, np.int32))


def test_all_is_taken_back_in_reverse_order() -> None:
    pages, undo = pool(6)
    kept = pages.take(2)
    undo.clear()
    before = pages._stack[: pages.free].tolist(), pages._references.tolist()
    pages.release(kept[:1])
    pages.share(kept[1:])
    pages.leave(kept[1:])
    pages.take(3)
    for step in reversed(undo):
        step()
    assert (pages._stack[: pages.free].tolist(), pages._references.tolist()) == before


@pytest.mark.parametrize("counted", [[1, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]])
def test_wrong_counts_are_found(counted: list[int]) -> None:
    pages, _ = pool(4)
    taken = pages.take(1)
    right = np.zeros(4, np.int32)
    right[taken] = 1
    pages.check_integrity(right)
    wrong = np.roll(np.array(counted, np.int32), int(taken[0]) + 1)
    with pytest.raises(KVError, match="references"):
        pages.check_integrity(wrong)


def test_a_page_that_is_free_twice_is_found() -> None:
    pages, _ = pool(4)
    pages._stack[0] = pages._stack[1]
    with pytest.raises(KVError, match="holds a page twice"):
        pages.check_integrity(np.zeros(4, np.int32))


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(KVError, match="a pool of 0 pages"):
        pool(0)
