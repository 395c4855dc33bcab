"""What share of a device's best an engine reaches, and what comes on top: by a measurement, or fitted to one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from lamina.errors import InvalidRequest
from lamina.simulator.costs.bounds import number_within

Curve = tuple[tuple[float, float], ...]
"""(x, y) by rising x; between two points y goes straight over log x, outside it stays as at the end."""

_MAX_POINTS, _MAX_TEXT = 256, 2000
_SHARE = (1e-6, 1.5)  # above 1 where caches answer what was counted as memory's bytes
_TIME = (0.0, 60.0)
_LIMITS = {
    "compute": (0.0, _SHARE[1]),
    "compute_8bit": (0.0, _SHARE[1]),
    "experts": _SHARE,
    "experts_compute": (0.0, _SHARE[1]),
    "first_token_overhead": _TIME,
    "prompt_token_overhead": _TIME,
    "flops": (1.0, 1e18),
    "flops_8bit": (0.0, 1e18),
    "memory": (1.0, 1e16),
    "bandwidth": (1.0, 1e16),
    "price": (0.0, 1e6),
    "power": (0.0, 1e6),
    "interconnect": (0.0, 1e16),
    "network": (0.0, 1e16),
    "unpack": (0.0, 1e16),
    "round_trip": _TIME,
    "worker_time": _TIME,
    "row_time": _TIME,
    "query_first_time": _TIME,
    "announce_time": _TIME,
    "announce_row_time": _TIME,
    "collective": _SHARE,
    "collective_latency": _TIME,
    "layer_overhead": _TIME,
    "step_overhead": _TIME,
    "row_overhead": _TIME,
    "attention_row_overhead": _TIME,
}


def at(curve: Curve, x: float) -> float:
    """The curve's y at `x`: straight over log x between two of its points, flat outside them."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, low), (x1, high) in pairwise(curve):
        if x < x1:
            return low + (high - low) * math.log(x / x0) / math.log(x1 / x0)
    return curve[-1][1]


def check(entry: Any, where: str) -> None:
    """Raise InvalidRequest unless all numbers of an efficiency, a device or a link are within their limits, and all
    sources are texts about one."""
    names = [item.name for item in fields(entry)]
    for name in names:
        if name in _LIMITS:
            number_within(f"{where}: {name}", getattr(entry, name), *_LIMITS[name])
    if not isinstance(entry.sources, Mapping):
        raise InvalidRequest(f"{where}: sources is {entry.sources!r:.80}; allowed is a table of texts")
    numbers = [name for name in names if name not in ("name", "sources")]
    if unknown := [name for name in entry.sources if name not in numbers]:
        raise InvalidRequest(f"{where}: sources has the key {unknown[0]!r:.80}; allowed are {', '.join(numbers)}")
    for name, text in entry.sources.items():
        if not isinstance(text, str) or len(text) > _MAX_TEXT:
            raise InvalidRequest(
                f"{where}: sources.{name} is {text!r:.80}; allowed is a text of up to {_MAX_TEXT} characters"
            )


def _curve(what: str, points: Any) -> Curve:
    if not isinstance(points, (list, tuple)) or not 1 <= len(points) <= _MAX_POINTS:
        raise InvalidRequest(f"{what} is {points!r:.80}; allowed are 1 to {_MAX_POINTS} points [x, y]")
    curve = []
    for point in points:
        if not isinstance(point, (list, tuple)) or len(point) != 2:
            raise InvalidRequest(f"{what} has the point {point!r:.80}; allowed is [x, y]")
        curve.append(
            (number_within(f"{what}: x", point[0], 1e-6, 1e18), number_within(f"{what}: y", point[1], *_SHARE))
        )
    for (x0, _), (x1, _) in pairwise(curve):
        if x1 <= x0:
            raise InvalidRequest(f"{what} has x = {x1:g} after {x0:g}; allowed are points by rising x")
    return tuple(curve)


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What share of a device's best is reached, and what comes on top. The default is the bare roofline.

    `dense` is over the tokens of a batch, `attention` over the bytes of KV that one layer of one device reads in a
    step; both are shares of the larger of bytes / bandwidth and FLOPs / rate. Times are seconds. `sources` says for
    each number where it is from.
    """

    dense: Curve = ((1.0, 1.0),)
    attention: Curve = ((1.0, 1.0),)
    compute: float = 0.0
    """Share of the FLOPs that matrices reach where FLOPs bound them; `dense` is that of the bandwidth then. 0: `dense`
    is the share of both."""
    compute_8bit: float = 0.0
    """The same for weights of 8 bits. 0: as `compute`."""
    experts: float = 1.0
    """Share of what other matrices reach that experts do where bytes bound them: their kernels work on few tokens each,
    and the busiest device is waited for."""
    experts_compute: float = 0.0
    """The same where FLOPs bound them. 0: as `experts`."""
    collective: float = 1.0
    """Share of the interconnect that an all-reduce reaches."""
    collective_latency: float = 0.0
    """Seconds of one all-reduce beside its bytes."""
    layer_overhead: float = 0.0
    """Seconds a layer and batch: launches, norms, Python."""
    step_overhead: float = 0.0
    """Seconds a batch: scheduling, sampling, the output layer's launch."""
    row_overhead: float = 0.0
    """Seconds a sequence and batch: what the host does for each."""
    attention_row_overhead: float = 0.0
    """Seconds a sequence and layer, of attention."""
    first_token_overhead: float = 0.0
    """Seconds that a request waits for its first token beside all steps: its way in and out. No device is busy then."""
    prompt_token_overhead: float = 0.0
    """The same for each token of its prompt: text becomes tokens."""
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("dense", "attention"):
            object.__setattr__(self, name, _curve(f"efficiency.{name}", getattr(self, name)))
        check(self, "efficiency")

    def of_flops(self, element: float, tokens: float) -> float:
        """The share of a device's FLOPs that matrices with `element` bytes a weight reach."""
        reached = self.compute_8bit if element <= 1 and self.compute_8bit else self.compute
        return reached or at(self.dense, tokens)

    def before_first_token(self, prompt: float) -> float:
        """Seconds that a request with so many tokens waits for its first one beside all steps."""
        return self.first_token_overhead + prompt * self.prompt_token_overhead


ROOFLINE = Efficiency()
