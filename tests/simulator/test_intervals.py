"""How sure a plan's numbers are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning import H100, KNOWN, SLO, STEADY, dop, together
from ranked_candidates import checked, ranked

from lamina.simulator.costs.systems import System
from lamina.simulator.costs.uncertainty import spread
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.planning.candidates import Candidate
from lamina.simulator.planning.intervals import intervals
from lamina.simulator.planning.planner import rank

NAMES = {
    "tpot", "ttft", "share", "requests_per_second", "tokens_per_second", "batch", "dollars_per_hour",
    "dollars_per_million",
}  # fmt: skip


@pytest.mark.parametrize("system", [together(4), dop(4, 1)])
def test_every_number_has_an_interval_at_least_as_wide_as_the_cost_models_error(system: System) -> None:
    (found,) = rank([Candidate(system, 1)], STEADY, SLO)
    sure = intervals(found, STEADY, SLO)
    assert set(sure) == NAMES
    assert all(each.low <= each.value <= each.high for each in sure.values())
    low, high = spread(system).tpot
    tpot = sure["tpot"]
    assert tpot.value == found.estimate.tpot
    assert tpot.high >= 0.95 * high * tpot.value  # links are as fast as ever
    assert tpot.low <= tpot.value
    assert sure["dollars_per_hour"].low == sure["dollars_per_hour"].high == found.estimate.price
    assert low <= 1 < high


def test_the_event_loop_says_what_becomes_of_slower_and_faster_devices() -> None:
    found = checked(ranked(together(4, H100.measured_or(KNOWN.typical))), share=0.95)
    paces: list[float] = []

    def run(system: System) -> RunResult:
        assert found.result is not None
        pace = system.devices[0][0].bandwidth / found.candidate.system.devices[0][0].bandwidth
        paces.append(pace)
        slower = replace(found.result.tpot, mean=found.result.tpot.mean / pace)
        return replace(found.result, slo_share=0.6 if pace < 1 else 1.0, tpot=slower)

    sure = intervals(found, STEADY, SLO, run=run)
    assert len(paces) == 2
    assert min(paces) < 1 < max(paces)
    share = sure["share"]
    assert (share.low, share.value, share.high) == (0.6, 0.95, 1.0)
    assert sure["requests_per_second"].low == pytest.approx(0.6 * found.rate)
