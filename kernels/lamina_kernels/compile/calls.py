"""Calling a function by its address from compiled code: what keeps numba's cache on disk usable.

An address is another in each process, so compiled code that holds one cannot be cached. It reads addresses from its
argument block instead, where Python puts what `address_of` gives.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lamina_kernels.compile.emitter import I64
from lamina_kernels.compile.launch import openmp_function

PARALLEL = "GOMP_parallel"
"""void(function, data, threads, flags): calls function(data) on each thread of OpenMP's team, and waits."""

TEAM_SIZE = "omp_get_num_threads"
"""int(): how many threads run the parallel region that asks."""

SYSTEM_CALL = "syscall"
"""long(number, ...): asks the system, which knows numbers only."""


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def call(context: Any, address: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    """Call the C function at `address` with six int64 numbers and return its int64 result.

    A function of fewer or narrower integers or pointers takes what it knows of them. Of a result that is narrower the
    upper bits are undefined, of a void function all.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = builder.inttoptr(args[0], ir.FunctionType(I64, [I64] * 6).as_pointer())
        return builder.call(function, args[1:])

    return types.int64(*[types.int64] * 7), emit


@cache
def address_of(name: str) -> int | None:
    """The address of a function of OpenMP (PARALLEL, TEAM_SIZE) or of the C library; None where there is none."""
    function = openmp_function(name) if name in (PARALLEL, TEAM_SIZE) else getattr(ctypes.CDLL(None), name, None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value
