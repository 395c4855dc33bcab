"""A scenario of scripts/evaluate/faults.py, as it is run for the table of docs/internals/reliability.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.data, pytest.mark.real, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate" / "faults.py"


def test_a_scenario_holds_and_its_figures_are_written(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--only", "worker killed", "--seconds", "3", "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (row,) = json.loads((tmp_path / "faults.json").read_text())["scenarios"]
    assert row["scenario"] == "worker killed"
    assert row["done"] > 0
    assert (row["lost"], row["tokens_lost"], row["changed"], row["problems"]) == (0, 0, 0, [])
    assert (tmp_path / "faults.md").read_text().strip() in ended.stdout
