"""What heads keep between looks, against the same in plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from lamina_workers.policies.memory import LayerMemory, Limits, Memories

SIZE, GROUP = 24, 2


class Looks:
    """A layer of two heads whose pages have the masses that a test says; `choose` is what a scan would give."""

    def __init__(self, every: int = 8, missed: float = 0.1, budget: float = 0.9) -> None:
        self.keys = [(7, 0), (9, 1)]
        self.limits = Limits(missed, budget, every)
        self.memories = Memories()
        self.tables = np.arange(2 * SIZE, dtype=np.int32).reshape(2, SIZE) + 100
        self.looks = [0, 0]
        self.memory: LayerMemory

    def step(
        self, masses: np.ndarray, chosen: list[list[int]], held: int, sealed: int | None = None
    ) -> list[list[int]]:
        """masses [items, group, entries]. Returns the pages that each item reads."""
        n = np.full(2, held)
        full = np.full(2, held if sealed is None else sealed)
        self.memory = self.memories.of(self.keys, held, GROUP)
        due = self.memory.due(n)
        logs = np.full((2, GROUP, 32), -np.inf, np.float32)
        logs[:, :, :held] = np.log(masses[:, :, :held])
        entries, counts = np.zeros((2, 32), np.int32), np.array([len(c) for c in chosen])
        missed, tail = np.zeros(2 * GROUP, np.float32), np.zeros(2 * GROUP, np.float32)
        for i, those in enumerate(chosen):
            self.looks[i] += due[i]
            entries[i, : len(those)] = those
            for h in range(GROUP):
                mass = masses[i, h, : full[i]]
                left = 1 - mass[[e for e in those if e < full[i]]].sum() / max(mass.sum(), 1e-9) if len(mass) else 0
                missed[i * GROUP + h] = max(left, 0)
                tail[i * GROUP + h] = np.log(max(left, 1e-9) * max(mass.sum(), 1e-9))
        self.memory.look(self.limits, due, n, full, logs, entries, counts, missed, tail)
        pages, read = self.memory.read(n, self.tables.ctypes.data + np.arange(2) * self.tables.strides[0])
        return [pages[i, :count].tolist() for i, count in enumerate(read)]


def even(*peaks: int) -> np.ndarray:
    """Masses of 2 items: nearly all in those pages."""
    masses = np.full((2, GROUP, SIZE), 1e-4)
    masses[:, :, list(peaks)] = 1.0
    return masses


def test_a_choice_that_stays_right_is_kept_longer_and_longer():
    looks = Looks(every=8)
    masses, looked = even(1, 5), []
    for _ in range(40):
        before = looks.looks[0]
        assert looks.step(masses, [[1, 5, 19], [1, 5, 19]], 20) == [[101, 105, 119], [125, 129, 143]]
        looked.append(looks.looks[0] > before)
    assert [step for step, look in enumerate(looked) if look] == [0, 1, 3, 6, 11, 19, 27, 35]
    assert (looks.memory.missed < 0.01).all()


def test_a_choice_that_has_become_wrong_is_made_anew_in_every_step():
    looks = Looks()
    for step in range(12):
        peak = step % 7
        read = looks.step(even(peak), [[peak, 19], [peak, 19]], 20)
        assert read[0] == [100 + peak, 119]
    assert looks.looks == [12, 12]
    assert looks.memory.missed.max() < 0.01  # of what is read now, not of what was


def test_what_was_missed_before_is_expected_until_the_next_look():
    looks = Looks(missed=0.6)
    masses = even(1, 5)
    looks.step(masses, [[1, 19], [1, 5, 19]], 20)
    looks.step(masses, [[1, 5, 19], [1, 5, 19]], 20)  # the first choice missed a half of it, which the limit allows
    assert looks.memory.missed[0] == pytest.approx([0.5, 0.5], abs=0.01)
    assert looks.memory.missed[1] == pytest.approx([0, 0], abs=0.01)


def test_pages_that_came_since_are_read_and_those_not_full_count_for_nothing():
    looks = Looks()
    masses = even(1, 2)
    looks.step(masses, [[1, 2, 3], [1, 2, 3]], 4, sealed=3)
    looks.step(masses, [[1, 2, 3], [1, 2, 3]], 4, sealed=3)
    assert looks.memory.left.tolist() == [1, 1]
    assert looks.step(masses, [[], []], 7, sealed=6) == [[101, 102, 103, 104, 105, 106], [125, 126, 127, 128, 129, 130]]


def test_a_head_that_needs_most_pages_reads_all():
    looks = Looks(budget=0.5)
    read = looks.step(even(1), [list(range(11)), [1, 19]], 20)
    assert read == [list(range(100, 120)), [125, 143]]
    assert looks.memory.missed[0].tolist() == [0, 0]


def test_a_part_that_was_cut_back_looks_again():
    looks = Looks()
    masses = even(1)
    for _ in range(2):
        looks.step(masses, [[1, 19], [1, 19]], 20)
    assert looks.memory.left.tolist() == [1, 1]
    assert looks.step(masses, [[1, 9], [1, 9]], 10) == [[101, 109], [125, 133]]
    assert looks.looks == [3, 3]


def test_memories_follow_their_keys():
    looks = Looks()
    masses = even(1)
    for _ in range(2):
        looks.step(masses, [[1, 18, 19], [1, 19]], 20)
    before, all_of = looks.memory, looks.memories
    assert all_of.of(looks.keys, 20, GROUP) is before
    other = all_of.of([(4, 0)], 20, GROUP)  # another lane
    assert all_of.of(looks.keys, 20, GROUP) is before
    moved = all_of.of([(9, 1), (5, 0), (7, 0)], 20, GROUP)
    assert moved.lists[:, :2].tolist() == [[1, 19], [0, 0], [1, 18]]
    assert moved.due(np.full(3, 20)).tolist() == [False, True, False]
    assert all_of.of([(4, 0)], 20, GROUP) is other
    assert all_of.of(looks.keys, 20, GROUP) is not before  # given up when the others took over
    larger = all_of.of(looks.keys, 100, GROUP)
    assert larger.lists.shape[1] >= 100
    assert larger.counts.tolist() == [3, 2]


def test_what_is_closed_is_forgotten_and_nothing_else():
    looks = Looks()
    for _ in range(2):
        looks.step(even(1), [[1, 19], [1, 19]], 20)
    looks.memories.forget(7)
    rest = looks.memories.of([(9, 1)], 20, GROUP)
    assert rest.lists[0, :2].tolist() == [1, 19]
    assert looks.memories.of([(7, 0)], 20, GROUP).counts.tolist() == [0]
    looks.memories.forget(9)
    looks.memories.forget(7)
    assert not looks.memories._all


def test_an_item_without_a_full_page_misses_nothing():
    looks = Looks()
    masses = even(1)
    for _ in range(3):
        assert looks.step(masses, [[0], [0]], 1, sealed=0) == [[100], [124]]
    assert (looks.memory.missed == 0).all()
