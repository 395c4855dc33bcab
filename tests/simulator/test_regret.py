"""The chosen plan beside the best of all candidates, by the event loop: small cases of `scripts/simulate/regret.py`."""

from __future__ import annotations

from simulate.regret import CASES, Case, regret

SMALL = Case("llama-3-8b", (("l4", 2),), "azure-code", 0.2, 0.1, 4.0, ("ethernet-25g",), count=120)


def test_little_is_lost_by_looking_at_few() -> None:
    found = regret(SMALL, 120)
    assert found.lost <= 0.03
    assert found.simulated >= 1
    assert found.chosen.name in str(found)


def test_the_cases_are_twelve() -> None:
    assert len(CASES) == 12
