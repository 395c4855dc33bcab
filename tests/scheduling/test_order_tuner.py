"""The order of q, k and v in decode: both are measured, the faster one is kept, and fused where they are equal."""

from __future__ import annotations

import pytest

from lamina.scheduling.order_tuner import HOLD, ROUNDS, OrderTuner
from lamina.scheduling.trials import WINDOW

FUSED, FIRST = True, False
SEARCH = 2 * ROUNDS * (WINDOW + 2)  # batches, at least as many as a search has


class Deployment:
    """Decode batches whose seconds depend on the order that they were planned with."""

    def __init__(self, fused: float, first: float, tries: bool = True, lanes: int = 1) -> None:
        self.seconds = {FUSED: fused, FIRST: first}
        self.order = OrderTuner(tries)
        self.now, self.lanes = 0.0, lanes
        self.planned = [self.order.fused] * lanes  # batches under way
        self.ran: list[bool] = []

    def decode(self, batches: int, sequences: int = 8) -> Deployment:
        for _ in range(batches):
            order = self.planned.pop(0)
            self.now += self.seconds[order]
            self.ran.append(order)
            self.order.completed(sequences, sequences, self.lanes, self.now)
            self.planned.append(self.order.fused)
        return self

    def drift(self, factor: float) -> None:
        self.seconds = {order: factor * seconds for order, seconds in self.seconds.items()}


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize(
    ("fused", "first", "kept"),
    [(0.020, 0.030, FUSED), (0.030, 0.020, FIRST), (0.020, 0.020, FUSED), (0.0200, 0.0197, FUSED)],
)
def test_the_faster_order_is_kept(fused: float, first: float, kept: bool, lanes: int) -> None:
    deployment = Deployment(fused, first, lanes=lanes).decode(SEARCH + 8 * lanes)
    assert deployment.order.fused == kept
    assert not deployment.order.trying
    assert deployment.ran.count(not kept) >= ROUNDS * WINDOW
    assert {*deployment.decode(HOLD // 2).ran[-HOLD // 4 :]} == {kept}


def test_each_order_is_measured_in_turn_since_a_machine_drifts() -> None:
    deployment = Deployment(0.020, 0.018)
    while not deployment.order.trying:
        deployment.decode(1)
    while deployment.order.trying or len(deployment.ran) < SEARCH:
        deployment.decode(1)
        if len(deployment.ran) == WINDOW:
            deployment.drift(0.7)  # after the first measurement, of fused
    assert deployment.order.fused == FIRST
    turns = [order for at, order in enumerate(deployment.ran) if not at or deployment.ran[at - 1] != order]
    assert turns[:4] == [FUSED, FIRST, FUSED, FIRST]


def test_what_is_interrupted_is_measured_anew_and_meanwhile_rows_are_fused() -> None:
    deployment = Deployment(0.030, 0.020).decode(WINDOW + WINDOW // 2)
    assert (deployment.order.fused, deployment.order.trying) == (FIRST, True)
    deployment.order.interrupted()
    assert (deployment.order.fused, deployment.order.trying) == (FUSED, False)
    deployment.decode(4 * ROUNDS * WINDOW)
    deployment.order.interrupted()
    assert deployment.order.fused == FIRST  # the choice stays


def test_batches_that_are_always_interrupted_stay_fused() -> None:
    deployment = Deployment(0.030, 0.020)
    for _ in range(40):
        deployment.decode(WINDOW // 2)
        deployment.order.interrupted()
    assert {*deployment.ran} == {FUSED}


def test_other_holders_are_measured_anew() -> None:
    deployment = Deployment(0.030, 0.020).decode(SEARCH)
    deployment.seconds[FIRST] = 0.040
    deployment.order.reset()
    assert deployment.order.fused == FUSED
    deployment.decode(SEARCH)
    assert deployment.order.fused == FUSED


def test_after_long_both_are_tried_again() -> None:
    deployment = Deployment(0.020, 0.030).decode(SEARCH)
    deployment.seconds[FIRST] = 0.010
    deployment.decode(HOLD + SEARCH)
    assert deployment.order.fused == FIRST


@pytest.mark.parametrize("fused", [True, False])
def test_an_order_that_was_given_stays(fused: bool) -> None:
    order = OrderTuner(fused=fused)
    for at in range(5 * WINDOW):
        order.completed(8, 8, 1, float(at))
        if at % 7 == 0:
            order.interrupted()
    order.reset()
    assert (order.fused, order.trying) == (fused, False)


def test_the_choice_is_logged_with_both_figures(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lamina"):
        Deployment(0.020, 0.025).decode(SEARCH)
        Deployment(0.032, 0.025).decode(SEARCH)
    one, other = [record.getMessage() for record in caplog.records]
    assert one.startswith("in decode q, k and v go together")
    assert other.startswith("in decode q goes first")
    assert one.endswith("for 8 sequences in 1 lanes: q, k and v together: 400.0, q first: 320.0")
    assert other.endswith("q, k and v together: 250.0, q first: 320.0")
