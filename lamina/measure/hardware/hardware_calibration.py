"""One calibration of this machine, from the first measurement to the file. `fitting` does the arithmetic, the children
measure.

Everything is measured once a round, and the medians over all rounds count, so that a slow minute of the machine meets
all of it. Its bandwidth is read before and after each group of a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from lamina.measure.hardware.busy import busy
from lamina.measure.hardware.child import Child
from lamina.measure.hardware.fitting import BUSY, DRIFT, Cell, Drift, Timings, bare, fit_device, fit_links
from lamina.models.resolve import resolve
from lamina.simulator.costs import hardware
from lamina.simulator.costs.bounds import whole
from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.model_configs import from_folder
from lamina.simulator.costs.shapes import ModelShape
from lamina.system.progress import Progress

NAME, GPU_NAME = "this-machine", "this-gpu"
FITTED = ((1, 64), (16, 64))
"""(batch, context) of the decode cells, in one process, that `step_overhead` and `row_overhead` are fitted to."""
CHANNELS = ("local", "grpc")
BYTES = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0}
"""Of an element, by dtype."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is measured. Pairs are (batch, context); `times`, `steps` and `messages` are for each of `rounds`."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
    attention: tuple[tuple[int, int], ...] = (
        (1, 32),
        (4, 32),
        (16, 32),
        (1, 512),
        (8, 256),
        (16, 256),
        (1, 4096),
        (4, 1024),
        (16, 512),
        (4, 4096),
    )
    exchange: tuple[tuple[int, int], ...] = ((1, 64), (4, 64), (16, 64))
    workers: tuple[int, ...] = (1, 2)
    sizes: tuple[int, ...] = (1 << 16, 1 << 20, 1 << 23)
    fitted: tuple[tuple[int, int], ...] = FITTED
    times: int = 3
    steps: int = 8
    rounds: int = 5
    messages: int = 20
    tokens: int = 32
    quick: bool = False


FULL = Amount()
QUICK = Amount(
    rows=(1, 8),
    attention=((1, 32), (4, 32), (4, 256)),
    exchange=((1, 32), (4, 32)),
    workers=(1,),
    sizes=(1 << 12, 1 << 16),
    fitted=((1, 32), (4, 32)),
    times=1, steps=2, rounds=2, messages=3, tokens=12, quick=True,
)  # fmt: skip
"""To see that everything runs; its numbers say little."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured, as the simulator takes it. `about`: of what and when; `fitted`: the decode cells that two of
    the numbers come from; `drifts`: how steady the machine was; `raw`: the other inputs of the fits, in words. Of the
    `wanted` rounds `rounds` were measured."""

    devices: tuple[Device, ...]
    links: tuple[Link, ...]
    about: str
    model: str
    fitted: tuple[Cell, ...]
    drifts: tuple[Drift, ...]
    raw: tuple[str, ...]
    rounds: int
    wanted: int

    @property
    def remarks(self) -> tuple[str, ...]:
        """What may make the numbers wrong, one sentence each."""
        cut = (f"it was cut after {self.rounds} of {self.wanted} rounds",) if self.rounds < self.wanted else ()
        return (*cut, *remarks_on(self.drifts))

    def dumps(self) -> str:
        """TOML that `hardware.load` reads; what was measured stands before it, as remarks."""
        cells = "; ".join(f"{c.batch}x{c.context:.0f} {c.seconds * 1e3:.2f} ms" for c in self.fitted)
        rates = "; ".join(f"{d.group} {d.before / 1e9:.1f} {d.after / 1e9:.1f}" for d in self.drifts)
        head = [
            f"Measured with the shapes of {self.model}: {self.about}.",
            *(f"Beware: {remark}." for remark in self.remarks),
            f"step_overhead and row_overhead are fitted to these decode cells, in one process: {cells}.",
            *self.raw,
            f"Bandwidth before and after, GB/s: {rates}.",
        ]
        lines = [f"# {' '.join(line.split())}" for line in head]  # names of processors may have line breaks
        return "\n".join([*lines, "", hardware.dumps(self.devices, self.links)])


