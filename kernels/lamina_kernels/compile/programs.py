"""A program: several kernels one after the other, on all threads of one parallel region, in one call from Python.

A step begins when all shares of the one before are finished, whichever threads took them: one that the system holds up
between two steps holds up nobody. The first to see a step finished computes the small steps that follow it, alone, and
lets the others go on. A wait is a loop of fractions of a microsecond, where a parallel region of its own takes some.
One that lasts, because a thread with an unfinished share was held up, leaves its core to others.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from lamina_kernels.compile import calls, emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.calls import PARALLEL, SYSTEM_CALL, TEAM_SIZE, address_of, call
from lamina_kernels.compile.emitter import I64, Emitter, cpu_has
from lamina_kernels.compile.intrinsics import pointer, take
from lamina_kernels.compile.launch import FINISHED, SHARES, TAKEN, launch, source_fingerprint

_STEP = np.dtype([("kernel", "i8"), ("block", "i8"), ("shared", "i8")])
_LINE = 8  # int64 numbers: what several threads write stands in cache lines of its own
_REACHED, _ASLEEP, _LEFT = 0, _LINE, _LINE + 1
_PROGRAM = np.dtype(
    [
        ("reached", "i8", _LINE),  # the step that may be computed now; its lower half is the futex of those asleep
        ("asleep", "i8"),
        ("left", "i8", _LINE - 1),  # threads that have seen the end
        *((name, "i8") for name in ("steps", "n", "team_size", "system_call")),
    ]
)
_SPINS = 2000  # before a waiting thread sleeps: some 50 us
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)
_WAIT, _WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE, within the process
_EVERYONE = 2**31 - 1


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
        block["team_size"], block["system_call"] = address_of(TEAM_SIZE), address_of(SYSTEM_CALL)
        self._address = int(block.ctypes.data)
        self._kernel = load_kernel()

    def run(self, threads: int) -> None:
        """Run the steps on so many threads, or on fewer where OpenMP has no more to give. Releases the GIL."""
        launch(self._kernel, self._address, threads)


def can_run() -> bool:
    """Whether there is an OpenMP that can be asked how many threads it gave, on a Linux whose futexes are known."""
    return bool(_FUTEX) and None not in (address_of(PARALLEL), address_of(TEAM_SIZE), address_of(SYSTEM_CALL))


@cache
def load_kernel() -> int:
    """The address of what each thread runs. From numba's cache on disk where it is there."""
    arguments, step = _PROGRAM, _STEP
    fingerprint = source_fingerprint(calls, emitter, intrinsics, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), arguments)[0]
        steps = carray(pointer(a.steps), (a.n,), step)
        threads = call(a.team_size, 0, 0, 0, 0, 0, 0) & 0xFFFFFFFF
        i = 0
        while fingerprint and i < a.n:
            following = i + 1
            while following < a.n and not steps[following].shared:
                following += 1
            if _load(block, _REACHED) <= i:
                call(steps[i].kernel, steps[i].block, 0, 0, 0, 0, 0)
                if _is_first_to_finish(pointer(steps[i].block)):
                    for j in range(i + 1, following):
                        call(steps[j].kernel, steps[j].block, 0, 0, 0, 0, 0)
                    _swap(block, _REACHED, following)
                    if _load(block, _ASLEEP):
                        call(a.system_call, _FUTEX, _address(block, _REACHED), _WAKE, _EVERYONE, 0, 0)
                elif following < a.n:  # at the end, the region waits
                    _wait_beyond(block, i, a.system_call)
            i = following
        if take(block, _LEFT) == threads - 1:
            for j in range(a.n):
                header = carray(pointer(steps[j].block), (2,), np.int64)
                header[TAKEN] = header[FINISHED] = 0
            _swap(block, _REACHED, 0)
            _swap(block, _LEFT, 0)

    return int(kernel.address)


@njit  # type: ignore[untyped-decorator]
def _is_first_to_finish(step: Any) -> Any:
    """Whether all shares of a step are finished, and nobody was told so before."""
    shares = _load(step, SHARES)
    return _load(step, FINISHED) >= shares and take(step, FINISHED) == shares


@njit  # type: ignore[untyped-decorator]
def _wait_beyond(block: Any, i: int, system_call: int) -> None:
    """Until a step beyond `i` may be computed."""
    spins = 0
    reached = _load(block, _REACHED)
    while reached <= i:
        spins += 1
        if spins < _SPINS:
            _pause()
        else:
            take(block, _ASLEEP)  # before the system looks at the futex: who opens looks at both the other way around
            call(system_call, _FUTEX, _address(block, _REACHED), _WAIT, reached, 0, 0)
            add(block, _ASLEEP, -1)
        reached = _load(block, _REACHED)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _load(context: Any, block: Any, index: Any) -> Any:
    """The int64 number `index` of a block, and with it whatever was written before that was."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_place(builder, *args), "acquire", 8)

    return types.int64(types.voidptr, types.int64), emit


def _exchanging(operation: str) -> Any:
    """An intrinsic (block, index, n): an atomic operation with n on an int64 number of a block, after all other writes
    and before all other reads. Returns what the number was."""

    def typed(context: Any, block: Any, index: Any, n: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, _place(builder, *args[:2]), args[2], "seq_cst")

        return types.int64(types.voidptr, types.int64, types.int64), emit

    return intrinsic(prefer_literal=True)(typed)


_swap, add = _exchanging("xchg"), _exchanging("add")


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _address(context: Any, block: Any, index: Any) -> Any:
    """Where the int64 number `index` of a block is."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(_place(builder, *args), I64)

    return types.int64(types.voidptr, types.int64), emit


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
