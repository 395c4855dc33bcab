"""From timings to a `Device` and `Link`s: pure arithmetic, with few coefficients, each for a physical reason.

A decode step is, as in `simulator.costs.cost_model`,

    step_overhead + rows * row_overhead                                   the engine, from two decode cells
    + dense(rows) / share of the roofline + layers * layer_overhead       the forward pass with attention left out
    + layers * (rows * attention_row_overhead + KV bytes / share)         attention alone
    + announce_time + rows * workers * announce_row_time
    + layers * (round_trip + (workers - 1) * worker_time + rows * workers * row_time) + bytes / bandwidth

where the last two lines are what asking attention workers costs beside attending in the process. Where q goes first it
costs layers * query_first_time more, less what that hides (`Offloaded.lane`). All times are seconds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lamina.errors import EngineError
from lamina.simulator.costs.cost_model import Load, dense_time
from lamina.simulator.costs.hardware import Curve, Device, Efficiency, Link
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import Colocated, Offloaded

DRIFT = 0.15
"""Of the bandwidth, from before a group of measurements until after it: beyond it, the result has a remark."""
BUSY = 0.05
"""Share of the cores that others may use before the result has a remark."""
_LEAST_SHARE, _MOST_SHARE = 1e-3, 1.5  # that a curve may have
_SHORTEST = 1e-12  # seconds that an error is relative to
_STREAMS = 0.5  # of a call's time must be reading, for the call to show its rate of reading


@dataclass(frozen=True, slots=True)
class Cell:
    """A decode step that was measured: of `batch` sequences that read `context` tokens each, in the mean."""

    batch: int
    context: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Drift:
    """Bytes a second that a plain read reached before and after a group of measurements; `busy`: what share of the
    cores others used before it."""

    group: str
    before: float
    after: float
    busy: float = 0.0

    @property
    def change(self) -> float:
        """As a share of the larger of the two."""
        return abs(self.after - self.before) / max(self.before, self.after)


@dataclass(frozen=True, slots=True)
class Timings:
    """What was measured on one device, medians. Keys of `linears` and `forward` are rows, of `attention` (batch,
    context), of `exchange` (workers, rows). `messages`: by channel, seconds by bytes that went there (0: a small
    message); `exchange`: of a step's layers, beyond those of a step that attends in the process; `announce`: until the
    workers have accepted its batch, beyond what that takes in the process; `query_first`: of a step's layers in which q
    goes first, beyond those of one where it does not, by (workers, rows, context)."""

    bandwidth: float
    flops: float
    linears: Mapping[int, float]
    forward: Mapping[int, float]
    attention: Mapping[tuple[int, int], float] = field(default_factory=dict)
    exchange: Mapping[tuple[int, int], float] = field(default_factory=dict)
    announce: Mapping[tuple[int, int], float] = field(default_factory=dict)
    query_first: Mapping[tuple[int, int, int], float] = field(default_factory=dict)
    messages: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    cells: Sequence[Cell] = ()


@dataclass(frozen=True, slots=True)
class Attention:
    """Of one layer: `call` + rows * `row` + bytes / (bandwidth * share)."""

    call: float
    row: float
    curve: Curve


def bare(name: str, kind: str, timings: Timings, memory: float) -> Device:
    """The device at its measured best: the roofline that shares are taken of."""
    return Device(name, kind, flops=timings.flops, memory=memory, bandwidth=timings.bandwidth, price=0.0)


def fit_device(device: Device, model: ModelShape, kv_element: float, timings: Timings) -> Device:
    """The device with all its efficiency. Without `attention` or `cells` what they give stays as it is by default."""
    least = min(timings.forward)
    layer = max(0.0, timings.forward[least] - timings.linears[least]) / model.layers
    dense = fit_dense(device, model, timings.forward, layer)
    efficiency = Efficiency(dense=dense, layer_overhead=layer)
    if timings.attention:
        bytes_of = {cell: kv_bytes(model, *cell, kv_element) for cell in timings.attention}
        attention = fit_attention(timings.attention, bytes_of, device.bandwidth)
        efficiency = replace(
            efficiency,
            layer_overhead=layer + attention.call,
            attention_row_overhead=attention.row,
            attention=attention.curve,
        )
    device = replace(device, efficiency=efficiency)
    if timings.cells:
        step, row = fit_step(Colocated(model=model, device=device, kv_element=kv_element), timings.cells)
        device = replace(device, efficiency=replace(efficiency, step_overhead=step, row_overhead=row))
    return device


def kv_bytes(model: ModelShape, batch: int, context: float, element: float) -> float:
    """Bytes that one layer reads in a step."""
    return batch * model.kv_bytes_read(context, element) / model.layers


def fit_dense(device: Device, model: ModelShape, forward: Mapping[int, float], layer_overhead: float) -> Curve:
    """The share of the roofline that a forward pass without attention reaches, over its rows, once what each layer
    costs whatever its size is taken off."""
    points = []
    for rows, seconds in sorted(forward.items()):
        best = dense_time(model, replace(device, efficiency=Efficiency()), 1, Load(rows, 0.0))
        points.append((float(rows), _share(best, seconds - model.layers * layer_overhead)))
    return tuple(points)


def fit_attention(
    layers: Mapping[tuple[int, int], float], bytes_of: Mapping[tuple[int, int], float], bandwidth: float
) -> Attention:
    """What a call costs by itself and for each row, by least squares, and the share of the bandwidth at which the calls
    read that do little else. The squares are of relative errors, since calls differ a hundredfold."""
    cells = sorted(layers, key=lambda cell: bytes_of[cell])
    terms = [(1.0, float(batch), bytes_of[batch, context]) for batch, context in cells]
    call, row, per_byte = solve(terms, [layers[cell] for cell in cells])
    points: dict[float, list[float]] = {}
    for cell in cells:
        reading = layers[cell] - call - row * cell[0]
        if reading > _STREAMS * layers[cell]:
            points.setdefault(bytes_of[cell], []).append(_share(bytes_of[cell] / bandwidth, reading))
    if not points:  # nothing that was measured reads much
        points[max(bytes_of.values())] = [_share(1.0, per_byte * bandwidth)]
    return Attention(call, row, tuple((x, statistics.median(shares)) for x, shares in sorted(points.items())))


def fit_step(system: Colocated, cells: Sequence[Cell]) -> tuple[float, float]:
    """What a step, and a sequence in it, cost beside the parts of `system`: from cells of unlike batches. Neither is
    below 0: what the parts alone took longer than together stays with them."""
    overheads = [cell.seconds - system.step(Load(cell.batch, cell.context)).seconds for cell in cells]
    step, row = solve([(1.0, float(cell.batch)) for cell in cells], overheads, [cell.seconds for cell in cells])
    return step, row


def fit_links(model: ModelShape, timings: Timings, device: Device) -> tuple[Link, ...]:
    """A link for each channel that messages were measured over. What a layer's exchange costs was measured over the
    local one; another costs as much more as its small messages take longer. `device`: as `fit_device` gives it."""
    local = timings.messages.get("local", {})
    trip, worker, row = fit_exchange(model, timings.exchange, rate_of(local)) if local else (0.0, 0.0, 0.0)
    terms = [(1.0, float(workers * rows)) for workers, rows in timings.announce]
    announce, announce_row = solve(terms, list(timings.announce.values())) if terms else (0.0, 0.0)
    names = {"local": "local-channel", "grpc": "grpc-loopback"}
    links = []
    for channel, by_size in timings.messages.items():
        longer = by_size[0] - local.get(0, 0.0)
        link = Link(
            names.get(channel, channel),
            bandwidth=rate_of(by_size),
            round_trip=max(0.0, trip + longer) or by_size[0],
            worker_time=worker,
            row_time=row,
            announce_time=max(0.0, announce + longer) if timings.announce else 0.0,
            announce_row_time=announce_row,
        )
        if timings.query_first:
            more = fit_query_first(model, device, link, timings.query_first)
            link = replace(link, query_first_time=max(0.0, more + longer / 2))  # a message there
        links.append(link)
    return tuple(links)


def fit_query_first(model: ModelShape, device: Device, link: Link, more: Mapping[tuple[int, int, int], float]) -> float:
    """Of one layer: what it costs to send q first, from how much longer the layers of a step took with it, which is
    that less what it hides. The median of all measurements, and less than 0 where it hides more than it should."""
    costs = []
    for (workers, batch, context), seconds in more.items():
        system = Offloaded(
            model=model,
            model_device=device,
            attention_device=device,
            link=link,
            workers=workers,
            kv_element=model.element,
        )
        hidden = system.lane(Load(batch, context), query_first=True).hidden
        costs.append((seconds + hidden) / model.layers)
    return statistics.median(costs)


def fit_exchange(
    model: ModelShape, exchange: Mapping[tuple[int, int], float], bandwidth: float
) -> tuple[float, float, float]:
    """Of one layer: seconds of the exchange with one worker, of each further one on the machine that they share, and of
    each sequence and worker; the bytes' own time over the link is taken off first."""
    terms, seconds = [], []
    for (workers, rows), measured in sorted(exchange.items()):
        crossing = rows * model.exchange_bytes(model.element) / bandwidth
        terms.append((1.0, float(workers - 1), float(workers * rows)))
        seconds.append((measured - crossing) / model.layers)
    if not terms:
        return 0.0, 0.0, 0.0
    trip, worker, row = solve(terms, seconds)
    return trip, worker, row


