"""A step's events: what runs where, in which order, and how long a cycle takes once lanes have fallen into step."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.simulator.costs.timeline import (
    ATTENTION,
    LINK_BACK,
    LINK_OUT,
    Event,
    LayerTimes,
    chrome_trace,
    makespan,
    resources,
    step_timeline,
)

SECONDS = st.sampled_from([0.0, 1e-6, 17e-6, 0.25e-3, 1e-3, 3.1e-3])
TIMES = st.tuples(
    *[SECONDS] * 5, st.floats(0, 1), SECONDS
).map(  # kv_seconds are a share of the model's
    lambda drawn: LayerTimes(*drawn[:5], kv_seconds=drawn[5] * drawn[0], latency=drawn[6])
)
CASES = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 7),
        "lanes": st.integers(1, 5),
        "overlap": st.booleans(),
        "replicas": st.integers(1, 4),
        "steps": st.integers(1, 3),
    }
)


def named(events: tuple[Event, ...], name: str) -> dict[tuple[int, int, int], Event]:
    found = {(event.lane, event.step, event.layer): event for event in events if event.name == name}
    assert len(found) == sum(event.name == name for event in events)
    return found


def busy(events: tuple[Event, ...]) -> dict[str, float]:
    """Seconds that each resource works."""
    return {name: math.fsum(e.seconds for e in events if e.resource == name) for name in resources(events)}


@given(TIMES, CASES)
@settings(max_examples=150)
def test_invariants(times: LayerTimes, case: dict[str, int]) -> None:
    events = step_timeline(times, **case)
    layers, lanes, replicas, steps = (case[key] for key in ("layers", "lanes", "replicas", "steps"))
    latency, tiny = times.latency, 1e-12

    for resource in resources(events):  # one thing at a time
        mine = sorted((e.start, e.end) for e in events if e.resource == resource)
        assert all(before[1] <= after[0] + tiny for before, after in pairwise(mine))

    every = {(lane, step, layer) for lane in range(lanes) for step in range(steps) for layer in range(layers)}
    slices, attention, back = (named(events, name) for name in ("slice", "attention", "return"))
    assert slices.keys() == attention.keys() == back.keys() == every
    if case["overlap"]:
        sends, keys = named(events, "send q"), named(events, "send k, v")
        assert sends.keys() == keys.keys() == every
    else:
        sends = keys = named(events, "send q, k, v")
        assert sends.keys() == every
    assert len(events) == len(every) * (5 if case["overlap"] else 4)

    for key in every:
        lane, step, layer = key
        assert slices[key].resource == f"model {(lane + step * layers + layer) % replicas}"
        early = times.kv_seconds if case["overlap"] else 0.0
        assert sends[key].start >= slices[key].end - early - tiny
        assert keys[key].start >= slices[key].end - tiny
        assert attention[key].start >= sends[key].end + latency - tiny
        assert back[key].start >= max(attention[key].end, keys[key].end + latency) - tiny
        after = (lane, step, layer + 1) if layer + 1 < layers else (lane, step + 1, 0)
        if after in every:
            assert slices[after].start >= back[key].end + latency - tiny

    assert all(value <= makespan(events) + tiny for value in busy(events).values())
    assert [e.start for e in events] == sorted(e.start for e in events)


def test_one_lane_is_the_sum_of_its_parts() -> None:
    events = step_timeline(LayerTimes(3e-3, 2e-3, 1e-4, 2e-4, 5e-5, latency=1e-5), layers=7, lanes=1, overlap=False)
    # the last result is on its way when the link has done its work
    assert makespan(events) == pytest.approx(7 * (3e-3 + 2e-3 + 1e-4 + 2e-4 + 5e-5 + 2 * 1e-5) - 1e-5)
    assert busy(events) == pytest.approx(
        {"model 0": 7 * 3e-3, LINK_OUT: 7 * 3e-4, ATTENTION: 7 * 2e-3, LINK_BACK: 7 * 5e-5}
    )


def test_overlap_hides_projecting_and_sending_k_and_v() -> None:
    times = LayerTimes(3e-3, 2e-3, 1e-4, 2e-4, 5e-5, kv_seconds=4e-4)
    hidden = step_timeline(times, 5, 1, overlap=True)
    plain = step_timeline(times, 5, 1, overlap=False)
    assert makespan(plain) - makespan(hidden) == pytest.approx(5 * (4e-4 + 2e-4))
    # attention that is over before k and v have come waits for them
    short = replace(times, attention_seconds=1e-5)
    quick = step_timeline(short, 5, 1, overlap=True)
    assert makespan(quick) == pytest.approx(5 * (3e-3 + 2e-4 + 5e-5))
    assert busy(quick) == pytest.approx(busy(step_timeline(short, 5, 1, overlap=False)))


@pytest.mark.parametrize(("lanes", "replicas"), [(1, 1), (2, 1), (3, 2), (4, 3), (4, 1), (3, 3)])
@pytest.mark.parametrize("attention", [0.1, 1 / 3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("network", [0.0, 0.3])
def test_cycle_in_steady_state(lanes: int, replicas: int, attention: float, network: float) -> None:
    """offload.md 1.7 for one layer: the slowest of the model replicas, of attention, and of a lane's own way."""
    layers, model = 6, 1.0
    times = LayerTimes(model, attention, send_q=network / 3, send_kv=network / 3, receive=network / 3)

    def until(steps: int) -> float:
        return makespan(step_timeline(times, layers, lanes, False, replicas, steps))

    cycle = (until(60) - until(20)) / 40 / layers
    assert cycle == pytest.approx(
        max(lanes * model / replicas, lanes * attention, model + attention + network), rel=0.03
    )


