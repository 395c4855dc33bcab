"""A program: several kernels one after the other, on all threads of one parallel region, in one call from Python.

Between two steps that all threads share, the threads wait for each other. Whoever comes last computes the small steps
that stand between, alone, and lets the others go on: a small step then costs no second wait. Nobody waits in the
operating system, so a wait takes a fraction of a microsecond, where a parallel region of its own takes some.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from lamina_kernels.cpu import calls, emitter, intrinsics
from lamina_kernels.cpu import launch as launching
from lamina_kernels.cpu.calls import PARALLEL, TEAM_SIZE, YIELD, address_of, call
from lamina_kernels.cpu.emitter import I64, Emitter, cpu_has
from lamina_kernels.cpu.intrinsics import pointer, take
from lamina_kernels.cpu.launch import FINISHED, TAKEN, launch, source_fingerprint

_STEP = np.dtype([("kernel", "i8"), ("block", "i8"), ("shared", "i8")])
_LINE = 8  # int64 numbers: what several threads write stands in cache lines of its own
_ARRIVED, _GATE = 0, _LINE
_PROGRAM = np.dtype(
    [
        ("arrived", "i8", _LINE),  # threads that have done their part of the step
        ("gate", "i8", _LINE),  # counts the waits that are over
        *((name, "i8") for name in ("steps", "n", "team_size", "give_way")),
    ]
)
_SPINS = 2000  # before a waiting thread lets others have its core: some 50 us


@dataclass(frozen=True, slots=True)
class Step:
    """A kernel and its argument block, as `launch` takes them. `shared`: all threads take shares of it."""

    kernel: int
    block: ctypes.Structure
    shared: bool


class Program:
    """Steps to run in this order. The first is shared. One thread at a time may run it; numbers in the blocks of its
    steps may be changed in between, `taken` and `finished` are for it to reset."""

    def __init__(self, steps: Sequence[Step]) -> None:
        if not steps or not steps[0].shared:
            raise ValueError("a program begins with a step that all threads share")
        self._blocks = [step.block for step in steps]  # keeps them where they are
        self._steps = np.array([(s.kernel, ctypes.addressof(s.block), s.shared) for s in steps], _STEP)
        self._memory = np.zeros(_PROGRAM.itemsize + 64, np.uint8)
        start = -self._memory.ctypes.data % 64
        block = self._memory[start : start + _PROGRAM.itemsize].view(_PROGRAM)
        block["steps"], block["n"] = self._steps.ctypes.data, len(steps)
        block["team_size"], block["give_way"] = address_of(TEAM_SIZE), address_of(YIELD)
        self._address = int(block.ctypes.data)
        self._kernel = load_kernel()

    def run(self, threads: int) -> None:
        """Run the steps on so many threads, or on fewer where OpenMP has no more to give. Releases the GIL."""
        launch(self._kernel, self._address, threads)


def can_run() -> bool:
    """Whether there is an OpenMP that can be asked how many threads it gave."""
    return None not in (address_of(PARALLEL), address_of(TEAM_SIZE), address_of(YIELD))


@cache
def load_kernel() -> int:
    """The address of what each thread runs. From numba's cache on disk where it is there."""
    arguments, step = _PROGRAM, _STEP
    fingerprint = source_fingerprint(calls, emitter, intrinsics, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), arguments)[0]
        steps = carray(pointer(a.steps), (a.n,), step)
        last = (call(a.team_size, 0, 0, 0, 0, 0, 0) & 0xFFFFFFFF) - 1
        gate = _load(block, _GATE)
        i = 0
        while fingerprint and i < a.n:
            call(steps[i].kernel, steps[i].block, 0, 0, 0, 0, 0)
            following = i + 1
            while following < a.n and not steps[following].shared:
                following += 1
            if take(block, _ARRIVED) == last:
                for j in range(i, following):
                    if j > i:
                        call(steps[j].kernel, steps[j].block, 0, 0, 0, 0, 0)
                    header = carray(pointer(steps[j].block), (2,), np.int64)
                    header[TAKEN] = header[FINISHED] = 0
                _store(block, _ARRIVED, 0)
                _store(block, _GATE, gate + 1)
            elif following < a.n:  # at the end, the region waits
                spins = 0
                while _load(block, _GATE) == gate:
                    _pause()
                    spins += 1
                    if spins > _SPINS:
                        call(a.give_way, 0, 0, 0, 0, 0, 0)
            gate += 1
            i = following

    return int(kernel.address)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _load(context: Any, block: Any, index: Any) -> Any:
    """The int64 number `index` of a block, and with it whatever was written before `_store` wrote it."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_place(builder, *args), "acquire", 8)

    return types.int64(types.voidptr, types.int64), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _store(context: Any, block: Any, index: Any, value: Any) -> Any:
    """Write the int64 number `index` of a block, after everything else written so far."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _place(builder, *args[:2]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.voidptr, types.int64, types.int64), emit


def _place(builder: Any, block: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(block, [index], source_etype=I64), I64.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def _pause(context: Any) -> Any:
    """Let a core that waits in a loop take its time."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if cpu_has("sse2"):
            Emitter(builder).call("llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), emit
