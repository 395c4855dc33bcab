"""Cells of KernelFlume and AFD-Ledger: within a tenth of what is reported, but for a reading that is not theirs."""

from __future__ import annotations

import pytest
from simulate.peers import LEDGER_ERROR, Layer, afd_rows, kernelflume_rows
from simulate.published import Row, lamina_rows, step3_rows, table

from lamina.simulator.costs.hardware import load

HARDWARE = load()


def test_kernelflumes_memory_overhead_and_lanes() -> None:
    rows = kernelflume_rows(HARDWARE)
    assert len(rows) == 8
    for row in rows:
        other = "half a batch" in row.what
        assert (abs(row.difference) > 0.3) if other else (abs(row.difference) < 0.1), row.what
        assert "assumed" in row.note


def test_afd_ledgers_ratios_and_its_tie() -> None:
    fast, again, unlike = afd_rows(HARDWARE)
    for row in (fast, again, unlike):
        assert abs(row.difference) < 0.1, row.what
    assert "a tie" in again.note
    assert abs(again.ours - 1) <= LEDGER_ERROR
    assert fast.ours > 1 + LEDGER_ERROR


def test_batches_in_rotation_take_what_the_longer_pool_takes() -> None:
    """Attention of 3, experts of 2 and ways of 1: alone 7; two batches take 7, three 9."""
    layer = Layer(3.0, 2.0, 1.0, 1.0)
    assert [layer.cycle(batches) for batches in (1, 2, 3)] == [7.0, 7.0, 9.0]


def test_tables_say_what_is_derived_in_a_hundred_columns() -> None:
    rows = lamina_rows(HARDWARE) + step3_rows(HARDWARE)
    assert sum(row.origin == "derived" for row in rows) == 12
    lines = list(table([*rows, Row("w " * 80, 1.0, 2.0, "times", "n " * 90)], notes=True))
    assert max(map(len, lines)) <= 100
    assert sum("derived" in line for line in lines) == 12
    assert lines[-1].startswith("    n")


@pytest.mark.parametrize("name", ["gb200", "a6000"])
def test_devices_of_these_cells_alone_are_not_in_the_catalogue(name: str) -> None:
    assert name not in HARDWARE.devices
