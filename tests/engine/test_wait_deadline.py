"""How long requests wait: each reason has a deadline of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lamina.engine.failures import WaitDeadline

OTHER = SimpleNamespace(id="a")


def test_lost_model_worker_gets_its_full_wait_while_requests_are_stranded() -> None:
    now = [0.0]
    holders = SimpleNamespace(halted=False, missing=(), empty=False)
    stranded = SimpleNamespace(request=SimpleNamespace(id="b"))
    scheduler = SimpleNamespace(admission=SimpleNamespace(stranded=[stranded], longest_possible=lambda: 1))
    registry = SimpleNamespace(requests={"a": OTHER})
    deadline = WaitDeadline(60.0, *cast(Any, (holders, scheduler, registry)), lambda: now[0])
    assert not deadline.check()  # stranded from now on
    now[0] = 55.0
    holders.halted = True  # a rank goes
    assert not deadline.started
    deadline.start()
    now[0] = 65.0
    assert deadline.left() == pytest.approx(50.0)
    holders.halted = False
    assert deadline.left() == 50.0
    assert deadline.check()  # the sequence that was stranded before has waited long enough


def test_wait_begun_for_a_model_worker_does_not_count_for_requests() -> None:
    now = [0.0]
    holders = SimpleNamespace(halted=False, missing=(), empty=False)
    scheduler = SimpleNamespace(admission=SimpleNamespace(stranded=[], longest_possible=lambda: 1))
    registry = SimpleNamespace(requests={"a": None})
    deadline = WaitDeadline(60.0, *cast(Any, (holders, scheduler, registry)), lambda: now[0])
    deadline.start()  # the ranks lost each other, and all of them live
    assert not deadline.check()
    assert not deadline.started
    assert deadline.left() is None
    now[0] = 100.0
    scheduler.admission.stranded.append("a sequence")
    assert not deadline.check()
    assert deadline.left() == 60.0


@pytest.mark.fault("F02")
def test_engine_is_hopeless_while_no_holder_can_keep_a_token() -> None:
    """/health said 200, though every request waited and then failed: all holders were to go, or had no page."""
    now, room = [0.0], [9]
    holders = SimpleNamespace(halted=False, missing=(), empty=False)
    scheduler = SimpleNamespace(admission=SimpleNamespace(stranded=[], longest_possible=lambda: room[0]))
    registry = SimpleNamespace(requests={"a": OTHER})
    deadline = WaitDeadline(60.0, *cast(Any, (holders, scheduler, registry)), lambda: now[0])
    assert not deadline.check()
    assert deadline.left() is None
    assert not deadline.hopeless
    room[0] = 0
    deadline.left()
    assert deadline.hopeless
    room[0] = 9  # a holder with pages joins
    deadline.check()
    assert not deadline.hopeless
    holders.halted = holders.empty = True  # all holders are to go, and none was lost
    now[0] = 5.0
    deadline.check()
    assert deadline.hopeless
    now[0] = 25.0
    assert deadline.left() == 40.0  # requests do not wait for ever
    holders.halted = holders.empty = False
    deadline.check()
    assert not deadline.hopeless
