"""Steps of a program run in their order, whoever is held up."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from numba import carray, types

from lamina_kernels.compile import programs
from lamina_kernels.compile.calls import address_of, call
from lamina_kernels.compile.intrinsics import pointer, take
from lamina_kernels.compile.launch import FINISHED, HEADER, TAKEN, block_type
from lamina_kernels.compile.programs import Program, Step
from lamina_kernels.dense import few_rows

pytestmark = pytest.mark.skipif(not programs.can_run(), reason="torch has another OpenMP, or this is no Linux")

ARGUMENTS = np.dtype([*HEADER, ("sleep", "i8"), ("microseconds", "i8"), ("log", "i8"), ("name", "i8")])
Arguments = block_type(ARGUMENTS)


@numba.cfunc(types.void(types.voidptr))
def kernel(block):
    """Each share writes down its step's name. The first share of a step takes its time."""
    a = carray(block, (1,), ARGUMENTS)[0]
    share = take(block, TAKEN)
    while share < a.shares:
        if share == 0 and a.microseconds:
            call(a.sleep, a.microseconds, 0, 0, 0, 0, 0)
        carray(pointer(a.log), (100,), np.int64)[1 + take(pointer(a.log), 0)] = a.name
        take(block, FINISHED)
        share = take(block, TAKEN)


def step(log: np.ndarray, name: int, shares: int, microseconds: int = 0) -> Step:
    block = Arguments(
        shares=shares, sleep=address_of("usleep"), microseconds=microseconds, log=log.ctypes.data, name=name
    )
    return Step(kernel.address, block, shares > 1)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_step_waits_for_all_of_the_one_before(threads):
    log = np.zeros(101, np.int64)
    shares = [8, 1, 1, 6, 9, 1]
    # Sleeps of 20 ms outlast the loop in which the others wait at first.
    steps = [step(log, name, n, 20000 if name in (0, 3) else 0) for name, n in enumerate(shares)]
    program = Program(steps)
    for _ in range(3):  # and leaves everything as it was
        log[:] = 0
        program.run(threads)
        assert log[0] == sum(shares)
        assert log[1 : 1 + log[0]].tolist() == [name for name, n in enumerate(shares) for _ in range(n)]


def test_many_short_steps():
    log = np.zeros(101, np.int64)
    program = Program([step(log, name, 2 if name % 3 else 3) for name in range(40)])
    for _ in range(500):
        log[0] = 0
        program.run(2)
        found = log[1 : 1 + log[0]]
        assert len(found) == 94
        assert (np.diff(found) >= 0).all()


@pytest.mark.parametrize("steps", [[], [Step(0, few_rows.Arguments(), False)]])
def test_begins_with_a_shared_step(steps):
    with pytest.raises(ValueError, match="begins with a step that all threads share"):
        Program(steps)
