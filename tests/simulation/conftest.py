"""Settings of the simulation's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Generators of killed processes end when they are collected, at edges that refuse whatever a killed process does.
KILLED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(KILLED)
