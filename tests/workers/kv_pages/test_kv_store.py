"""The page pool against a plain model of what each part holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Bound, Close, Fork, Open, Row
from lamina_workers.errors import KVError, PoolExhausted, TornParts
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.kv_pages.parts import NO_PAGE, PagePool

SIZE = 16
WINDOW = 20


STREAMING = "streaming(sink=20, recent=40)"


def config(windows=(None, WINDOW), kv_heads=2):
    """Layers with these sliding windows, or of these policies."""
    layers = []
    for i, what in enumerate(windows):
        policies, window = ((what,) * kv_heads, None) if isinstance(what, str) else ((), what)
        layers.append(LayerSpec(i, 4, kv_heads, 16, 16, 0.25, window, policies=policies))
    return HolderConfig(tuple(layers), SIZE, "float32", 0)


class Filled(KVStore):
    """A store whose batches end as they should, at once."""

    def update(self, operations, rows):
        reservation = super().update(operations, rows)
        self.stored(rows)
        return reservation


def store(pages, windows=(None,), kind=Filled):
    made_for = config(windows)
    return kind(made_for, HeadPolicies.of(made_for), pages)


def row(handle, start, count, store=True):
    return Row(handle, start, count, None, store)


def test_parts_without_pages_are_bounded():
    """600,000 parts that were opened and got no page took a worker 360 MB."""
    kv = store(100)
    with pytest.raises(PoolExhausted, match="part 8189 is one too many"):
        kv.update([Open(handle, 0, (0,), 0, 9) for handle in range(1, 9000)], [])
    kv.update([Open(handle, 0, (0,), 0, 9) for handle in range(1, 8189)], [])
    assert kv.free_pages == 100


def test_tables_of_forks_are_bounded():
    """Forks share pages, but each has a table: one announcement made 2 GB of a worker with 256 MB of KV."""
    kv = store(20_000)
    kv.update([Open(1, 0, (0, 1), 0, 1 << 20)], [row(1, 0, 160_000)])
    forks = [Fork(handle, 1, 160_000) for handle in range(2, 1000)]
    for _ in range(3):  # a refusal does not count
        with pytest.raises(PoolExhausted, match="is one too many: 760 others count"):
            kv.update(forks, [])
    kv.update(forks[:700], [])
    kv.update([Close(handle) for handle in range(1, 702)], [])
    assert kv.free_pages == 20_000
    assert kv._tables == 0


def test_a_refused_update_changes_nothing():
    kv = store(6)
    kv.update([Open(1, 0, (0, 1), 0, 1000)], [row(1, 0, 20)])
    before = kv.part(1).table.copy()
    with pytest.raises(PoolExhausted, match="needed"):
        kv.update([Fork(2, 1, 10), Open(3, 0, (0, 1), 0, 1000)], [row(1, 4, 100), row(3, 0, 1)])
    assert (kv.part(1).table == before).all()
    assert kv.part(1).held == 20
    with pytest.raises(KVError, match="no part has handle 2"):
        kv.part(2)
    kv.check_integrity()
    kv.update([Fork(2, 1, 10)], [])


@pytest.mark.parametrize("bound", [False, True])
def test_what_is_cut_back_to_the_edge_of_a_page_keeps_nothing_behind_it(bound):
    kv = store(100)
    kv.update([Open(1, 0, (0, 1), 0, 1000)], [row(1, 0, 40)])
    kv.update([Fork(2, 1, 40)], [])
    if bound:
        kv.update([Bound(2, 16)], [])
        assert (kv.part(2).held, kv.part(2).stored) == (16, 16)
    else:
        kv.update([], [row(2, 16, 1)])
        assert not set(kv.part(2).table[0, :, 1]) & set(kv.part(1).table[0, :, 1])
    assert (kv.part(2).table[:, :, 2 - bound :] == NO_PAGE).all()
    kv.check_integrity()


@pytest.mark.fault("F10")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, 21, 1)], r"can start at \(20,\)"),
        ([Row(1, 20, 1, (0, 22), True)], r"reads \[0, 22\)"),
        ([Row(1, 20, 1, (0, 21), False)], r"reads \[0, 21\)"),
        ([row(9, 0, 1)], "handle 9"),
        ([row(1, 0, 0)], "0 tokens"),
        ([row(1, 20, 1), row(1, 21, 1)], "part 1 has 2 rows"),
        ([Row(1, 20, 1, (0, 20), False), row(1, 5, 1)], "part 1 has 2 rows"),
    ],
)
def test_impossible_rows_are_refused(rows, message):
    kv = store(100)
    kv.update([Open(1, 0, (0, 1), 0, 1000)], [row(1, 0, 20)])
    with pytest.raises(KVError, match=message):
        kv.update([], rows)
    kv.check_integrity()


@pytest.mark.parametrize(
    "operation",
    [Open(1, 0, (0,), 0, 9), Open(2, 0, (0, 0), 0, 9), Open(2, 0, (2,), 0, 9), Open(2, 0, (), 0, 9),
     Open(2, 0, (0,), 9, 9), Fork(2, 1, 21), Fork(2, 7, 0), Fork(1, 1, 4), Close(4), Bound(4, 16), Bound(1, 0),
     Bound(1, 20), Bound(1, 1008)],
)  # fmt: skip
def test_impossible_operations_are_refused(operation):
    kv = store(100)
    kv.update([Open(1, 0, (0, 1), 0, 1000)], [row(1, 0, 20)])
    with pytest.raises(KVError):
        kv.update([operation], [])
    kv.check_integrity()


def test_a_part_stores_nothing_beyond_its_bound():
    """What it keeps there, of a batch that failed or of drafts, is let go; its forks keep theirs."""
    kv = store(100)
    kv.update([Open(1, 0, (0, 1), 0, 1000)], [row(1, 0, 40)])
    kv.update([Fork(2, 1, 40), Bound(1, 32)], [])
    part = kv.part(1)
    assert (part.held, part.stored, part.hi) == (32, 32, 32)
    assert (kv.part(2).held, kv.part(2).hi) == (40, 1000)
    kv.update([Close(2)], [row(1, 30, 10)])
    assert (part.held, kv.free_pages) == (32, 100 - 2 * 2)
    assert kv.slots(row(1, 30, 10)).shape == (1, 2, 2)
    with pytest.raises(PoolExhausted):
        kv.update([Bound(1, 16), Open(3, 0, (0, 1), 0, 3200)], [row(3, 0, 3200)])
    assert (part.held, part.hi, kv.free_pages) == (32, 32, 100 - 2 * 2)
    kv.check_integrity()


@pytest.mark.fault("F10")
def test_pages_behind_a_window_are_freed_and_raise_the_floor():
    kv = store(1000, (None, WINDOW))
    kv.update([Open(1, 0, (0, 1), 0, 1000)], [row(1, 0, 64)])
    free = kv.free_pages
    reservation = kv.update([], [row(1, 64, 1)])
    freed = (64 - WINDOW + 1) // SIZE
    assert kv.free_pages == free + 2 * freed - 2 * 2
    assert reservation.floors == (freed * SIZE + WINDOW - 1,)
    with pytest.raises(TornParts, match=r"start at \(0,\)"):
        kv.update([], [row(1, reservation.floors[0] - 1, 1)])
    kv.update([], [row(1, reservation.floors[0], 1)])
    kv.check_integrity()


def test_a_range_frees_by_positions_of_the_sequence():
    kv = store(1000, (STREAMING,))
    kv.update([Open(1, 0, (0,), 32, 160)], [row(1, 0, 300)])
    reservation = kv.update([], [row(1, 300, 1)])
    kept = (kv.part(1).table[0, 0, :8] != NO_PAGE).tolist()
    assert kept == [False] * 8  # the sinks are elsewhere
    assert reservation.floors == (160 + 40 - 1,)
    kv.check_integrity()


def test_a_part_of_a_range_stores_only_its_own_positions():
    kv = store(100)
    kv.update([Open(1, 0, (1,), 24, 56)], [row(1, 0, 30)])
    assert kv.part(1).held == 30
    assert kv.slots(row(1, 0, 30)).shape == (1, 6, 1)
    kv.update([], [row(1, 30, 40)])
    assert kv.part(1).held == 56
    assert kv.free_pages == 100 - 2


@pytest.mark.parametrize(
    ("length", "held"), [(0, 24), (23, 24), (24, 24), (25, 25), (41, 41), (56, 56), (57, 56), (80, 56)]
)
def test_a_fork_of_a_range_takes_what_lies_in_it(length, held):
    kv = store(100)
    kv.update([Open(1, 0, (0, 1), 24, 56)], [row(1, 0, 80)])
    kv.update([Fork(2, 1, length)], [])
    kv.check_integrity()
    assert kv.part(2).held == held
    used = -(-(held - 24) // SIZE)
    assert kv.part(2).table.shape[2] == used
    assert (kv.part(2).table == kv.part(1).table[:, :, :used]).all()
    kv.update([Close(1)], [row(2, length, 3)])
    kv.check_integrity()


@pytest.mark.parametrize("length", [-1, 41, 56, 80])
def test_a_fork_of_a_range_beyond_what_is_held_is_refused(length):
    kv = store(100)
    kv.update([Open(7, 0, (0, 1), 24, 56)], [row(7, 0, 40)])
    with pytest.raises(KVError, match=f"cannot fork part 7 at {length},"):
        kv.update([Fork(8, 7, length)], [])
    kv.check_integrity()


@pytest.mark.parametrize(("length", "allowed"), [(16, True), (17, False), (82, False), (83, True), (91, True)])
def test_a_fork_of_a_range_has_every_key_that_its_windows_see(length, allowed):
    kv = store(100, (WINDOW,))
    kv.update([Open(1, 0, (0, 1), 16, 56)], [row(1, 0, 90)])
    floor = kv.update([], [row(1, 90, 1)]).floors[0]
    kv.check_integrity()
    assert floor == 83  # the window has left the whole range, whose last page ends at 64
    if allowed:
        kv.update([Fork(2, 1, length)], [])
    else:
        with pytest.raises(KVError, match="cannot fork"):
            kv.update([Fork(2, 1, length)], [])
    kv.check_integrity()


def test_a_fork_has_a_policy_of_its_own_where_it_sees_nothing_that_was_let_go():
    kv = store(1000, (None, WINDOW))
    kv.update([Open(1, 0, (0, 1), 0, 1000), Open(9, 0, (0, 1), 0, 1000, "streaming(sink=4, recent=20)")], [])
    kv.update([], [row(1, 0, 64), row(9, 0, 64)])
    kv.update([], [row(1, 64, 1), row(9, 64, 1)])
    kv.check_integrity()
    for number, policy in enumerate(("streaming(sink=4, recent=20)", "sharded", "full")):
        kv.update([Fork(2 + number, 1, 65, policy)], [])  # what is kept in full serves any
        kv.check_integrity()
        kv.update([], [Row(2 + number, 65, 1, (0, 66), True, chooses=True)])
        kv.check_integrity()
    kv.update([Fork(10, 9, 65, "streaming(sink=4, recent=20)")], [])
    for policy in ("", "full", "streaming(sink=20, recent=20)", "streaming(sink=4, recent=40)"):
        with pytest.raises(KVError, match="cannot fork part 9 at 65 for other policies"):
            kv.update([Fork(11, 9, 65, policy)], [])
        kv.check_integrity()
    kv.update([Open(12, 0, (0, 1), 0, 1000, "streaming(sink=4, recent=20)")], [row(12, 0, 20)])
    kv.update([Fork(13, 12, 17, "full")], [row(13, 17, 9)])  # nothing is gone yet
    kv.check_integrity()


@pytest.mark.parametrize("policy", ["magic", "streaming(sink=-1)", "retrieval", "x" * 1000])
def test_a_part_whose_policy_cannot_be_served_is_refused(policy):
    kv = store(100)
    with pytest.raises(KVError, match="part 1: "):
        kv.update([Open(1, 0, (0, 1), 0, 1000, policy)], [])
    assert not kv.has(1)


def snapshot(kv):
    parts = {handle: (part.held, part.table.tolist(), part.freed.tolist()) for handle, part in kv._parts.items()}
    return parts, kv._pool._stack[: kv.free_pages].tolist(), kv._pool._references.tolist()


def test_an_interrupted_update_changes_nothing():
    def operations():
        yield from (Fork(2, 1, 10), Close(1), Open(3, 0, (0, 1), 0, 1000))
        raise KeyboardInterrupt

    kv = store(100)
    kv.update([Open(1, 0, (0, 1), 0, 1000)], [row(1, 0, 20)])
    before = snapshot(kv)
    with pytest.raises(KeyboardInterrupt):
        kv.update(operations(), [])
    assert snapshot(kv) == before
    kv.check_integrity()


@pytest.mark.fault("F12")
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_update_that_fails_while_it_reserves_changes_nothing(failing):
    class Failing(Filled):
        """Runs out of memory in the `failing`-th part that it extends."""

        calls = 0

        def _extend(self, part, end):
            self.calls += 1
            if self.calls == failing:
                raise MemoryError
            super()._extend(part, end)

    kv = store(100, (None, WINDOW), Failing)
    kv.calls = -3
    kv.update([Open(n, 0, (0, 1), 0, 1000) for n in (1, 2, 3)], [row(1, 0, 50), row(2, 0, 17), row(3, 0, 16)])
    kv.update([Fork(4, 1, 41)], [])
    before = snapshot(kv)
    with pytest.raises(MemoryError):
        kv.update([Close(3), Fork(5, 2, 8)], [row(1, 45, 80), row(2, 16, 1), row(5, 8, 1)])
    assert snapshot(kv) == before
    kv.check_integrity()
    kv.update([Close(3), Fork(5, 2, 8)], [row(1, 45, 80), row(2, 16, 1), row(5, 8, 1)])
    kv.check_integrity()


# The pages themselves: taken, shared and given back.


def page_pool(n_pages: int) -> tuple[PagePool, list[Callable[[], None]]]:
    undo: list[Callable[[], None]] = []
    return PagePool(n_pages, undo), undo


def test_two_takes_give_the_pages_of_one() -> None:
    (one, _), (other, _) = page_pool(10), page_pool(10)
    assert [*one.take(3), *one.take(4)] == other.take(7).tolist()
    assert one.free == other.free == 3


def test_a_pool_that_nobody_uses_gives_the_pages_of_a_new_one() -> None:
    """Where pages lay depended on what had run before, and so did the rounding of bfloat16: an idle engine gave one
    request several texts."""
    (used, undo), (new, _) = page_pool(6), page_pool(6)
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


@pytest.mark.parametrize("counted", [[1, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]])
def test_wrong_counts_are_found(counted: list[int]) -> None:
    pages, _ = page_pool(4)
    taken = pages.take(1)
    right = np.zeros(4, np.int32)
    right[taken] = 1
    pages.check_integrity(right)
    wrong = np.roll(np.array(counted, np.int32), int(taken[0]) + 1)
    with pytest.raises(KVError, match="references"):
        pages.check_integrity(wrong)


def test_a_page_that_is_free_twice_is_found() -> None:
    pages, _ = page_pool(4)
    pages._stack[0] = pages._stack[1]
    with pytest.raises(KVError, match="holds a page twice"):
        pages.check_integrity(np.zeros(4, np.int32))


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(KVError, match="a pool of 0 pages"):
        page_pool(0)


class Pool(RuleBasedStateMachine):
    """Each part's content as a list of unique values, written and read through the tables like real KV."""

    parts = Bundle("parts")

    def __init__(self):
        super().__init__()
        self.kv = store(180, (None, WINDOW, STREAMING))
        self.memory = np.full((180, SIZE), -1)
        self.held: dict[int, list[int]] = {}
        self.his: dict[int, int] = {}
        self.floors: dict[int, int] = {}
        self.handles = 0
        self.values = 0

    def handle(self):
        self.handles += 1
        return self.handles

    @rule(target=parts)
    def open(self):
        handle = self.handle()
        self.kv.update([Open(handle, 0, (0, 1), 0, 512)], [])
        self.held[handle], self.floors[handle], self.his[handle] = [], 0, 512
        return handle

    @rule(target=parts, parent=parts, data=st.data())
    def fork(self, parent, data):
        length = data.draw(st.integers(self.floors[parent], len(self.held[parent])))
        handle = self.handle()
        self.kv.update([Fork(handle, parent, length)], [])
        self.held[handle], self.floors[handle] = self.held[parent][:length], self.floors[parent]
        self.his[handle] = self.his[parent]
        return handle

    @rule(handle=consumes(parts))
    def close(self, handle):
        self.kv.update([Close(handle)], [])
        del self.held[handle], self.floors[handle]

    @rule(handle=parts, data=st.data())
    def bound(self, handle, data):
        hi, size = self.his[handle], len(self.held[handle])
        least = -(-max(1, min(size, self.floors[handle])) // SIZE)
        if least * SIZE < hi:
            at = data.draw(st.integers(least, hi // SIZE)) * SIZE
            self.kv.update([Bound(handle, at)], [])
            del self.held[handle][at:]
            self.his[handle] = at

    @rule(handles=st.lists(parts, min_size=1, max_size=3, unique=True), data=st.data())
    def write(self, handles, data):
        rows = []
        for handle in handles:
            start = data.draw(st.integers(self.floors[handle], len(self.held[handle])))
            rows.append(row(handle, start, data.draw(st.integers(1, 60))))
        before = self.kv.free_pages
        try:
            reservation = self.kv.update([], rows)
        except PoolExhausted:
            assert self.kv.free_pages == before
            return
        self.memory[reservation.copies_to] = self.memory[reservation.copies_from]
        for written, floor in zip(rows, reservation.floors, strict=True):
            self.values += written.count
            values = list(range(self.values - written.count, self.values))
            values = values[: max(0, self.his[written.handle] - written.start)]
            self.held[written.handle][written.start :] = values
            self.floors[written.handle] = floor
            slots = self.kv.slots(written)
            self.memory.reshape(-1)[slots] = np.array(values)[None, :, None]

    @invariant()
    def holds_what_was_written(self):
        self.kv.check_integrity()
        for handle, values in self.held.items():
            part = self.kv.part(handle)
            assert part.held == len(values)
            assert (part.table[0] != NO_PAGE).sum() == 2 * -(-len(values) // SIZE)
            if not values:
                continue
            floor, positions = self.floors[handle], np.arange(len(values))
            streaming = (positions > floor - 40) | (positions < 20)
            for layer, seen in enumerate((positions >= 0, positions > floor - WINDOW, streaming)):
                positions = np.flatnonzero(seen)
                pages = part.table[layer][:, positions // SIZE]
                assert (pages != NO_PAGE).all()
                assert (self.memory[pages, positions % SIZE] == np.array(values)[positions]).all()

    def teardown(self):
        self.kv.update([Close(handle) for handle in self.held], [])
        assert self.kv.free_pages == 180
        self.kv.check_integrity()


TestPool = Pool.TestCase
TestPool.settings = settings(  # rules often do not apply to the parts that there are
    max_examples=60, stateful_step_count=40, suppress_health_check=[HealthCheck.filter_too_much]
)
