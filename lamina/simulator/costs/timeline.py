"""One decode step layer by layer, as events on the machines that take part: staggered lanes, rotation, overlap.

Pure: seconds in, events out. Each resource does one thing at a time, first come first served. After
Lamina (arXiv 2405.01814v2), "rotational staggered pipelining" and its overlap of attention with sending k and v.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from lamina.errors import InvalidRequest

MAX_SLICES = 200_000
"""Layers times lanes times steps: a bound on the memory of a timeline, at up to five events each."""
LINK_OUT, ATTENTION, LINK_BACK = "link out", "attention", "link back"
_SLICE, _SEND, _SEND_KV, _ATTEND, _RETURN, _LOCAL = range(6)


@dataclass(frozen=True, slots=True)
class Event:
    """Work of `resource` ("model 0" and on, "link out", "attention", "link back") for one layer of one lane, from
    `start` on, in seconds."""

    resource: str
    name: str
    lane: int
    layer: int
    start: float
    seconds: float
    step: int = 0

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds of one layer of one lane. Raises InvalidRequest for a time that is negative or not finite.

    `send_q`, `send_kv` and `receive` occupy the link; `latency`, one way, occupies nothing. `kv_seconds` are the part
    of `model_seconds` that projects k and v, last of all; `local_seconds` come after them on the same device, which
    attends to what is kept beside the weights.
    """

    model_seconds: float
    attention_seconds: float
    send_q: float
    send_kv: float
    receive: float
    kv_seconds: float = 0.0
    latency: float = 0.0
    local_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise InvalidRequest(f"{name} is {value!r}; allowed are seconds of 0 or more")
        if self.kv_seconds > self.model_seconds:
            raise InvalidRequest(
                f"kv_seconds is {self.kv_seconds!r}; allowed are up to the model's seconds a layer, "
                f"{self.model_seconds!r}"
            )


