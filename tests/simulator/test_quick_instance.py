"""The quick instance decides as the real scheduler does: the same requests have their tokens at the same seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from drawn_traces import poisson
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planning import H20, H100, SMALL, dop

from lamina.simulator.costs.cost_model import KvPolicy, Load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded
from lamina.simulator.event_loop.instance import Instance, Life, Totals
from lamina.simulator.event_loop.quick_instance import DecodeCosts, QuickInstance, Unusual, is_usual
from lamina.simulator.event_loop.simulate import simulate
from lamina.simulator.traces.arrivals import Arrival, Trace

ONE = Colocated(model=model("llama-3-8b"), device=H100)
NARROW = replace(ONE, device=replace(H100, memory=19.5e9))
"""Room for 11,000 tokens: sequences are preempted."""
OFFLOADED = replace(dop(2, 4, lanes=2), model=ONE.model, batch_tokens=512)
SYSTEMS = (
    ONE, NARROW, OFFLOADED,
    replace(ONE, chunked_prefill=False),
    replace(NARROW, batch_tokens=128, max_sequences=7),
    replace(OFFLOADED, attention_device=replace(H20, memory=4e8)),
    replace(NARROW, policy=KvPolicy("half", 0.5, 0.5)),
    replace(NARROW, policy=KvPolicy("window", window=256)),
    replace(OFFLOADED, attention_count=3, attention_device=replace(H20, memory=3e9)),
)  # fmt: skip

traces = st.lists(st.tuples(st.floats(0, 6), st.integers(1, 3000), st.integers(1, 120)), min_size=1, max_size=20).map(
    lambda rows: Trace("drawn", tuple(Arrival(*row) for row in sorted(rows)))
)


def exact(system: Colocated | Offloaded):  # type: ignore[no-untyped-def]
    """Costs of decode alone, of the very context."""
    return lambda batch, context: system.step(Load(batch, context / batch))


def told(lives: list[Life]) -> list[Life]:
    return sorted(lives, key=lambda life: (life.arrival.at, life.arrival.prompt, life.arrival.output, life.last))


@settings(max_examples=40)
@given(trace=traces, system=st.sampled_from(SYSTEMS), prefill=st.booleans())
@example(Trace("full", tuple(Arrival(0.0, 900, 150) for _ in range(25))), NARROW, True)
@example(Trace("full", tuple(Arrival(0.1 * n, 300 + n, 120) for n in range(40))), NARROW, False)
def test_it_is_the_real_scheduler_but_quicker(trace: Trace, system: Colocated | Offloaded, prefill: bool) -> None:
    real, quick = Totals(), Totals()
    assert is_usual(system, trace, prefix_cache=True)
    expected = told(Instance(system, trace, prefill, False, real).run(lambda done: None))
    try:
        found = told(QuickInstance(system, trace, prefill, quick, costs=exact(system)).run(lambda done: None))
    except Unusual:
        return  # the real one is asked
    assert [life.arrival for life in found] == [life.arrival for life in expected]
    for mine, its in zip(found, expected, strict=True):
        assert (mine.first, mine.last) == pytest.approx((its.first, its.last))
        assert mine.tokens == its.tokens
    assert (quick.steps, quick.preemptions, quick.rejected) == (real.steps, real.preemptions, real.rejected)
    assert (quick.peak, quick.saturated_tokens) == (real.peak, real.saturated_tokens)
    assert quick.busy == pytest.approx(real.busy)
    assert quick.decode_rows == pytest.approx(real.decode_rows)
    assert sum(quick.gaps.values()) == sum(real.gaps.values())
    assert max(quick.gaps, default=0.0) == pytest.approx(max(real.gaps, default=0.0))


def test_remembered_costs_are_those_of_the_cost_model() -> None:
    for system in (ONE, OFFLOADED):
        costs, real = DecodeCosts(system), exact(system)
        for batch in (1, 7, 64, 300):
            for mean in (1, 33, 900, 7000):
                assert tuple(costs(batch, batch * mean)) == pytest.approx(tuple(real(batch, batch * mean)), rel=0.006)


@pytest.mark.parametrize("system", [ONE, NARROW, Disaggregated(prefill=ONE, decode=NARROW, link=OFFLOADED.link)])
def test_a_whole_run_is_the_same(system: Colocated | Disaggregated, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = poisson(rate=6.0, count=80, prompt=700, output=60, seed=3)
    quick = simulate(system, trace, replicas=2)
    monkeypatch.setattr("lamina.simulator.event_loop.simulate.is_usual", lambda *_: False)
    real = simulate(system, trace, replicas=2)
    for name in ("finished", "output_tokens", "prompt_tokens", "requests"):
        assert getattr(quick, name) == getattr(real, name)
    for name in ("mean_batch", "seconds", "model_utilisation", "network_utilisation", "link_bytes", "steps"):
        assert getattr(quick, name) == pytest.approx(getattr(real, name), rel=0.01)
    for name in ("ttft", "tpot", "tbt"):
        assert getattr(quick, name).mean == pytest.approx(getattr(real, name).mean, rel=0.01)


def test_what_it_cannot_decide_it_leaves_to_the_real_scheduler() -> None:
    blocks = (Arrival(0.0, 512, 5, (1,)),)
    assert not is_usual(ONE, Trace("prefixes", blocks), prefix_cache=True)
    assert is_usual(ONE, Trace("prefixes", blocks), prefix_cache=False)
    full = Trace("full", tuple(Arrival(0.0, 900, 30) for _ in range(25)))
    uneven = replace(SYSTEMS[-1], attention_device=replace(H20, memory=9e8))
    for unlike in (replace(NARROW, policy=KvPolicy("window", window=128)), uneven):
        with pytest.raises(Unusual):
            QuickInstance(unlike, full, True, Totals()).run(lambda done: None)
    crowded = Trace("crowded", tuple(Arrival(0.0, 8, 50) for _ in range(40)))
    few = Colocated(model=SMALL, device=H100, batch_tokens=16)
    with pytest.raises(Unusual):
        QuickInstance(few, crowded, True, Totals()).run(lambda done: None)
    assert simulate(few, crowded).finished == 40