def test_more_time_is_never_faster() -> None:
    base = {"layers": 6, "lanes": 3, "overlap": True, "replicas": 2, "steps": 4}
    times = [1e-3, 5e-4, 1e-4, 1e-4, 1e-4]
    before = makespan(step_timeline(LayerTimes(*times), **base))
    for place in range(5):
        slower = [value * (2 if at == place else 1) for at, value in enumerate(times)]
        assert makespan(step_timeline(LayerTimes(*slower), **base)) >= before


def test_chrome_trace() -> None:
    events = step_timeline(LayerTimes(1e-3, 4e-4, 1e-5, 2e-5, 1e-5), 3, 2, True, replicas=2, steps=2)
    text = chrome_trace(events, 2)
    trace = json.loads(text)
    assert text == chrome_trace(events, 2)
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert tuple(names[row] for row in sorted(names)) == resources(events)
    drawn = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(drawn) == len(events)
    for entry, event in zip(drawn, events, strict=True):
        assert names[entry["tid"]] == event.resource
        assert entry["ts"] == pytest.approx(event.start * 1e6, abs=1e-3)
        assert entry["dur"] == pytest.approx(event.seconds * 1e6, abs=2e-3)
        assert entry["args"] == {"lane": event.lane, "layer": event.layer, "step": event.step}
        assert entry["name"] == f"lane {event.lane}: {event.name}"
    for row in names:
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in drawn if e["tid"] == row)
        assert all(before[1] <= after[0] + 1e-6 for before, after in pairwise(mine))
    assert {e["ph"] for e in trace["traceEvents"]} == {"M", "X"}
    assert trace["otherData"]["makespan (us)"] == pytest.approx(makespan(events) * 1e6, abs=1e-3)


def test_what_is_kept_beside_the_weights_is_attended_there_meanwhile() -> None:
    """Two layers, one lane: 1 ms of dense layers, then 3 ms of attention here beside 2 ms elsewhere, over and over."""
    times = LayerTimes(1e-3, 2e-3, 0, 0, 0, local_seconds=3e-3)
    events = step_timeline(times, 2, 1, overlap=False)
    here = named(events, "attention here")
    assert [event.start for event in here.values()] == pytest.approx([1e-3, 5e-3])
    assert makespan(events) == pytest.approx(2 * (1e-3 + 3e-3))
    shorter = step_timeline(replace(times, local_seconds=1e-3), 2, 1, overlap=False)
    assert makespan(shorter) == pytest.approx(2 * (1e-3 + 2e-3))
