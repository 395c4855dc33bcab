"""Drawn cases: the same for everybody, fresh ones where they are asked for, and made small within a test's time."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import engine


def test_cases_are_fixed_unless_fresh_ones_are_asked_for() -> None:
    fixed, fresh = settings.get_profile("lamina"), settings.get_profile("soak")
    assert fixed.derandomize
    assert not fresh.derandomize
    assert fresh.print_blob
    chosen = fresh if os.environ.get("LAMINA_DRAW") == "fresh" else fixed
    assert settings().derandomize == chosen.derandomize


def test_shrinking_ends_before_a_tests_time(pytestconfig: pytest.Config) -> None:
    assert float(pytestconfig.getini("timeout")) > 3 * engine.MAX_SHRINKING_SECONDS
