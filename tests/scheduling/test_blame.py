"""Who is to blame for a failed batch: over the control plane, with requests that make each batch fail."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import World

from lamina.kv.request import PlannedRow, Request, ScheduledSequence
from lamina.scheduling.blame import TRIES, Blame
from lamina.scheduling.control_plane import Step


class Poisoned(World):
    """`poisons`: the position by request id whose token makes its batch fail. `loses`: then all batches under way
    fail, as where a holder dies."""

    def __init__(self, *args: object, loses: bool = False, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.loses = loses
        self.poisons: dict[str, int] = {}
        self.tries: dict[str, int] = {}
        self.ended: list[str] = []
        self.failures = 0

    def poisonous(self, step: Step) -> list[str]:
        """The requests that make a step fail."""
        positions = ((row, self.poisons.get(row.sequence.request.id, -1)) for row in step.rows)
        return [row.sequence.request.id for row, at in positions if row.start <= at < row.start + row.count]

    def compute(self) -> None:
        """The oldest step goes well, or fails."""
        guilty = self.poisonous(self.in_flight[0])
        if not guilty:
            self.finish()
            return
        self.failures += 1
        failed = self.in_flight if self.loses else self.in_flight[:1]
        self.in_flight = self.in_flight[len(failed) :]
        for step in failed:
            for name in self.poisonous(step):
                self.tries[name] = self.tries.get(name, 0) + 1
            step.dropped()
        culprit = self.control.scheduler.blame.failed([row for step in failed for row in step.rows])
        if culprit is not None:
            self.ended.append(culprit.request.id)
            self.control.scheduler.abort(culprit.request.id)

    def work(self, lanes: int, limit: int = 4000) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            begun = len(self.in_flight) < lanes and self.begin()
            if self.in_flight and not begun:
                self.compute()
            elif not begun:
                break
            self.control.scheduler.check_integrity()
        assert not self.control.has_work, "it does not end"


@pytest.mark.fault("F15")
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=8),
    poisons=st.dictionaries(st.integers(0, 7), st.integers(0, 25), max_size=3),
    lanes=st.integers(1, 3),
    loses=st.booleans(),
    pages=st.sampled_from([120, 2000]),
)
@settings(max_examples=150, deadline=None)
def test_only_requests_that_make_batches_fail_end_and_do_so_after_three_tries(
    lengths: list[tuple[int, int]], poisons: dict[int, int], lanes: int, loses: bool, pages: int
) -> None:
    """Failures were counted for all requests together, and anybody's success cleared the count: with two lanes a
    request whose batches fail was never found."""
    world = Poisoned((pages, pages), lanes=lanes, loses=loses)
    for salt, (length, tokens) in enumerate(lengths):
        (sample,) = world.add([100 * salt + at for at in range(length)], tokens)
        if salt in poisons and poisons[salt] < sample.longest:
            world.poisons[sample.request.id] = poisons[salt]
        world.begin()
        if len(world.in_flight) >= lanes:
            world.compute()
    world.work(lanes)
    assert sorted(world.ended) == sorted(world.poisons)
    assert all(tries <= TRIES for tries in world.tries.values())
    world.check_end()


@pytest.mark.parametrize("suspects", [8, 64])
def test_many_suspects_are_cleared_in_few_batches(suspects: int) -> None:
    blame = Blame()
    rows = [row(sequence(number), 10) for number in range(suspects)]
    guilty = rows[-1].sequence
    assert blame.failed(rows) is None
    batches = tried = 0
    while blame:
        batch = [row(each, 10) for each in blame.next_trial([each.sequence for each in rows])]
        batches += 1
        if all(each.sequence is not guilty for each in batch):
            for each in batch:
                blame.passed(each)
            continue
        tried += 1
        if blame.failed(batch) is guilty:
            blame.forget(guilty)
    assert tried == TRIES - 1
    assert batches <= 3 * suspects**0.5


def test_suspect_is_computed_with_all_others_up_to_where_it_failed() -> None:
    blame, suspect = Blame(), sequence(0)
    blame.failed([row(suspect, 10)])
    suspect.computed = 4  # its KV is computed again
    assert blame.in_company(suspect, 20) == 6
    assert not blame.next_trial([suspect])
    blame.passed(row(suspect, 4, 6))
    suspect.computed = 10
    assert blame.in_company(suspect, 1) == 0
    assert blame.next_trial([suspect]) == [suspect]
    assert blame.on_trial([row(suspect, 10)])
    blame.passed(row(suspect, 10))
    assert not blame


def test_own_success_clears_a_request_and_that_of_others_does_not() -> None:
    blame, suspect, other = Blame(), sequence(0), sequence(1)
    for _ in range(TRIES - 1):
        blame.failed([row(suspect, 10)])
    blame.passed(row(other, 10))
    assert blame
    blame.passed(row(suspect, 10))
    for _ in range(TRIES - 1):
        assert blame.failed([row(suspect, 11)]) is None
    assert blame.failed([row(suspect, 11)]) is suspect


def sequence(number: int) -> ScheduledSequence:
    made = ScheduledSequence(Request(str(number), tuple(range(10)), 9), 0, number, list(range(11)))
    made.computed = 10
    return made


def row(suspect: ScheduledSequence, start: int, count: int = 1) -> PlannedRow:
    return PlannedRow(suspect, 1, start, count, sample=True)