def calibrate(
    model: str,
    progress: Progress | None = None,
    quick: bool = False,
    *,
    date: str = "",
    price: float = 0.0,
    power: float = 0.0,
    amount: Amount | None = None,
    keep: Callable[[Calibration], None] | None = None,
) -> Calibration:
    """Measure this machine with the shapes of `model`, in about a minute; it should have nothing else to do.

    `date` is for the sources; `price` (dollars an hour) and `power` (watts) can't be measured and are taken as given.
    `quick` only sees whether everything runs. `keep` gets what there is after each round, so that nothing is lost where
    this is cut. The model is loaded three times, by processes that measure in turn. Raises what `LLM` raises for a
    model, InvalidRequest for a negative price or a model without layers, EngineError where something fails.
    """
    amount = amount or (QUICK if quick else FULL)
    Device(NAME, "cpu", 1.0, 1.0, 1.0, price=price, power=power)  # raises for wrong values before anything is measured
    folder = str(resolve(model, progress))
    shape = from_folder(folder)
    whole("layers of the model", shape.layers, 1, 1 << 16)
    cells = [list(cell) for cell in (*amount.attention, *amount.exchange)]
    rounds, sources = _Rounds(amount, progress), _Sources(model, date, amount)

    def found(about: Mapping[str, Any], done: int) -> Calibration:
        """What so many rounds of this machine's CPU give."""
        timings, measured = rounds.timings(), replace(shape, element=BYTES[about["dtype"]])
        device = replace(sources.device(NAME, "cpu", measured, about, timings), price=price, power=power)
        return Calibration(
            (device,),
            sources.links(measured, about, timings, device),
            sources.said(about),
            model,
            tuple(timings.cells),
            tuple(rounds.drifts),
            _raw(timings),
            done,
            amount.rounds,
        )

    with ExitStack() as stack:

        def start(kind: str, **options: Any) -> Child:
            child = stack.enter_context(Child(kind, {"model": folder, **options}))
            rounds.told()
            return child

        kernels = start("kernels", cells=cells, quick=amount.quick)
        about = kernels.ask("about")
        workers = start("exchange", counts=list(amount.workers), cells=cells)
        engine = start("engine", device="cpu", weights=about["dtype"])  # a file of packed ones would stay packed
        engine.ask("step", batch=1, context=amount.fitted[0][1], tokens=8)  # warms up
        for number in range(amount.rounds):
            rounds.measure(number, kernels, workers, engine)
            if keep is not None and number + 1 < amount.rounds:
                keep(found(about, number + 1))
        calibration = found(about, amount.rounds)
        if not about["cuda"]:
            return calibration
        gpu_about, timings = _gpu(folder, amount)
    gpu = sources.device(GPU_NAME, "gpu", replace(shape, element=BYTES[about["dtype"]]), gpu_about, timings)
    return replace(calibration, devices=(*calibration.devices, gpu))


