"""Settings of the simulation's tests."""

from __future__ import annotations

from virtual_time import ignore_killed

ignore_killed()
