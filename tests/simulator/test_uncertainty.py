"""Intervals around predicted numbers: whose they are, how they combine, and what they must be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lamina.errors import InvalidRequest
from lamina.simulator.costs.hardware import ROOFLINE, Efficiency, load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Offloaded
from lamina.simulator.costs.uncertainty import Interval, Spread, basis, sparse, spread

HARDWARE = load()
FHBN = HARDWARE.link("fhbn-400g")
MEASURED = Efficiency(compute=0.5)


def together(name: str = "llama-3.1-8b", efficiency: Efficiency = HARDWARE.typical) -> Colocated:
    return Colocated(model=model(name), device=replace(HARDWARE.device("h100"), efficiency=efficiency))


def test_a_spread_is_of_whose_efficiency_it_is_and_of_what_model() -> None:
    assert [basis(each) for each in (ROOFLINE, HARDWARE.engines["sglang"], MEASURED)] == [
        "roofline", "sglang", "measured",
    ]  # fmt: skip
    assert [sparse(model(name)) for name in ("llama-3.1-8b", "mixtral-8x7b", "minicpm3-4b")] == [False, True, True]
    dense, experts = spread(together()), spread(together("qwen3-30b-a3b"))
    assert "vLLM" in dense.source
    assert dense != experts
    assert spread(together(efficiency=ROOFLINE)).tpot[0] == spread(together(efficiency=ROOFLINE)).goodput[1] == 1.0


def test_an_engine_s_efficiency_is_less_sure_on_devices_that_nobody_measured_it_on() -> None:
    elsewhere = replace(together(), device=replace(HARDWARE.device("h20"), efficiency=HARDWARE.typical))
    low, high = spread(together()).tpot
    assert spread(elsewhere).tpot[0] < low
    assert spread(elsewhere).tpot[1] > high
    assert "assumed: kernels" in spread(elsewhere).source
    known = replace(elsewhere, device=replace(HARDWARE.device("h20"), efficiency=MEASURED))
    assert "assumed: kernels" not in spread(known).source


def test_a_wire_widens_and_two_kinds_of_devices_are_as_unsure_as_the_worse() -> None:
    fast = replace(HARDWARE.device("h100"), efficiency=HARDWARE.typical)
    known = replace(HARDWARE.device("h20"), efficiency=MEASURED)
    apart = Offloaded(model=model("llama-3.1-8b"), model_device=fast, attention_device=known, link=FHBN)
    alone, split = spread(together()), spread(apart)
    for name in ("tpot", "ttft", "goodput"):
        (low, high), (lower, higher) = getattr(alone, name), getattr(split, name)
        assert lower < low <= 1 <= high < higher
    assert "KernelFlume" in split.source


def test_errors_of_two_kinds_add_as_squares_do() -> None:
    """Factors of e^-0.3 and e^-0.4 together are e^-0.5; those that are 1 change nothing."""
    a, b = Spread(tpot=(math.exp(-0.3), 2.0)), Spread(tpot=(math.exp(-0.4), 1.0), source="b")
    both = a.beside(b)
    assert both.tpot == (pytest.approx(math.exp(-0.5)), pytest.approx(2.0))
    assert (both.goodput, both.source) == ((1.0, 1.0), "b")
    assert a.widest(b).tpot == (math.exp(-0.4), 2.0)


def test_an_interval_holds_its_number() -> None:
    assert Interval(0.5, 0.5, 1.0).high == 1.0
    for low, value, high in ((2.0, 1.0, 3.0), (0.0, 1.0, 0.5), (math.nan, 1.0, 2.0)):
        with pytest.raises(InvalidRequest, match="allowed is low <= value <= high"):
            Interval(low, value, high)
