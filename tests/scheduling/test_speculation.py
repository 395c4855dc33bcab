"""Depth of speculation, by simulation: a machine with a cost for each step, and texts that drafts foresee or not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from lamina.kv.request import Request, ScheduledSequence
from lamina.scheduling.speculation import Speculation, left_to_draft

Cost = Callable[[int, int], float]  # seconds of a step, by rows and tokens
Chance = Callable[[int, int, int], float]  # that a draft is accepted, by step, sequence and position


def _sequence(name: int = 0, prompt: int = 4, max_tokens: int = 1 << 20) -> ScheduledSequence:
    return ScheduledSequence(Request(str(name), (1,) * prompt, max_tokens), 0, name, [1] * prompt)


def _simulate(
    most: int,
    rows: int,
    steps: int,
    cost: Cost,
    chance: Chance,
    seed: int = 1,
    noise: float = 0.05,
    offers: Callable[[int, int], bool] = lambda step, row: True,
    drafting: float = 0.0,
) -> tuple[float, list[float]]:
    """Tokens a second against no drafts at all, and the mean depth of each step."""
    draw, speculation = random.Random(seed), Speculation(most)
    sequences = [_sequence(name) for name in range(rows)]
    spent = gained = 0.0
    depths = []
    for step in range(steps):
        dealt = speculation.depths(sequences)
        proposed = [depth if offers(step, row) else 0 for row, depth in enumerate(dealt)]
        took = drafting * max(dealt)
        tokens = rows + sum(proposed)
        seconds = cost(rows, tokens) * draw.uniform(1 - noise, 1 + noise)
        emitted = rows
        for row, count in enumerate(proposed):
            accepted = 0
            while accepted < count and draw.random() < chance(step, row, accepted):
                accepted += 1
            emitted += accepted
            if count:
                speculation.recorded(sequences[row], count, accepted)
        speculation.took(rows, tokens, emitted, seconds + took, took)
        spent += seconds + took
        gained += emitted / rows * cost(rows, rows)
        depths.append(sum(dealt) / rows)
    return gained / spent, depths


def _flat(rows: int, tokens: int) -> float:
    """Few rows: memory is the limit."""
    return 0.1 + 0.002 * tokens


def _steep(rows: int, tokens: int) -> float:
    """Many rows, or a machine without matrix units: arithmetic is the limit."""
    return 0.02 + 0.01 * tokens


def _jump(rows: int, tokens: int) -> float:
    """Rows of several tokens take another path."""
    return 0.1 + 0.001 * tokens + 0.05 * (tokens > rows)


COSTS = {"flat": _flat, "steep": _steep, "jump": _jump}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.9])
def test_speculation_never_costs_more_than_three_percent(cost: str, rows: int, chance: float) -> None:
    rate, _ = _simulate(8, rows, 300, COSTS[cost], lambda *_: chance)
    assert rate > 0.97


def test_a_batch_that_is_bound_by_arithmetic_is_left_alone() -> None:
    rate, depths = _simulate(4, 64, 100, _steep, lambda *_: 0.5)
    assert rate > 0.97
    assert sum(depths) / len(depths) < 0.1


def _best(most: int, rows: int, cost: Cost, chance: float) -> float:
    """The best gain of any fixed depth."""
    gains = []
    for depth in range(most + 1):
        emitted = sum(chance**position for position in range(depth + 1))
        gains.append(emitted * cost(rows, rows) / cost(rows, rows * (1 + depth)))
    return max(gains)


@pytest.mark.parametrize(
    ("cost", "rows", "chance"),
    [("flat", 1, 0.6), ("flat", 1, 0.95), ("flat", 4, 0.8), ("steep", 1, 0.8), ("jump", 1, 0.8), ("jump", 4, 0.95)],
)
def test_the_depth_is_near_the_best_fixed_one(cost: str, rows: int, chance: float) -> None:
    best = _best(8, rows, COSTS[cost], chance)
    rates = [_simulate(8, rows, 600, COSTS[cost], lambda *_: chance, seed)[0] for seed in range(2)]
    assert sum(rates) / 2 > 1 + 0.8 * (best - 1)


def test_text_that_becomes_foreseeable_is_noticed() -> None:
    rate, depths = _simulate(8, 1, 1200, _flat, lambda step, *_: 0.95 if step >= 600 else 0.0)
    assert rate > 1
    assert sum(depths[300:600]) / 300 < 0.5
    assert sum(depths[900:]) / 300 > 3


def test_text_that_stops_being_foreseeable_is_noticed() -> None:
    _, depths = _simulate(8, 2, 1200, _flat, lambda step, *_: 0.95 if step < 600 else 0.0)
    assert sum(depths[300:600]) / 300 > 3
    assert sum(depths[900:]) / 300 < 0.5


def test_the_foreseeable_sequence_gets_the_drafts() -> None:
    draw, speculation = random.Random(1), Speculation(8)
    one, other = sequences = [_sequence(0), _sequence(1)]
    totals = [0, 0]
    for _ in range(400):
        dealt = speculation.depths(sequences)
        emitted = 2
        for at, (sequence, chance) in enumerate(((one, 0.95), (other, 0.05))):
            totals[at] += dealt[at]
            accepted = 0
            while accepted < dealt[at] and draw.random() < chance:
                accepted += 1
            emitted += accepted
            if dealt[at]:
                speculation.recorded(sequence, dealt[at], accepted)
        speculation.took(2, 2 + sum(dealt), emitted, _flat(2, 2 + sum(dealt)))
    assert totals[0] > 5 * totals[1]


def test_drafts_that_take_longer_than_they_save_are_not_made() -> None:
    slow, _ = _simulate(4, 1, 600, _flat, lambda *_: 0.5, drafting=0.1)
    quick, _ = _simulate(4, 1, 600, _flat, lambda *_: 0.9, drafting=0.005)
    assert slow > 0.97
    assert quick > 1.5


def test_a_prompt_that_drafting_reads_once_does_not_end_speculation() -> None:
    speculation, sequence = Speculation(4), _sequence()
    for step in range(60):
        (depth,) = speculation.depths([sequence])
        caught_up = step > 20
        drafts = depth if caught_up else 0
        if drafts:
            speculation.recorded(sequence, drafts, drafts)
        drafting = 0.01 * depth if caught_up else 0.5 * bool(depth)
        seconds = _flat(1, 1 + drafts) + drafting
        speculation.took(1, 1 + drafts, 1 + drafts, seconds, drafting)
    assert depth == 4


def test_nothing_is_lost_where_nothing_is_proposed() -> None:
    rate, _ = _simulate(4, 1, 300, _steep, lambda *_: 0.0, noise=0.0, offers=lambda *_: False)
    assert rate == pytest.approx(1)


def test_steps_without_drafts_are_measured_again() -> None:
    _, depths = _simulate(4, 1, 600, _flat, lambda *_: 1.0)
    assert depths[-200:].count(0) in range(5, 15)


def test_no_draft_goes_beyond_the_last_token() -> None:
    sequence = _sequence(max_tokens=3)
    assert left_to_draft(sequence) == 2
    sequence.tokens += [5, 5]
    assert left_to_draft(sequence) == 0
    speculation = Speculation(4)
    for _ in range(20):
        assert speculation.depths([sequence]) == [0]
        speculation.took(1, 1, 1, 0.1)


def test_what_becomes_of_drafts_is_counted() -> None:
    speculation, sequence = Speculation(3), _sequence()
    for proposed, accepted in ((3, 3), (3, 1), (2, 0)):
        speculation.recorded(sequence, proposed, accepted)
    counts = speculation.counts
    assert (counts.drafts, counts.draft_tokens, counts.accepted_tokens) == (3, 8, 4)
    assert counts.accepted_at == [2, 1, 1]
    speculation.ended(sequence)
    speculation.ended(sequence)


@pytest.mark.parametrize("most", [0, 17, -1])
def test_the_most_drafts_are_checked(most: int) -> None:
    with pytest.raises(ValueError, match="1 to 16"):
        Speculation(most)


def test_no_sequences_get_no_drafts() -> None:
    empty: Sequence[ScheduledSequence] = ()
    assert Speculation(4).depths(empty) == []


def test_where_nothing_is_measured_the_text_alone_says_how_many_drafts_there_are() -> None:
    speculation, sequence, other = Speculation(8, measured=False), _sequence(), _sequence()
    assert speculation.depths([sequence]) == [2]
    for _ in range(30):
        speculation.recorded(sequence, 8, 8)
        speculation.took(1, 9, 9, 5.0)
    assert speculation.depths([sequence, other]) == [8, 2]
    for _ in range(4):
        speculation.recorded(other, 1, 0)
    assert speculation.depths([sequence, other]) == [8, 0]
    assert 1 in [speculation.depths([other])[0] for _ in range(100)]  # after a while it is tried again
