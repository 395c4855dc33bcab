"""What heads keep between full scans, against the same in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina_kernels.partial import Partial
from lamina_kernels.sketches.items import Choice
from lamina_workers.policies.memory import LayerMemory, Memories, limits

SIZE, GROUP = 24, 2
NO_VALUES = torch.empty(2 * GROUP, 0)


class Layer:
    """A layer of two heads whose pages have the masses that a test says; `choose` is what a scan would give."""

    def __init__(self, every: int = 8, missed: float = 0.1, budget: float = 0.9) -> None:
        self.keys = [(7, 0), (9, 1)]
        self.limits = limits(missed, budget, every)
        self.memories = Memories()
        self.tables = np.arange(2 * SIZE, dtype=np.int32).reshape(2, SIZE) + 100
        self.scans = [0, 0]
        self.memory: LayerMemory

    def step(
        self, masses: np.ndarray, chosen: list[list[int]], held: int, sealed: int | None = None
    ) -> list[list[int]]:
        """masses [items, group, entries]. Returns the pages that each item reads."""
        n = np.full(2, held)
        full = np.full(2, held if sealed is None else sealed)
        self.memory = self.memories.of(self.keys, held, GROUP)
        due = self.memory.begin(n, full)
        logs = np.full((2, GROUP, 32), -np.inf, np.float32)
        logs[:, :, :held] = np.log(masses[:, :, :held])
        entries, counts = np.zeros((2, 32), np.int32), np.array([len(c) for c in chosen])
        missed, tail = np.zeros(2 * GROUP, np.float32), np.zeros(2 * GROUP, np.float32)
        for i, those in enumerate(chosen):
            self.scans[i] += due[i]
            entries[i, : len(those)] = those
            for h in range(GROUP):
                mass = masses[i, h, : full[i]]
                left = 1 - mass[[e for e in those if e < full[i]]].sum() / max(mass.sum(), 1e-9) if len(mass) else 0
                missed[i * GROUP + h] = max(left, 0)
                tail[i * GROUP + h] = np.log(max(left, 1e-9) * max(mass.sum(), 1e-9))
        scanned = (
            *map(torch.from_numpy, (logs, entries, entries, counts, missed)),
            Partial(NO_VALUES, torch.from_numpy(tail)),
        )
        self.memory.full_scan(self.limits, Choice(*scanned))
        pages, read = self.memory.read(self.tables.ctypes.data + np.arange(2) * self.tables.strides[0])
        return [pages[i, :count].tolist() for i, count in enumerate(read)]


def even(*peaks: int) -> np.ndarray:
    """Masses of 2 items: nearly all in those pages."""
    masses = np.full((2, GROUP, SIZE), 1e-4)
    masses[:, :, list(peaks)] = 1.0
    return masses


def test_a_choice_that_stays_right_is_kept_longer_and_longer():
    layer = Layer(every=8)
    masses, scanned = even(1, 5), []
    for _ in range(40):
        before = layer.scans[0]
        assert layer.step(masses, [[1, 5, 19], [1, 5, 19]], 20) == [[101, 105, 119], [125, 129, 143]]
        scanned.append(layer.scans[0] > before)
    assert [step for step, full in enumerate(scanned) if full] == [0, 1, 3, 6, 11, 19, 27, 35]
    assert (layer.memory.missed < 0.01).all()


def test_a_choice_that_has_become_wrong_is_made_anew_in_every_step():
    layer = Layer()
    for step in range(12):
        peak = step % 7
        read = layer.step(even(peak), [[peak, 19], [peak, 19]], 20)
        assert read[0] == [100 + peak, 119]
    assert layer.scans == [12, 12]
    assert layer.memory.missed.max() < 0.01  # of what is read now, not of what was


def test_what_was_missed_before_is_expected_until_the_next_full_scan():
    layer = Layer(missed=0.6)
    masses = even(1, 5)
    layer.step(masses, [[1, 19], [1, 5, 19]], 20)
    layer.step(masses, [[1, 5, 19], [1, 5, 19]], 20)  # the first choice missed a half of it, which the limit allows
    assert layer.memory.missed[0] == pytest.approx([0.5, 0.5], abs=0.01)
    assert layer.memory.missed[1] == pytest.approx([0, 0], abs=0.01)


def test_pages_that_came_since_are_read_and_those_not_full_count_for_nothing():
    layer = Layer()
    masses = even(1, 2)
    layer.step(masses, [[1, 2, 3], [1, 2, 3]], 4, sealed=3)
    layer.step(masses, [[1, 2, 3], [1, 2, 3]], 4, sealed=3)
    assert layer.memory.heads["left"].tolist() == [1, 1]
    assert layer.step(masses, [[], []], 7, sealed=6) == [[101, 102, 103, 104, 105, 106], [125, 126, 127, 128, 129, 130]]


def test_a_head_that_needs_most_pages_reads_all():
    layer = Layer(budget=0.5)
    read = layer.step(even(1), [list(range(11)), [1, 19]], 20)
    assert read == [list(range(100, 120)), [125, 143]]
    assert layer.memory.missed[0].tolist() == [0, 0]


def test_a_part_that_was_cut_back_is_scanned_again():
    layer = Layer()
    masses = even(1)
    for _ in range(2):
        layer.step(masses, [[1, 19], [1, 19]], 20)
    assert layer.memory.heads["left"].tolist() == [1, 1]
    assert layer.step(masses, [[1, 9], [1, 9]], 10) == [[101, 109], [125, 133]]
    assert layer.scans == [3, 3]


def test_memories_follow_their_keys():
    layer = Layer()
    masses = even(1)
    for _ in range(2):
        layer.step(masses, [[1, 18, 19], [1, 19]], 20)
    before, all_of = layer.memory, layer.memories
    assert all_of.of(layer.keys, 20, GROUP) is before
    other = all_of.of([(4, 0)], 20, GROUP)  # another lane
    assert all_of.of(layer.keys, 20, GROUP) is before
    moved = all_of.of([(9, 1), (5, 0), (7, 0)], 20, GROUP)
    assert moved.lists[:, :2].tolist() == [[1, 19], [0, 0], [1, 18]]
    assert moved.begin(np.full(3, 20), np.full(3, 20)).tolist() == [False, True, False]
    assert all_of.of([(4, 0)], 20, GROUP) is other
    assert all_of.of(layer.keys, 20, GROUP) is not before  # given up when the others took over
    larger = all_of.of(layer.keys, 100, GROUP)
    assert larger.lists.shape[1] >= 100
    assert larger.heads["chosen"].tolist() == [3, 2]


def test_what_is_closed_is_forgotten_and_nothing_else():
    layer = Layer()
    for _ in range(2):
        layer.step(even(1), [[1, 19], [1, 19]], 20)
    layer.memories.forget(7)
    rest = layer.memories.of([(9, 1)], 20, GROUP)
    assert rest.lists[0, :2].tolist() == [1, 19]
    assert layer.memories.of([(7, 0)], 20, GROUP).heads["chosen"].tolist() == [0]
    layer.memories.forget(9)
    layer.memories.forget(7)
    assert not layer.memories._all


def test_an_item_without_a_full_page_misses_nothing():
    layer = Layer()
    masses = even(1)
    for _ in range(3):
        assert layer.step(masses, [[0], [0]], 1, sealed=0) == [[100], [124]]
    assert (layer.memory.missed == 0).all()
