"""Fleets that grow and shrink: nothing is lost, what is asked for is paid for, and weightless workers cost less."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulate.elastic_fleet import Scaling, simulate_elastic

from lamina.simulator.costs.hardware import load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Offloaded
from lamina.simulator.traces.arrivals import Arrival, Trace

HARDWARE = load()
DEVICE = replace(HARDWARE.device("h100"), memory=24e9)
"""Room for 5.5 GB of KV beside the small model's weights, and for 21.6 GB without."""
SMALL = model("llama-3-8b")
INSTANCE = Colocated(model=SMALL, device=DEVICE)
WORKER = Offloaded(model=SMALL, model_device=DEVICE, attention_device=DEVICE, link=HARDWARE.link("fhbn-400g"))
_TIMES = (0.0, 1.0, *(5.0,) * 22)
BURST = Trace("burst", tuple(Arrival(at, 8000, 300 + n) for n, at in enumerate(_TIMES)))
SCALING = Scaling(start=0.5, patience=1.0, every=0.25)


@pytest.mark.parametrize("system", [INSTANCE, WORKER])
def test_a_burst_is_served_by_more_and_paid_for_as_long_as_they_are_there(system: Colocated | Offloaded) -> None:
    found = simulate_elastic(system, BURST, SCALING)
    assert found.finished == len(BURST.arrivals)
    assert found.output_tokens == sum(arrival.output for arrival in BURST.arrivals)
    assert found.started >= found.peak_units - 1 >= 1
    assert 1 < found.mean_units < found.peak_units
    assert found.dollars == pytest.approx(
        DEVICE.price * (found.mean_units + isinstance(system, Offloaded)) * found.seconds / 3600
    )
    kept = simulate_elastic(system, BURST, replace(SCALING, most=1))
    assert (kept.peak_units, kept.started, kept.mean_units) == (1, 0, 1.0)
    assert kept.ttft.p99 > found.ttft.p99


def test_a_later_start_is_waited_for() -> None:
    soon, late = (simulate_elastic(INSTANCE, BURST, replace(SCALING, start=start)) for start in (0.1, 6.0))
    assert late.ttft.p99 > soon.ttft.p99


def test_a_worker_without_weights_has_room_for_more_than_an_instance() -> None:
    instances, workers = (simulate_elastic(system, BURST, SCALING) for system in (INSTANCE, WORKER))
    assert workers.peak_units < instances.peak_units


def test_what_a_first_token_waits_for_beside_all_steps_is_in_its_time() -> None:
    slow = replace(DEVICE, efficiency=replace(DEVICE.efficiency, first_token_overhead=0.5))
    for system, slower in ((INSTANCE, replace(INSTANCE, device=slow)), (WORKER, replace(WORKER, model_device=slow))):
        quick, late = (simulate_elastic(each, BURST, SCALING) for each in (system, slower))
        assert late.ttft.p50 == pytest.approx(quick.ttft.p50 + 0.5)
        assert late.seconds == quick.seconds
