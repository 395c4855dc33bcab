"""Candidates with the standing that a test wants, which neither the closed form nor the event loop has seen."""

from __future__ import annotations

from dataclasses import replace

from planning import H20, dop, together

from lamina.simulator.costs.cost_model import KvPolicy
from lamina.simulator.costs.systems import System, price
from lamina.simulator.event_loop.results import Distribution, RunResult
from lamina.simulator.planning.candidates import Candidate
from lamina.simulator.planning.planner import Ranked
from lamina.simulator.steady_state.closed_form import Estimate

RATE = 4.0
SPLIT, WHOLE, SLOW = dop(4, 1), together(4), together(4, H20)
"""$48.87, $44.24 and $18.52 an hour."""
LOSSY = replace(WHOLE, policy=KvPolicy("auto", 0.3))


def ranked(system: System, *, share: float = 1.0, replicas: int = 1, taken: float = RATE, rate: float = RATE) -> Ranked:
    """By formula: it takes `taken` of `rate` requests a second, so much of them in time."""
    found = Estimate(
        replicas=replicas, price=price(system) * replicas, fits=100, most=50, batch=20.0, tpot=0.05, ttft=0.5,
        share=share, taken=taken, capacity=2 * taken, tokens_per_second=200 * taken, demanded=rate,
    )  # fmt: skip
    return Ranked(Candidate(system, replicas), found)


def checked(each: Ranked, share: float = 1.0) -> Ranked:
    """The same after a run of the event loop in which so much was in time."""
    latency = Distribution(0.05, 0.05, 0.06, 0.07)
    result = RunResult(
        system=each.name, model="llama-3-70b", trace="steady", policy="full", requests=100, finished=100,
        prompt_tokens=100_000, output_tokens=20_000, reused_tokens=0, preemptions=0, steps=1000, seconds=25.0,
        price=each.estimate.price, power=0.0, mean_batch=20.0, peak_batch=30, ttft=latency, tpot=latency, tbt=latency,
        goodput=share * 4, slo_share=share, model_utilisation=0.5, attention_utilisation=0.5, network_utilisation=0.0,
        link_bytes=0.0, seed=0,
    )  # fmt: skip
    return replace(each, result=result, rate=each.estimate.taken)