def step_timeline(
    times: LayerTimes, layers: int, lanes: int, overlap: bool, replicas: int = 1, steps: int = 1
) -> tuple[Event, ...]:
    """`steps` decode steps of every lane, by rising start.

    Without `overlap`, q, k and v go as one message when all are ready, and attention waits for it: rows are fused. With
    it q goes first, and attention over the previous tokens starts when q is there. Its result goes back when k and v
    have come too, which is when the model has its own token's share, so nothing waits longer than in the engine, where
    it goes at once.

    Lane j begins j t_m / `replicas` late, and its k-th slice runs on replica (j + k) mod `replicas`: the paper's
    (j + k) mod (n - 1) + 1 counted from 0, where n lanes share n - 1 replicas. k runs on through the steps. What the
    paper calls slice 0 and slice n (before the first attention, after the last) are one slice here, and moving a
    lane's context between replicas is not counted.

    Raises InvalidRequest for a count out of its bounds.
    """
    _check_counts(layers=layers, lanes=lanes, replicas=replicas, steps=steps)
    events: list[Event] = []
    free: dict[str, float] = {}  # when each resource has done what it took on
    arrived: dict[tuple[int, int], float] = {}  # of the two that a lane's result waits for, when the first was done
    # (ready, lane, slice, part). Nothing is ready before what it follows, so they come out in the order of readiness
    waiting = [(lane * times.model_seconds / replicas, lane, 0, _SLICE) for lane in range(lanes)]
    parts = _parts(times, overlap)
    while waiting:
        ready, lane, index, part = heapq.heappop(waiting)
        resource, name, seconds = parts[part]
        if part in (_SLICE, _LOCAL):
            resource = f"model {(lane + index) % replicas}"
        start = max(ready, free.get(resource, 0.0))
        end = free[resource] = start + seconds
        events.append(Event(resource, name, lane, index % layers, start, seconds, index // layers))
        follows: list[tuple[float, int]] = []
        if part == _SLICE and overlap:
            follows = [(max(start, end - times.kv_seconds), _SEND), (end, _SEND_KV)]
        elif part == _SLICE:
            follows = [(end, _SEND)]
        elif part == _SEND:
            follows = [(end + times.latency, _ATTEND)]
        elif part == _RETURN and index + 1 < layers * steps:
            heapq.heappush(waiting, (end + times.latency, lane, index + 1, _SLICE))
        elif part in (_ATTEND, _SEND_KV):
            done = end if part == _ATTEND else end + times.latency
            if not overlap:
                follows = [(done, _RETURN)]
            elif (lane, index) in arrived:
                follows = [(max(done, arrived.pop((lane, index))), _RETURN)]
            else:
                arrived[lane, index] = done
        if part == _SLICE and times.local_seconds:
            follows.append((end, _LOCAL))  # the lane's next slice is ready later, and waits for the device
        for when, following in follows:
            heapq.heappush(waiting, (when, lane, index, following))
    return tuple(sorted(events, key=lambda event: (event.start, event.lane, event.step, event.layer)))


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not 1 <= count <= MAX_SLICES:
            raise InvalidRequest(f"{name} is {count}; allowed are 1 to {MAX_SLICES}")
    layers, lanes, steps = counts["layers"], counts["lanes"], counts["steps"]
    if layers * lanes * steps > MAX_SLICES:
        raise InvalidRequest(
            f"{layers} layers x {lanes} lanes x {steps} steps are {layers * lanes * steps}; allowed are {MAX_SLICES}"
        )


def _parts(times: LayerTimes, overlap: bool) -> dict[int, tuple[str, str, float]]:
    """The resource, the name and the seconds of each part of a layer."""
    sending = ("send q", times.send_q) if overlap else ("send q, k, v", times.send_q + times.send_kv)
    return {
        _SLICE: ("model", "slice", times.model_seconds),
        _LOCAL: ("model", "attention here", times.local_seconds),
        _SEND: (LINK_OUT, *sending),
        _SEND_KV: (LINK_OUT, "send k, v", times.send_kv),
        _ATTEND: (ATTENTION, "attention", times.attention_seconds),
        _RETURN: (LINK_BACK, "return", times.receive),
    }


def makespan(events: Iterable[Event]) -> float:
    """Seconds from the first start to the last end, without the last message's latency; 0 of none."""
    events = tuple(events)
    return max(event.end for event in events) - min(event.start for event in events) if events else 0.0


def resources(events: Iterable[Event]) -> tuple[str, ...]:
    """The resources of these events, in the order of a token's way: model workers by number, out, attention, back."""
    fixed = (LINK_OUT, ATTENTION, LINK_BACK)
    names = {event.resource for event in events}
    models = sorted(names.difference(fixed), key=lambda name: (len(name), name))
    return (*models, *(name for name in fixed if name in names))


def chrome_trace(events: Iterable[Event], lanes: int) -> str:
    """JSON for Perfetto or chrome://tracing: one row a resource, microseconds, names that colour by lane."""
    events = tuple(events)
    rows = {name: row for row, name in enumerate(resources(events))}
    entries: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "decode step"}}
    ]
    for name, row in rows.items():
        entries.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": name}})
        entries.append({"name": "thread_sort_index", "ph": "M", "pid": 0, "tid": row, "args": {"sort_index": row}})
    for event in events:
        start = _microseconds(event.start)
        entries.append(
            {
                "name": f"lane {event.lane}: {event.name}",
                "cat": event.name,
                "ph": "X",
                "pid": 0,
                "tid": rows[event.resource],
                "ts": start,
                "dur": round(_microseconds(event.end) - start, 3),
                "args": {"lane": event.lane, "layer": event.layer, "step": event.step},
            }
        )
    about = {"lanes": lanes, "makespan (us)": _microseconds(makespan(events))}
    return json.dumps({"displayTimeUnit": "ms", "otherData": about, "traceEvents": entries}, allow_nan=False) + "\n"


def _microseconds(seconds: float) -> float:
    """Rounded to nanoseconds, start and end alike, so that neighbouring events still meet."""
    return round(seconds * 1e6, 3)
