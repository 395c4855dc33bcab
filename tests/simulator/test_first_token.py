"""What a request waits for beside all steps is part of its TTFT, in the event loop and in the closed form alike."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lamina.simulator.costs.hardware import Efficiency, load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.steady_state.closed_form import estimate
from lamina.simulator.traces.arrivals import Arrival, Trace
from lamina.simulator.traces.demand import demand

H100 = load().device("h100")
TRACE = Trace("alike", tuple(Arrival(float(second), 500, 20) for second in range(40)))


def test_a_wait_beside_the_steps_changes_time_to_first_token_alone() -> None:
    """0.2 s a request and 1 ms for each of 500 tokens are 0.7 s."""
    waits = Efficiency(first_token_overhead=0.2, prompt_token_overhead=1e-3)
    quick, slow = (
        Colocated(model=model("llama-3.1-8b"), device=replace(H100, efficiency=each)) for each in (Efficiency(), waits)
    )
    runs = [simulate(each, TRACE, slo=Slo(ttft=0.5)) for each in (quick, slow)]
    assert runs[1].ttft.mean - runs[0].ttft.mean == pytest.approx(0.7)
    assert runs[1].tpot.mean == runs[0].tpot.mean
    assert [run.slo_share for run in runs] == [1.0, 0.0]
    found = [estimate(each, 1, demand(TRACE), Slo(ttft=5.0)) for each in (quick, slow)]
    assert found[1].ttft - found[0].ttft == pytest.approx(0.7)
    assert found[1].ttft == pytest.approx(runs[1].ttft.mean, rel=0.02)
