"""How long requests wait: each reason has its own time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lamina.patience import Patience


def test_a_model_worker_that_goes_while_some_are_stranded_has_all_its_time() -> None:
    now = [0.0]
    fleet = SimpleNamespace(halted=False, missing=(), empty=False)
    scheduler, clients = SimpleNamespace(stranded=["a sequence"]), SimpleNamespace(tickets={"a": None})
    patience = Patience(60.0, *cast(Any, (fleet, scheduler, clients)), lambda: now[0])
    assert not patience.look()  # stranded from now on
    now[0] = 55.0
    fleet.halted = True  # a rank goes
    assert not patience.tried
    patience.miss()
    now[0] = 65.0
    assert patience.left() == pytest.approx(50.0)
    fleet.halted = False
    patience.came()
    assert patience.left() == 0.0
