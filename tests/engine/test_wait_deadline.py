"""How long requests wait: each reason has a deadline of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lamina.engine.failures import WaitDeadline

OTHER = SimpleNamespace(request=SimpleNamespace(id="a"))


def test_lost_model_worker_gets_its_full_wait_while_requests_are_stranded() -> None:
    now = [0.0]
    fleet = SimpleNamespace(halted=False, missing=(), empty=False)
    stranded = SimpleNamespace(request=SimpleNamespace(id="b"))
    scheduler, clients = SimpleNamespace(stranded=[stranded]), SimpleNamespace(tickets={"a": OTHER})
    patience = WaitDeadline(60.0, *cast(Any, (fleet, scheduler, clients)), lambda: now[0])
    assert not patience.look()  # stranded from now on
    now[0] = 55.0
    fleet.halted = True  # a rank goes
    assert not patience.halted
    patience.miss()
    now[0] = 65.0
    assert patience.left() == pytest.approx(50.0)
    fleet.halted = False
    assert patience.left() == 50.0
    assert patience.look()  # the sequence that was stranded before has waited long enough


def test_wait_begun_for_a_model_worker_does_not_count_for_requests() -> None:
    now = [0.0]
    fleet = SimpleNamespace(halted=False, missing=(), empty=False)
    scheduler, clients = SimpleNamespace(stranded=[]), SimpleNamespace(tickets={"a": None})
    patience = WaitDeadline(60.0, *cast(Any, (fleet, scheduler, clients)), lambda: now[0])
    patience.miss()  # the ranks lost each other, and all of them live
    assert not patience.look()
    assert not patience.halted
    assert patience.left() is None
    now[0] = 100.0
    scheduler.stranded.append("a sequence")
    assert not patience.look()
    assert patience.left() == 60.0
