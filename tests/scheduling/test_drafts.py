"""Rows with drafts: what is planned, what is kept of them, and what they must not cost anybody."""

from __future__ import annotations

import pytest
from scheduler_world import World, config, next_token

from lamina.errors import InvalidRequest
from lamina.kv.request import Request, ScheduledSequence
from lamina.scheduling.scheduler import before_the_end, verified


@pytest.mark.parametrize(
    ("drafts", "sampled", "tokens"),
    [
        ((), (5,), [5]),
        ((5, 6), (5, 6, 7), [5, 6, 7]),
        ((5, 6), (5, 9, 7), [5, 9]),
        ((5, 6), (9, 6, 7), [9]),
        ((5, 6), (5, None, 7), [5]),  # no logits after a draft: the next row finds that again, and its request ends
        ((5, 6), (5, 6, None), [5, 6]),
    ],
)
def test_drafts_are_accepted_up_to_the_first_that_is_not_what_was_sampled(drafts, sampled, tokens) -> None:
    assert verified(drafts, sampled) == tokens


def test_drafts_end_before_a_token_that_ends_the_text() -> None:
    sequence = ScheduledSequence(Request("a", (1,), 9, stop_token_ids=frozenset({7})), 0, 0, [1])
    assert before_the_end(sequence, (5, 7, 6)) == (5,)
    assert before_the_end(sequence, (7, 7)) == ()
    assert before_the_end(sequence, (5, 6)) == (5, 6)


def right(sequence: ScheduledSequence, count: int) -> tuple[int, ...]:
    """The next tokens that the model gives."""
    tokens = list(sequence.tokens)
    for _ in range(count):
        tokens.append(next_token(tokens, sequence.sample))
    return tuple(tokens[len(sequence.tokens) :])


class Asked(World):
    """Drafts are what a test says, as many of a sequence as `depth`."""

    depth = 0

    def propose(self) -> None:
        for sequence in self.scheduler.decoding():
            sequence.drafts = right(sequence, self.depth)


def decoding(world: World, prompts: int = 1, length: int = 3, tokens: int = 12) -> list[ScheduledSequence]:
    """Sequences that have their first token."""
    made = [world.add([10 * at + place for place in range(length)], tokens)[0] for at in range(prompts)]
    while not all(len(sequence.tokens) > length for sequence in made):
        assert world.step()
    return made


def test_row_with_drafts_gives_all_that_are_right_and_one_more() -> None:
    world = Asked(config(max_drafts=4))
    (sequence,) = decoding(world)
    world.depth = 3
    assert world.step()
    assert len(sequence.tokens) == 3 + 1 + 4
    assert sequence.computed == len(sequence.tokens) - 1
    assert sequence.stored == sequence.computed
    world.depth = 9  # more than are allowed, and than are left: of 12 tokens 7 are to come, and the last is no draft
    assert world.step()
    assert [len(row.drafts) for row in world.batches[-1].rows] == [4]
    assert world.step()
    assert [len(row.drafts) for row in world.batches[-1].rows] == [1]
    world.finish()
    world.check_end()


def test_drafts_have_what_prompts_leave_of_a_batch() -> None:
    world = Asked(config(max_batch_tokens=8, max_drafts=4))
    decoding(world, prompts=2, tokens=30)
    world.depth = 4
    assert world.step()
    assert [len(row.drafts) for row in world.batches[-1].rows] == [4, 2]
    world.add([900 + at for at in range(20)], 2)
    assert world.step()
    assert [(row.known, len(row.drafts)) for row in world.batches[-1].rows] == [(1, 0), (1, 0), (6, 0)]
    world.finish()
    world.check_end()


def test_drafts_take_no_page_that_a_sequence_may_need() -> None:
    """Two sequences that fit to their ends, and nothing besides: drafts that are always wrong preempt nobody."""
    limits = config(max_drafts=4, max_model_len=24)
    pages = 2 * limits.pages_for(World(limits).layouts.layout(24), 24)[0, 0]

    class Wrong(Asked):
        def propose(self) -> None:
            super().propose()
            for sequence in self.scheduler.running:
                sequence.drafts = tuple((draft + 1) % 4 for draft in sequence.drafts)

    world = Wrong(limits, pages)
    world.depth = 4
    for at in range(2):
        world.add([10 * at + place for place in range(3)], 21)
    world.finish()
    assert world.scheduler.counters.preempted == 0
    assert sum(len(row.drafts) for plan in world.batches for row in plan.rows) > 10
    assert world.accepted == 0
    world.check_end()


def test_pages_of_rejected_drafts_are_not_counted_twice() -> None:
    world = Asked(config(max_drafts=4))
    (sequence,) = decoding(world, length=3, tokens=20)  # position 3 fills the first page of four tokens
    world.depth = 4
    sequence.drafts = ()
    assert world.step()
    assert len(sequence.tokens) == 9
    world.scheduler.decoding()[0].drafts = tuple((draft + 1) % 4 for draft in right(sequence, 4))
    plan = world.scheduler.plan()
    world.sent.append(world.announcement(plan))
    world.answer()
    world.record()
    assert (len(sequence.tokens), sequence.computed, sequence.stored) == (10, 9, 13)
    before = world.scheduler.ledger.room()
    world.depth = 3  # positions 9 to 12: in pages that the holder has already
    assert world.plan()
    assert world.scheduler.ledger.room() == before
    world.answer()
    world.record()
    world.finish()
    world.check_end()


def test_failed_batch_is_tried_again_without_drafts() -> None:
    world = Asked(config(max_drafts=4))
    sequences = decoding(world, prompts=2, tokens=20)
    world.depth = 4
    assert world.plan()
    assert world.answer()
    rows = world.running[0].rows
    assert all(row.drafts for row in rows)
    world.drop()
    assert world.scheduler.blame.failed(rows) is None
    assert world.step()  # a trial
    assert [row.drafts for row in world.batches[-1].rows] == [()] * len(sequences)
    assert world.step()
    assert all(row.drafts for row in world.batches[-1].rows)
    world.finish()
    world.check_end()


def test_a_most_below_none_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_drafts is -1; allowed is 0 or more"):
        config(max_drafts=-1)
