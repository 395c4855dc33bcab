"""Lost workers: what is computed again, what redundancy saves, and how long it takes beside what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lamina.errors import InvalidRequest
from lamina.simulator.costs.hardware import load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded
from lamina.simulator.event_loop.failures import REDUNDANCY, Failures, prefill_seconds
from lamina.simulator.event_loop.simulate import simulate
from lamina.simulator.traces.arrivals import Arrival, Trace

HARDWARE = load()
H100, H20 = HARDWARE.device("h100"), HARDWARE.device("h20")
SMALL = model("llama-3-8b")
SYSTEM = Offloaded(
    model=SMALL, model_device=H100, attention_device=H20, attention_count=3, link=HARDWARE.link("fhbn-400g")
)
ALONE = Colocated(model=SMALL, device=H100)
TRACE = Trace("eight", tuple(Arrival(0.0, 2000, 400) for _ in range(8)))
"""As `scripts/bench/recovery.py` has it."""


@pytest.mark.parametrize(("redundancy", "measured"), [("none", 0.98), ("replica", 0.04), ("parity", 0.05)])
def test_a_lost_worker_costs_what_was_measured(redundancy: str, measured: float) -> None:
    """docs/internals/reliability.md: 8 sequences of 2,000 tokens, until each has its next token, in parts of their
    prefill: 0.98 without redundancy, 0.04 with a replica, 0.05 with parity."""
    whole = simulate(SYSTEM, TRACE)
    at = 0.7 * whole.seconds  # all decode
    failures = Failures(at, redundancy, restart=1e-3)
    lost = simulate(SYSTEM, TRACE, failures=failures)
    context = 2000 + round(400 * 0.7)
    prefill = prefill_seconds(failures.reserved(SYSTEM), [context] * 8)
    decode = whole.seconds * REDUNDANCY[redundancy].slower
    assert (lost.losses, lost.finished, lost.output_tokens) == (1, 8, 3200)
    assert (lost.seconds - decode) / prefill == pytest.approx(measured, rel=0.15)
    assert (lost.recomputed_tokens > 8 * 2000) == (redundancy == "none")


def test_losses_come_again_and_again_and_every_request_ends() -> None:
    trace = Trace("t", tuple(Arrival(0.02 * n, 2000, 200) for n in range(16)))
    for system in (SYSTEM, replace(SYSTEM, attention_count=1), ALONE):
        whole, lost = simulate(system, trace), simulate(system, trace, failures=Failures(0.4, restart=0.2))
        assert lost.losses >= 3
        assert lost.finished == 16
        assert lost.output_tokens == whole.output_tokens
        assert lost.recomputed_tokens
        assert lost.seconds > whole.seconds


def test_fewer_hold_less_until_another_one_comes() -> None:
    """Three workers with room for all sequences: the loss of one of them makes some wait."""
    narrow = replace(H20, memory=2.0e9)
    system = replace(SYSTEM, attention_device=narrow)
    room = system.capacity.tokens
    trace = Trace("t", tuple(Arrival(0.0, 400, 200) for _ in range(room // 600)))
    short = simulate(system, trace, failures=Failures(1.5, restart=0.01))
    long = simulate(system, trace, failures=Failures(1.5, restart=60.0))
    assert long.seconds > short.seconds
    assert long.finished == short.finished == len(trace.arrivals)


def test_systems_that_cannot_have_them_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"has 2 attention workers; parity needs 3 at least"):
        simulate(replace(SYSTEM, attention_count=2), TRACE, failures=Failures(5.0, "parity"))
    apart = Disaggregated(prefill=ALONE, decode=ALONE, link=HARDWARE.link("ethernet-100g"))
    with pytest.raises(InvalidRequest, match="whose prompts and decode share devices"):
        simulate(apart, TRACE, failures=Failures(5.0))