class _Rounds:
    """All that was measured so far."""

    def __init__(self, amount: Amount, progress: Progress | None = None, used: Callable[[], float] = busy) -> None:
        self._amount, self._progress, self._busy = amount, progress, used
        self._done, self._total = 0, 3 + 4 * amount.rounds
        self._measurements: dict[tuple[Any, ...], list[float]] = {}  # by what, and of what
        self.drifts: list[Drift] = []

    def told(self) -> None:
        """One of the steps that a user sees is done."""
        self._done += 1
        if self._progress is not None:
            self._progress("measuring", self._done, self._total)

    def measure(self, number: int, kernels: Child, workers: Child, engine: Child) -> None:
        """One round of everything."""
        groups: dict[str, Callable[[], None]] = {
            "dense layers": lambda: self.dense(kernels),
            "attention": lambda: self._attention(kernels),
            "the exchange": lambda: self._exchange(kernels, workers),
            "decode": lambda: self._decode(engine, number),
        }
        for name, group in groups.items():
            used, before = self._busy(), kernels.ask("read")
            group()
            self.drifts.append(Drift(name, before, kernels.ask("read"), used))
            self.told()

    def dense(self, kernels: Child) -> None:
        """The matrix product that counts as the peak, and dense layers over rows."""
        self._add([kernels.ask("peak")], "peak")
        for rows in self._amount.rows:
            for name, values in kernels.ask("dense", rows=rows, times=self._amount.times).items():
                self._add(values, name, rows)

    def _attention(self, kernels: Child) -> None:
        for cell in self._amount.attention:
            batch, context = cell
            self._add(
                kernels.ask("attention", batch=batch, context=context, steps=self._amount.steps), "attention", cell
            )

    def _exchange(self, kernels: Child, workers: Child) -> None:
        for batch, context in self._amount.exchange:
            cell = {"batch": batch, "context": context, "steps": self._amount.steps}
            for count in (0, *self._amount.workers):  # 0: in the process
                seconds = workers.ask("layers", count=count, **cell) if count else kernels.ask("layers", **cell)
                self._add(seconds["run"], "layers", count, batch)
                self._add(seconds["announce"], "announce", count, batch)
                if count:
                    first = workers.ask("layers", count=count, query_first=True, **cell)
                    self._add(first["run"], "query first", count, batch, context)
        for channel in CHANNELS:
            sizes, times = list(self._amount.sizes), self._amount.messages
            for size, values in workers.ask("messages", channel=channel, sizes=sizes, times=times).items():
                self._add(values, "message", channel, int(size))

    def _decode(self, engine: Child, number: int) -> None:
        for cell in self._amount.fitted:
            batch, context = cell
            run = engine.ask("step", batch=batch, context=context, tokens=self._amount.tokens, seed=number)
            self._add([run["seconds"]], "step", cell)
            self._add([run["context"]], "context", cell)

    def _add(self, values: Iterable[float], *key: Any) -> None:
        self._measurements.setdefault(key, []).extend(values)

    def _medians(self, *begin: Any) -> dict[Any, float]:
        """Of all that begins with `begin`, by what comes after it."""
        n = len(begin)
        return {
            key[n] if len(key) == n + 1 else key[n:]: statistics.median(values)
            for key, values in self._measurements.items()
            if key[:n] == begin
        }

    def timings(self) -> Timings:
        """The medians over all rounds."""
        layers, announced = self._medians("layers"), self._medians("announce")
        contexts = self._medians("context")
        return Timings(
            bandwidth=statistics.median(rate for drift in self.drifts for rate in (drift.before, drift.after)),
            flops=max(self._measurements["peak",]),
            linears=self._medians("linears"),
            forward=self._medians("forward"),
            attention=self._medians("attention"),
            exchange={
                (count, batch): seconds - layers[0, batch] for (count, batch), seconds in layers.items() if count
            },
            announce={
                (count, batch): seconds - announced[0, batch] for (count, batch), seconds in announced.items() if count
            },
            query_first={
                (count, batch, context): seconds - layers[count, batch]
                for (count, batch, context), seconds in self._medians("query first").items()
            },
            messages={channel: self._medians("message", channel) for channel in CHANNELS},
            cells=[Cell(cell[0], contexts[cell], seconds) for cell, seconds in self._medians("step").items()],
        )


def _gpu(folder: str, amount: Amount) -> tuple[dict[str, Any], Timings]:
    """The dense layers of a GPU; the engine attends on the CPU, so there is no more to measure. Never run on one."""
    rounds = _Rounds(amount)
    with Child("kernels", {"model": folder, "cells": [[1, 1]], "device": "cuda", "quick": amount.quick}) as kernels:
        for _ in range(amount.rounds):
            rounds.dense(kernels)
        rate = kernels.ask("read")
        rounds.drifts.append(Drift("dense layers", rate, rate))
        timings = rounds.timings()
        return kernels.ask("about"), Timings(rate, timings.flops, timings.linears, timings.forward)


