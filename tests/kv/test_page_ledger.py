"""The ledger: pages are counted on the safe side."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import EngineError
from lamina.kv.kv_shares import Pages, Share
from lamina.kv.page_ledger import PageLedger
from lamina.kv.pages import PageGroup
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import Request, ScheduledSequence, SchedulerConfig
from lamina.scheduling.control_plane import ControlPlane, Step
from lamina_protocols.messages.messages import Announced

CONFIG = SchedulerConfig(
    max_batch_tokens=16, max_sequences=8, max_model_len=64, page_size=4, page_groups=((PageGroup(2),),)
)
LAYOUT = (Share(0, (0,), 0, 64),)
HANDLE = 1


def pages(n: int) -> Pages:
    return Pages({(0, 0): n})


class Layouts(Placement):
    """One empty holder, and what waits to be closed."""

    pages = pages(20)
    closing = Pages()

    def __init__(self) -> None:
        pass


def sequence(handle: int, tokens: int) -> ScheduledSequence:
    made = ScheduledSequence(Request("0", (1,) * tokens, 1), 0, 0, [1] * tokens)
    made.handle, made.layout = handle, LAYOUT
    return made


def test_pages_are_taken_when_reserved_and_settled_when_answered() -> None:
    layouts = Layouts()
    ledger = PageLedger(CONFIG, layouts)
    one = sequence(HANDLE, 9)
    assert ledger.affordable(one, 9) == 9
    row = ledger.reserve(one, 9)
    assert (row.start, row.count, row.sample, one.planned) == (0, 9, True, 9)
    assert ledger.room() == pages(20 - 3 * 2)
    plan = ledger.plan([row])
    assert (ledger.awaits(plan), ledger.room()) == (True, pages(14))
    layouts.closing = pages(6)
    assert ledger.room() == pages(20)
    ledger.answered(plan, pages(13))  # the holder took one page more than was counted
    assert (ledger.awaits(plan), ledger.room()) == (False, pages(19))
    layouts.closing = pages(0)
    ledger.update_free(pages(20))
    assert ledger.room() == pages(20)


def test_refused_or_forgotten_plan_takes_no_pages() -> None:
    ledger = PageLedger(CONFIG, Layouts())
    one = sequence(HANDLE, 8)
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
    ledger = PageLedger(CONFIG, Layouts())
    other, one = sequence(HANDLE, 60), sequence(HANDLE, 60)
    ledger.reserve(other, 30)  # 8 of 10 page sets
    assert ledger.affordable(one, 60) == 8
    one.computed = 3
    assert ledger.affordable(one, 60) == 1 + 8
    one.copies = True  # its own page must be copied first
    assert ledger.affordable(one, 60) == 1 + 4


def test_ledger_refuses_calls_out_of_order() -> None:
    ledger = PageLedger(CONFIG, Layouts())
    with pytest.raises(EngineError, match="before it was admitted"):
        ledger.reserve(ScheduledSequence(Request("0", (1,), 1), 0, 0, [1]), 1)
    plan = ledger.plan([])
    ledger.answered(plan, pages(20))
    with pytest.raises(EngineError, match="not waiting for an answer"):
        ledger.answered(plan, pages(20))


@pytest.mark.fault("F29")
@given(st.lists(st.tuples(st.sampled_from(["inquiry", "copy", "fault"]), st.integers(0, 4)), max_size=12))
def test_books_of_an_idle_engine_are_what_the_store_has(events: list[tuple[str, int]]) -> None:
    """A reply to what was announced before a copy, and read after it, was taken for one that has counted the copy."""
    control = ControlPlane(CONFIG, Placement({0: Holder((40,))}, heads=((1,),), page_size=4, max_model_len=64))
    ledger, left, under_way = control.scheduler.ledger, 40, list[tuple[Step | None, bool, int]]()

    def end(step: Step | None, sound: bool, count: int) -> None:
        """The engine reads the answer: to a copy of so many pages, or to an inquiry, when so many were left."""
        if step is None:
            ledger.took(pages(count))
        elif sound:
            step.accepted({0: Announced(1, 1, True, (count,), ())})
        else:
            step.dropped()

    for kind, ends in events:
        if kind == "copy":
            left -= 2
            under_way.append((None, True, 2))
        else:
            under_way.append((control.inquiry((0,)), kind == "inquiry", left))
        if ends < len(under_way):
            end(*under_way.pop(ends))
    for answer in under_way:
        end(*answer)
    while control.has_work:
        step = control.plan()
        assert step is not None
        end(step, True, left)
    assert ledger.free == pages(left)
