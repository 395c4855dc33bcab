"""The rate at which this machine reads memory (`Bandwidth`): that of the fastest of several loops, measured.

On a CPU these are compiled loops of vector loads on torch's own team; on a GPU they are torch's reductions (never run
on one).
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, literally, njit, types
from numba.extending import intrinsic

from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.emitter import I64, VI, Emitter
from lamina_kernels.compile.intrinsics import literals, take
from lamina_kernels.compile.launch import HEADER, TAKEN, block_type, launch, source_fingerprint
from lamina_kernels.paged import memory

SETTLE = 0.3  # seconds after which the threads of an earlier computation no longer spin
SLICE = 1 << 28  # bytes of one timing of the bandwidth: many times what caches keep
LINE, UNROLL = 64, 8  # bytes; lines that an iteration of the loop reads
_READ = np.dtype([*HEADER, ("address", "i8"), ("size", "i8"), ("ahead", "i8"), ("sink", "i8")])
_Read = block_type(_READ)

VARIANTS = ((1, 0, 1), (2, 4096, 1), (4, 1024, 1), (4, 1024, 16), (8, 1024, 1), (8, 4096, 1), (8, 4096, 16))
"""How memory is read: streams side by side, bytes that a prefetch runs ahead (0: none), shares for each thread. Which
is the fastest differs from machine to machine."""


def allocate(size: int, device: torch.device) -> torch.Tensor:
    """uint8 `[size]`, on the CPU in huge pages where there are any."""
    return memory.allocate(size) if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)


def repeat(block: torch.Tensor, flat: torch.Tensor) -> None:
    """Fill `flat` with copies of `block`, both uint8 `[bytes]`."""
    for start in range(0, len(flat), len(block)):
        flat[start : start + len(block)] = block[: len(flat) - start]


def synchronise(device: torch.device) -> None:
    """Wait for what was given to a GPU; on a CPU nothing is outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bandwidth:
    """The rate at which this machine reads `size` bytes of memory: the fastest of several ways, measured at the start.

    A call gives GB/s of the fastest way, over the next slice of memory.
    """

    def __init__(
        self,
        size: int,
        device: torch.device,
        threads: int,
        variants: Sequence[tuple[int, int, int]] = VARIANTS,
        rounds: int = 9,
    ) -> None:
        self._device, self._threads, self._place = device, threads, 0
        self._slice = min(SLICE, size) if device.type == "cpu" else size
        self._memory = allocate(size // self._slice * self._slice, device)
        repeat(torch.randn(1 << 18, device=device).view(torch.uint8), self._memory)
        self._readers = dict(self._ways(variants))
        rates: dict[str, list[float]] = {name: [] for name in self._readers}
        for _ in range(rounds):
            for name in self._readers:
                rates[name].append(self._rate(name))
        self.rates = {name: statistics.median(values[1:]) for name, values in rates.items()}
        self.best = max(self.rates, key=self.rates.__getitem__)

    def __call__(self) -> float:
        return self._rate(self.best)

    def settled(self, times: int = 3) -> float:
        """Bytes a second, once no thread spins any more: the median of a few readings."""
        time.sleep(SETTLE)
        return statistics.median(self() for _ in range(times)) * 1e9

    def _rate(self, name: str) -> float:
        part = self._memory[self._place : self._place + self._slice]
        self._place = (self._place + self._slice) % len(self._memory)
        start = time.perf_counter()
        self._readers[name](part)
        synchronise(self._device)
        return self._slice / (time.perf_counter() - start) / 1e9

    def _ways(self, variants: Sequence[tuple[int, int, int]]) -> Iterator[tuple[str, Callable[[torch.Tensor], object]]]:
        if self._device.type != "cpu":
            yield "torch float32 sum", lambda x: x.view(torch.float32).sum()
            yield "torch float32 maximum", lambda x: x.view(torch.float32).amax()
            yield "torch int32 maximum", lambda x: x.view(torch.int32).amax()
            return
        for streams, ahead, cuts in variants:
            name = f"{streams} streams, prefetch {ahead} bytes ahead, {cuts} shares a thread"

            def read(x: torch.Tensor, streams: int = streams, ahead: int = ahead, cuts: int = cuts) -> None:
                self._read(x, streams, ahead, cuts)

            yield name, read

    def _read(self, part: torch.Tensor, streams: int, ahead: int, cuts: int) -> None:
        sink = np.zeros(self._threads * cuts * LINE, np.uint8)
        a = _Read(
            shares=self._threads * cuts, address=part.data_ptr(), size=len(part), ahead=ahead, sink=sink.ctypes.data
        )
        launch(_reader(streams, ahead > 0), ctypes.addressof(a), self._threads)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _read_streams(
    context: Any, streams: Any, fetched: Any, address: Any, stride: Any, steps: Any, ahead: Any, sink: Any
) -> Any:
    """Load `steps` times UNROLL lines: as many of each stream, which begin `stride` bytes apart.

    sink: where 16 int32 sums go, without which nothing would be loaded.
    """
    count, far = literals(streams, fetched)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        address, stride, steps, ahead, sink = args[2:]
        starts = [e.at(e.pointer(address), builder.mul(stride, I64(i))) for i in range(count)]
        lines = UNROLL // count

        def step(i: Any, *carried: Any) -> list[Any]:
            places, sums = carried[:count], list(carried[count:])
            for n in range(UNROLL):
                place = e.at(places[n // lines], n % lines * LINE)
                if far:
                    e.fetch(e.at(place, ahead))
                sums[n] = builder.add(sums[n], e.load(place, VI))
            return [*(e.at(place, lines * LINE) for place in places), *sums]

        total, *others = e.loop(steps, [*starts, *[e.bits(0)] * UNROLL], step)[count:]
        for other in others:
            total = builder.add(total, other)
        e.store(total, e.pointer(sink))
        return context.get_dummy_value()

    return types.void(streams, fetched, *[types.int64] * 5), emit


@njit  # type: ignore[untyped-decorator]
def _read_shares(streams: int, fetched: int, block: Any) -> None:
    streams, fetched = literally(streams), literally(fetched)
    a = carray(block, (1,), _READ)[0]
    size = a.size // a.shares // (UNROLL * LINE) * (UNROLL * LINE)
    share = take(block, TAKEN)
    while share < a.shares:
        steps, stride = size // (UNROLL * LINE), size // streams
        _read_streams(streams, fetched, a.address + share * size, stride, steps, a.ahead, a.sink + share * LINE)
        share = take(block, TAKEN)


@cache
def _reader(streams: int, fetched: bool) -> int:
    """The address of a kernel that reads shares of memory. From numba's cache on disk where it is there."""
    code = int(fetched)  # closed over, as `streams` is: parts of the cache's key
    fingerprint = source_fingerprint(emitter, intrinsics, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _read_shares(streams, code, block)

    return int(kernel.address)
