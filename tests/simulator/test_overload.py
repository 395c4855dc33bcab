"""What is said of a system that does not keep the SLO: how many would, or that no number does."""

from __future__ import annotations

import re

import pytest

from lamina.simulator.costs.hardware import load, with_efficiency
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.planning.reasons import MOST, overloads, would_do
from lamina.simulator.traces.arrivals import all_at_once
from lamina.simulator.traces.catalogue import at_rate, trace
from lamina.simulator.traces.demand import demand

SYSTEM = Colocated(model=model("llama-3-70b"), device=with_efficiency(load()).device("h100"), tensor_parallel=4)
SLO = Slo(ttft=2.0, tpot=0.1)
BUSY = at_rate(trace("azure-conv", 300, 0), 20.0)


def test_as_many_as_are_said_to_do_keep_the_slo_in_the_event_loop() -> None:
    (said,) = overloads([SYSTEM], [simulate(SYSTEM, BUSY, slo=SLO)], demand(BUSY), SLO)
    found = re.search(
        r"% within the SLO at 20 requests/s.* By formula (\d+) replicas .*, for \$([\d,.]+) an hour", said
    )
    assert found is not None
    count = int(found[1])
    assert float(found[2]) == pytest.approx(44.24 * count)
    assert simulate(SYSTEM, BUSY, slo=SLO, replicas=count).slo_share >= 0.9


def test_nothing_is_said_where_more_are_no_answer() -> None:
    at_once = all_at_once(BUSY)
    result = simulate(SYSTEM, at_once, slo=SLO)
    assert result.slo_share < 0.9
    assert overloads([SYSTEM], [result], demand(at_once), SLO) == []
    assert overloads([SYSTEM], [result], demand(BUSY), Slo()) == []


def test_no_number_does() -> None:
    assert would_do(SYSTEM, demand(BUSY), Slo(tpot=0.001)).startswith("By formula no number of replicas keeps the SLO")
    assert f"not even {MOST} replicas keep the SLO" in would_do(SYSTEM, demand(BUSY).at_rate(1e6), SLO)
