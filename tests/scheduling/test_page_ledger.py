"""The ledger: operations are numbered once and wait until accepted, and pages are counted on the safe side."""

from __future__ import annotations

import pytest

from lamina.errors import EngineError
from lamina.scheduling.kv_shares import Pages, Share
from lamina.scheduling.page_ledger import PageLedger
from lamina.scheduling.request import (
    CloseSequence,
    ForkSequence,
    OpenSequence,
    PageGroup,
    Request,
    ScheduledSequence,
    SchedulerConfig,
)

CONFIG = SchedulerConfig(
    max_batch_tokens=16, max_sequences=8, max_model_len=64, page_size=4, page_groups=(PageGroup(2),)
)
LAYOUT = (Share(0, (0,), 0, 64),)


def pages(n: int) -> Pages:
    return Pages({0: n})


def sequence(handle: int, tokens: int) -> ScheduledSequence:
    made = ScheduledSequence(Request("0", (1,) * tokens, 1), 0, 0, [1] * tokens)
    made.handle, made.layout = handle, LAYOUT
    return made


def test_operations_wait_until_a_plan_that_carries_them_is_accepted() -> None:
    ledger = PageLedger(CONFIG, pages(20))
    assert (ledger.open(LAYOUT), ledger.fork(1, 0)) == (1, 2)
    first = ledger.plan([])
    ledger.close(1, pages(0))
    second = ledger.plan([])
    assert (first.first, first.operations) == (0, (OpenSequence(1, LAYOUT), ForkSequence(2, 1, 0)))
    assert (second.first, second.operations) == (0, (*first.operations, CloseSequence(1)))
    ledger.answered(first, pages(20))
    assert ledger.operations == list(second.operations)
    ledger.accepted(second, pages(20))
    assert ledger.operations == []
    ledger.check_integrity([2])
    assert (ledger.plan([]).first, ledger.open(LAYOUT)) == (3, 3)


def test_late_answer_undoes_nothing() -> None:
    ledger = PageLedger(CONFIG, pages(20))
    ledger.open(LAYOUT)
    plans = [ledger.plan([]), ledger.plan([])]
    ledger.accepted(plans[1], pages(20))
    ledger.open(LAYOUT)
    ledger.accepted(plans[0], pages(20))
    assert ledger.operations == [OpenSequence(2, LAYOUT)]
    assert ledger.plan([]).first == 1


def test_pages_are_taken_when_reserved_and_settled_when_answered() -> None:
    ledger = PageLedger(CONFIG, pages(20))
    one = sequence(ledger.open(LAYOUT), 9)
    assert ledger.affordable(one, 9) == 9
    row = ledger.reserve(one, 9)
    assert (row.start, row.count, row.sample, one.planned) == (0, 9, True, 9)
    assert ledger.room() == pages(20 - 3 * 2)
    plan = ledger.plan([row])
    assert (ledger.awaits(plan), ledger.room()) == (True, pages(14))
    ledger.close(1, pages(6))
    assert ledger.room() == pages(20)
    ledger.accepted(plan, pages(13))  # the holder took one page more than was counted
    assert (ledger.awaits(plan), ledger.room()) == (False, pages(19))
    ledger.accepted(ledger.plan([]), pages(20))
    assert ledger.room() == pages(20)


def test_refused_or_forgotten_plan_takes_no_pages() -> None:
    ledger = PageLedger(CONFIG, pages(20))
    one = sequence(ledger.open(LAYOUT), 8)
    plan = ledger.plan([ledger.reserve(one, 8)])
    ledger.answered(plan, pages(18))
    assert ledger.room() == pages(18)
    assert not ledger.forget(plan)
    one.planned = 0
    plan = ledger.plan([ledger.reserve(one, 8)])
    assert ledger.room() == pages(14)
    assert ledger.forget(plan)
    assert ledger.room() == pages(18)


def test_affordable_tokens_are_counted_by_the_page() -> None:
    ledger = PageLedger(CONFIG, pages(20))
    other, one = sequence(ledger.open(LAYOUT), 60), sequence(ledger.open(LAYOUT), 60)
    ledger.reserve(other, 30)  # 8 of 10 page sets
    assert ledger.affordable(one, 60) == 8
    one.computed = 3
    assert ledger.affordable(one, 60) == 1 + 8
    one.copies = True  # its own page must be copied first
    assert ledger.affordable(one, 60) == 1 + 4


def test_ledger_refuses_calls_out_of_order() -> None:
    ledger = PageLedger(CONFIG, pages(20))
    with pytest.raises(EngineError, match="before it was admitted"):
        ledger.reserve(ScheduledSequence(Request("0", (1,), 1), 0, 0, [1]), 1)
    plan = ledger.plan([])
    ledger.accepted(plan, pages(20))
    with pytest.raises(EngineError, match="not waiting for an answer"):
        ledger.answered(plan, pages(20))
    ledger.open(LAYOUT)
    with pytest.raises(EngineError, match=r"will have handles \[1\]; in use are \[\]"):
        ledger.check_integrity([])
    with pytest.raises(EngineError, match=r"in use are \[1, 1\]"):
        ledger.check_integrity([1, 1])
    ledger.close(2, pages(0))
    with pytest.raises(EngineError, match="names what is not there"):
        ledger.check_integrity([1])


def test_handles_of_the_previous_engine_are_not_given_again() -> None:
    ledger = PageLedger(CONFIG, pages(20))
    ledger.adopt(3, pages(2))
    ledger.number_from(7)  # the journal names this handle, though it was not adopted
    ledger.number_from(5)
    assert ledger.open(LAYOUT) == 8
