"""The same function of many things, on all cores."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from lamina.system import machine
from lamina.system.machine import on_all_cores


@pytest.fixture(autouse=True, params=[1, 3])
def processes(request, monkeypatch):
    monkeypatch.setattr(machine, "_cores", lambda: request.param)


def test_results_come_in_order_and_may_be_closures():
    factor = 3
    assert list(on_all_cores(lambda x: factor * x, range(50))) == [3 * x for x in range(50)]


def test_nothing_of_nothing():
    assert list(on_all_cores(lambda x: x, ())) == []


def test_several_processes_take_part_and_all_end(monkeypatch):
    monkeypatch.setattr(machine, "_cores", lambda: 3)
    assert os.getpid() not in set(on_all_cores(lambda _: os.getpid(), range(30)))
    assert not multiprocessing.active_children()


def test_an_error_is_raised_where_its_result_would_come():
    def odd(x: int) -> int:
        if x == 1:
            raise ValueError("1 is odd")
        return x

    found = on_all_cores(odd, [0, 1, 2])
    with pytest.raises(ValueError, match="1 is odd"):
        list(found)
    assert not multiprocessing.active_children()


def test_one_who_stops_early_leaves_no_process():
    found = on_all_cores(lambda x: x, range(100))
    assert next(found) == 0
    found.close()
    assert not multiprocessing.active_children()
