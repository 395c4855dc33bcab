"""The scheduler against a plain model of a holder: the right KV in the right place, and every request ends."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import settings
from scheduler_world import Machine, OneHolder, config

from lamina.errors import EngineError
from lamina.kv.kv_shares import Pages
from lamina.kv.request import Request
from lamina.scheduling.scheduler import Scheduler

Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_import_of_the_scheduler_loads_no_torch_and_no_numpy() -> None:
    code = "import sys, lamina.scheduling.scheduler; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_scheduler_refuses_answers_out_of_order() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    scheduler.add(Request("0", (1, 2), 3))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(EngineError, match="before it was accepted"):
        scheduler.record(plan, [1])
    with pytest.raises(EngineError, match="0 floors for 1 rows"):
        scheduler.accepted(plan, Pages({(0, 0): 60}), [])
    scheduler.accepted(plan, Pages({(0, 0): 60}), [0])
    with pytest.raises(EngineError, match="not waiting for an answer"):
        scheduler.accepted(plan, Pages({(0, 0): 60}), [0])
    with pytest.raises(EngineError, match="2 tokens, but the plan samples 1"):
        scheduler.record(plan, [1, 2])
    scheduler.record(plan, [1])
    with pytest.raises(EngineError, match="not in flight"):
        scheduler.record(plan, [1])


TestAnyOrder = Machine.TestCase