def rate_of(messages: Mapping[int, float]) -> float:
    """Bytes a second of large messages: what the largest takes longer than the smallest one that isn't small."""
    sizes = sorted(size for size in messages if size)
    if not sizes:
        raise EngineError("no message with a size was measured")
    small, large = sizes[0] if len(sizes) > 1 else 0, sizes[-1]
    extra = messages[large] - messages[small]
    return (large - small) / extra if extra > 0 else large / messages[large]


def solve(
    terms: Sequence[Sequence[float]], values: Sequence[float], sizes: Sequence[float] | None = None
) -> tuple[float, ...]:
    """The coefficients, none below 0, whose sums over each row of `terms` come nearest to `values`.

    Least squares of errors relative to `sizes` (None: to the values), which counts a short call's error like a long
    one's. A coefficient that would be below 0 is left out, the most negative one first.
    """
    scale = np.array([abs(size) for size in (values if sizes is None else sizes)])
    width = len(terms[0]) if terms else 0
    if not scale.max(initial=0.0) > 0:
        return (0.0,) * width
    scale = np.maximum(scale, max(_SHORTEST, scale.max() * 1e-6))
    rows: npt.NDArray[np.float64] = np.array(terms, np.float64) / scale[:, None]
    targets: npt.NDArray[np.float64] = np.array(values, np.float64) / scale
    columns = [column for column in range(width) if rows[:, column].any()]
    while columns:
        part = rows[:, columns]
        units = np.abs(part).max(axis=0)  # bytes and ones in one matrix
        solution = np.linalg.lstsq(part / units, targets, rcond=None)[0] / units
        if (solution >= 0).all():
            answer: dict[int, float] = dict(zip(columns, solution.tolist(), strict=True))
            return tuple(answer.get(column, 0.0) for column in range(width))
        columns.pop(int((solution * units).argmin()))
    return (0.0,) * width


def _share(best: float, taken: float) -> float:
    share = best / taken if taken > 0 else math.inf
    return min(_MOST_SHARE, max(_LEAST_SHARE, share))
