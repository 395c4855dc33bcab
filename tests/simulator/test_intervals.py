"""How sure a plan's numbers are: the cost model's errors, how they combine, and the intervals that follow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from planning import H100, KNOWN, SLO, STEADY, dop, together
from ranked_candidates import checked, ranked

from lamina.simulator.costs.hardware import ROOFLINE, Efficiency, load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Offloaded, System
from lamina.simulator.costs.uncertainty import Spread, basis, spread
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.planning.candidates import Candidate
from lamina.simulator.planning.intervals import intervals
from lamina.simulator.planning.planner import rank

NAMES = {"tpot", "ttft", "share", "requests_per_second", "tokens_per_second", "batch", "dollars_per_million"}


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
    assert low <= 1 < high


def test_the_event_loop_says_what_becomes_of_slower_and_faster_devices() -> None:
    found = checked(ranked(together(4, H100.measured_or(KNOWN.engines["vllm"]))), share=0.95)
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


HARDWARE = load()
LINK = HARDWARE.link("fhbn-400g")

VLLM, MEASURED = HARDWARE.engines["vllm"], Efficiency(compute=0.5)


def of_model(name: str = "llama-3-70b", efficiency: Efficiency = VLLM) -> Colocated:
    return Colocated(model=model(name), device=replace(HARDWARE.device("h100"), efficiency=efficiency))


def test_a_spread_is_of_whose_efficiency_it_is_and_of_what_model() -> None:
    assert [basis(each) for each in (ROOFLINE, HARDWARE.engines["sglang"], MEASURED)] == [
        "roofline", "engine", "measured",
    ]  # fmt: skip
    names = ("llama-3.1-8b", "qwen3-32b", "mixtral-8x7b", "minicpm3-4b")
    assert [model(name).kind for name in names] == ["small", "dense", "sparse", "sparse"]
    small, dense, experts = (spread(of_model(name)) for name in ("llama-3.1-8b", "llama-3-70b", "qwen3-30b-a3b"))
    assert len({small, dense, experts}) == 3
    assert spread(of_model(efficiency=HARDWARE.engines["sglang"])) == dense  # another engine is planned
    assert spread(of_model(efficiency=ROOFLINE)).tpot[0] == spread(of_model(efficiency=ROOFLINE)).goodput[1] == 1.0


def test_an_engine_s_efficiency_is_less_sure_on_devices_that_nobody_measured_it_on() -> None:
    elsewhere = replace(of_model(), device=replace(HARDWARE.device("h20"), efficiency=VLLM))
    low, high = spread(of_model()).tpot
    assert spread(elsewhere).tpot[0] < low
    assert spread(elsewhere).tpot[1] > high


def test_a_wire_widens_and_two_kinds_of_devices_are_as_unsure_as_the_worse() -> None:
    fast = replace(HARDWARE.device("h100"), efficiency=VLLM)
    known = replace(HARDWARE.device("h20"), efficiency=MEASURED)
    apart = Offloaded(model=model("llama-3-70b"), model_device=fast, attention_device=known, link=LINK)
    alone, split = spread(of_model()), spread(apart)
    for name in ("tpot", "ttft", "goodput"):
        (low, high), (lower, higher) = getattr(alone, name), getattr(split, name)
        assert lower < low <= 1 <= high < higher


def test_errors_of_two_kinds_add_as_squares_do() -> None:
    """Factors of e^-0.3 and e^-0.4 together are e^-0.5; those that are 1 change nothing."""
    a, b = Spread(tpot=(math.exp(-0.3), 2.0)), Spread(tpot=(math.exp(-0.4), 1.0))
    both = a.beside(b)
    assert both.tpot == (pytest.approx(math.exp(-0.5)), pytest.approx(2.0))
    assert both.goodput == (1.0, 1.0)
    assert a.widest(b).tpot == (math.exp(-0.4), 2.0)
