"""What papers printed, reproduced: exactly where it is arithmetic, within what is asked for elsewhere."""

from __future__ import annotations

import pytest
from simulate.published import (
    BATCH_GAIN,
    COMPUTE_BOUND,
    EQUAL_COST,
    GAINS,
    cell,
    closed_gain,
    evaluation,
    fit_baseline,
    lamina_rows,
    overlap_rows,
    step3_rows,
    uniform,
)

from lamina.errors import InvalidRequest
from lamina.simulator.costs.hardware import load
from lamina.simulator.traces.arrivals import Arrival, Trace
from lamina.simulator.traces.figures import published
from lamina.simulator.traces.synthetic import synthetic

HARDWARE = load()
CONTEXTS = {"azure-conv": 1227.0, "azure-code": 2131.0, "mooncake-conversation": 13126.0}
"""Mean tokens of KV over all decode steps of the real traces."""


def test_laminas_tables_follow_from_shapes_and_prices() -> None:
    for row in lamina_rows(HARDWARE):
        exact = row.unit == "$/h" or "KV of a token" in row.what or "cross" in row.what
        assert row.ours == pytest.approx(row.published, rel=1e-4 if exact else 0.01), row.what


def test_overlap_gains_no_more_than_published() -> None:
    for row in overlap_rows(HARDWARE):
        assert 0.6 * row.published < row.ours <= row.published, row.what


def test_step3_costs_are_within_three_per_cent() -> None:
    rows = step3_rows(HARDWARE)
    assert len(rows) == 14
    for row in rows:
        assert row.ours == pytest.approx(row.published, rel=0.03), row.what


def test_the_bare_roofline_does_not_reach_the_published_gains() -> None:
    gains = {
        (name, trace): closed_gain(name, HARDWARE, context)
        for name, *_ in EQUAL_COST
        for trace, context in CONTEXTS.items()
    }
    assert gains.pop(COMPUTE_BOUND) == pytest.approx(1.0, abs=0.1)
    assert all(1.05 < gain < 1.25 for gain in gains.values())


def test_too_few_requests_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"20 requests of azure-conv .* do not fill DOP\(2, 4\)"):
        cell("llama-3-70b", synthetic(published()["azure-conv"], 20, seed=0), HARDWARE, uniform(1.0))


def test_the_evaluation_has_a_cell_for_each_model_and_trace() -> None:
    drawn = synthetic(published()["mooncake-conversation"], 110, seed=0)
    short = Trace(drawn.name, tuple(Arrival(each.at, each.prompt, 20) for each in drawn.arrivals))
    cells = list(evaluation([short], HARDWARE))
    assert [cell.model for cell in cells] == ["llama-33b", "llama-65b", "llama-3-70b"]
    for each in cells:
        assert each.left_out + each.lamina.finished == 110
        assert each.fitted_gain > each.bare_gain


def test_a_fitted_baseline_reaches_them() -> None:
    baseline = fit_baseline(CONTEXTS, HARDWARE)
    assert baseline == uniform(baseline.dense[0][1])
    assert 0.6 < baseline.dense[0][1] < 0.9
    for name, *_ in EQUAL_COST:
        for context in CONTEXTS.values():
            assert GAINS[0] <= closed_gain(name, HARDWARE, context, baseline) <= GAINS[1]


def test_llama_3_70b_reaches_a_batch_of_800_on_azure_conv() -> None:
    result = cell("llama-3-70b", synthetic(published()["azure-conv"], 900, seed=0), HARDWARE, uniform(0.77))
    assert result.lamina.saturated_batch == pytest.approx(800, rel=0.1)
    assert result.batch_gain == pytest.approx(BATCH_GAIN, rel=0.15)
    assert result.bare_gain == pytest.approx(1.0, abs=0.1)
    assert result.fitted_gain == pytest.approx(result.bare_gain / 0.77, rel=0.05)
    assert result.left_out == 0
