"""What streaming tokens to clients takes of an engine's step where the server and its clients share its cores.

The same decode cells are measured in one process and as `lamina serve` streams them to a client here, in turns. What a
step takes longer there, a sequence, is the device's `stream_overhead`.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lamina.errors import EngineError
from lamina.measure.bench.client import Client, request_fields
from lamina.measure.bench.running import run_loop
from lamina.measure.bench.served import Served
from lamina.measure.hardware.child import Child
from lamina.measure.hardware.decode_steps import needed, steady
from lamina.measure.hardware.fitting import solve
from lamina.measure.hardware.hardware_calibration import NAME, Calibration
from lamina.simulator.costs.hardware import Device
from lamina.system.machine import native_dtype, this_machine
from lamina.system.progress import Progress

CONTEXT = 64
"""Tokens of each prompt: attention hardly counts."""
_IDS = (100, 1000)
"""Tokens that random prompts are of: every vocabulary has them."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How many streams at a time are measured, for how many tokens each, and how often."""

    streams: tuple[int, ...] = (1, 4, 16)
    tokens: int = 48
    rounds: int = 3


FULL, QUICK = Amount(), Amount((1, 4), 12, 1)


def with_streams(found: Calibration, model: str, progress: Progress | None = None, quick: bool = False) -> Calibration:
    """The calibration, with what streams take of this machine's steps. Raises EngineError where the engine or the
    server fails."""
    amount = QUICK if quick else FULL
    dtype, _ = native_dtype(this_machine())
    more: dict[int, list[float]] = {streams: [] for streams in amount.streams}
    alone: dict[int, list[float]] = {streams: [] for streams in amount.streams}
    with (
        Child("engine", {"model": model, "device": "cpu", "weights": dtype}) as engine,
        Served((model, "--device", "cpu", "--weights", dtype), progress) as server,
    ):
        total = amount.rounds * len(amount.streams)
        for number in range(-1, amount.rounds):  # the first warms up
            for at, streams in enumerate(amount.streams):
                cell = {"batch": streams, "context": CONTEXT, "tokens": amount.tokens, "seed": number + 1}
                seconds = engine.ask("step", **cell)["seconds"]
                served = run_loop(_step(server.url, **cell))
                if number >= 0:
                    alone[streams].append(seconds)
                    more[streams].append(served - seconds)
                if progress is not None:
                    progress("streaming", max(0, number) * len(amount.streams) + at + 1, total)
    each, raw = fitted(more, alone)
    devices = tuple(
        _streaming(device, each, found.about) if device.name == NAME else device for device in found.devices
    )
    return replace(found, devices=devices, raw=(*found.raw, raw))


def fitted(more: Mapping[int, Sequence[float]], alone: Mapping[int, Sequence[float]]) -> tuple[float, str]:
    """Seconds a sequence and step, from the seconds that steps of so many streams took longer and that they take alone;
    and what was measured, in words."""
    medians = {streams: statistics.median(seconds) for streams, seconds in more.items()}
    sizes = [statistics.median(alone[streams]) for streams in medians]
    (each,) = solve([(float(streams),) for streams in medians], list(medians.values()), sizes)
    said = ", ".join(f"{streams} streams {seconds * 1e3:.2f}" for streams, seconds in medians.items())
    return each, f"A step that is streamed to clients here, ms more than in one process: {said}."


def _streaming(device: Device, each: float, about: str) -> Device:
    said = f"{about}: steps that `lamina serve` streams to clients on this machine, beyond those in one process"
    sources = {**device.efficiency.sources, "stream_overhead": said}
    return replace(device, efficiency=replace(device.efficiency, stream_overhead=each, sources=sources))


async def _step(url: str, batch: int, context: int, tokens: int, seed: int) -> float:
    """The median step, in seconds, of so many streams at a time."""
    ids, count = random.Random(seed), needed(batch, context, tokens)
    async with Client(url) as client:
        name = (await client.models())[0].name
        bodies = [
            request_fields("completions", name, "", count, ignore_eos=True)
            | {"prompt": [ids.randrange(*_IDS) for _ in range(context)]}
            for _ in range(batch)
        ]
        outcomes = await asyncio.gather(*(client.send("completions", json.dumps(body).encode()) for body in bodies))
    for outcome in outcomes:
        if outcome.error:
            raise EngineError(f"{url} answered a stream with {outcome.error}: {outcome.detail}")
    return steady([outcome.chunks for outcome in outcomes], context, tokens // 4).seconds
