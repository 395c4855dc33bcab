"""Settings of the simulation's tests."""

from __future__ import annotations

import pytest
from virtual_time import ignore_killed


@pytest.hookimpl(trylast=True)  # behind pytest's own hook for what nothing could catch
def pytest_configure() -> None:
    ignore_killed()
