"""Compiled code calls functions of the C library and of OpenMP by their addresses."""

from __future__ import annotations

import ctypes

import numba
import numpy as np
import pytest
from numba import carray, types

from lamina_kernels.compile.calls import PARALLEL, address_of, call
from lamina_kernels.compile.intrinsics import take


@numba.njit
def _called(address, a, b, c):
    return call(address, a, b, c, 0, 0, 0)


@numba.cfunc(types.void(types.voidptr))
def _count_me(block):
    take(block, carray(block, (1,), np.int64)[0])


def test_a_function_of_the_c_library_gets_its_arguments_and_gives_its_result():
    text = ctypes.create_string_buffer(b"abc-abd-abc")
    at = ctypes.addressof(text)
    compare = address_of("memcmp")
    assert np.int32(_called(compare, at, at + 8, 3) & 0xFFFFFFFF) == 0
    assert _called(compare, at, at + 4, 3) & 0xFFFFFFFF != 0
    assert _called(address_of("strnlen"), at, 100, 0) == 11
    assert _called(address_of("memcpy"), at, at + 4, 3) == at
    assert text.value == b"abd-abd-abc"


@pytest.mark.skipif(address_of(PARALLEL) is None, reason="torch's OpenMP is not GNU's")
@pytest.mark.parametrize("threads", [1, 2])
def test_openmp_calls_a_kernel_once_on_each_thread(threads):
    block = np.array([1, 0], np.int64)
    _called(address_of(PARALLEL), _count_me.address, block.ctypes.data, threads)
    assert block.tolist() == [1, threads]


def test_an_unknown_function_has_no_address():
    assert address_of("lamina_has_no_such_function") is None