@dataclass(frozen=True, slots=True)
class _Sources:
    """Says of each number where it is from: with which model, and when."""

    model: str
    date: str
    amount: Amount

    def said(self, about: Mapping[str, Any]) -> str:
        when = f"{self.date}, " if self.date else ""
        return f"measured here, {when}{about['processor']}, {about['threads']} threads, {about['dtype']}"

    def device(self, name: str, kind: str, shape: ModelShape, about: Mapping[str, Any], timings: Timings) -> Device:
        """The device as the timings give it."""
        base = self.said(about)
        fastest = max(about["rates"], key=lambda way: about["rates"][way])
        cells = " and ".join(f"{batch}x{context}" for batch, context in self.amount.fitted)
        sources = {
            "flops": f"{base}: the best of several large matrix products",
            "bandwidth": f"{base}: plain reads between all other measurements, {fastest}",
            "memory": f"{base}: what nothing else took",
            "price": "as given",
            "power": "as given",
        }
        efficiencies = {
            "dense": f"{base}: a forward pass of {self.model} without attention, less what each layer costs by itself",
            "layer_overhead": f"{base}: what that pass takes beside its linear maps, and a call of attention by itself",
        }
        if timings.attention:
            alone = f"{base}: attention of {self.model}'s layers, with nothing between them"
            efficiencies |= {"attention": alone, "attention_row_overhead": f"{alone}; what grows with the sequences"}
        if timings.cells:
            fitted = f"{base}: fitted to decode of {self.model} at {cells}"
            efficiencies |= {"step_overhead": fitted, "row_overhead": fitted}
        device = replace(bare(name, kind, timings, float(about["memory"])), sources=sources)
        device = fit_device(device, shape, shape.element, timings)
        return replace(device, efficiency=replace(device.efficiency, sources=efficiencies))

    def links(self, shape: ModelShape, about: Mapping[str, Any], timings: Timings, device: Device) -> tuple[Link, ...]:
        """What connects an engine with attention workers on this machine."""
        base = self.said(about)
        exchange = (
            f"{base}: layers of {self.model} attended by workers on this machine, beyond attending in the process"
        )
        links = []
        for link, (channel, by_size) in zip(fit_links(shape, timings, device), timings.messages.items(), strict=True):
            sources = {
                "bandwidth": f"{base}: large frames to an attention worker over the channel {channel!r}",
                "round_trip": f"{exchange}; a bare small message there and back takes {by_size[0] * 1e6:.0f} us",
                "worker_time": exchange,
                "row_time": exchange,
                "query_first_time": f"{exchange}, with q first, beyond q, k and v together",
                "announce_time": f"{exchange}: until all have accepted a batch",
                "announce_row_time": f"{exchange}: until all have accepted a batch, what grows with the sequences",
            }
            links.append(replace(link, sources=sources))
        return tuple(links)


def remarks_on(drifts: Sequence[Drift]) -> Iterator[str]:
    """Whether the bandwidth changed while something was measured or from one measurement to another, and whether
    others were at work."""
    worst = max((drift for drift in drifts if drift.change > DRIFT), key=lambda drift: drift.change, default=None)
    if worst is not None:
        yield (
            f"the bandwidth changed by more than {DRIFT:.0%} during a group of measurements, most while {worst.group} "
            f"was measured, from {worst.before / 1e9:.1f} to {worst.after / 1e9:.1f} GB/s"
        )
    rates = [rate for drift in drifts for rate in (drift.before, drift.after)]
    low, high = min(rates, default=0.0), max(rates, default=0.0)
    if high - low > DRIFT * high:
        yield f"the bandwidth was from {low / 1e9:.1f} to {high / 1e9:.1f} GB/s over all measurements"
    used = [drift.busy for drift in drifts]
    if max(used, default=0.0) > BUSY:
        often = sum(share > BUSY for share in used)
        yield (
            f"other processes used up to {max(used):.0%} of the cores, before {often} of {len(used)} groups of "
            "measurements"
        )


def _raw(timings: Timings) -> tuple[str, ...]:
    """What was measured, for people."""
    dense = ", ".join(
        f"{rows} rows {timings.linears[rows] * 1e3:.2f} {timings.forward[rows] * 1e3:.2f}" for rows in timings.forward
    )
    attention = ", ".join(f"{b}x{c} {seconds * 1e6:.1f}" for (b, c), seconds in timings.attention.items())
    exchange, announced, first = (
        ", ".join(f"{rows} rows at {count} {seconds * 1e3:.2f}" for (count, rows, *_), seconds in measured.items())
        for measured in (timings.exchange, timings.announce, timings.query_first)
    )
    sent = "; ".join(
        f"{channel}: " + ", ".join(f"{size} bytes {seconds * 1e6:.0f}" for size, seconds in by_size.items())
        for channel, by_size in timings.messages.items()
    )
    return (
        f"All linear maps, and a forward pass without attention, ms: {dense}.",
        f"Attention of one layer, us: {attention}.",
        f"A step's layers with attention workers, ms more than in one process: {exchange}.",
        f"Until all have accepted the step's batch, ms more than in one process: {announced}.",
        f"The same with q first, ms more than with q, k and v together: {first}.",
        f"Messages there, and a short answer back, us: {sent}.",
    )
