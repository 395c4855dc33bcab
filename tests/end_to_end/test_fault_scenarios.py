"""Two scenarios of scripts/evaluate/faults.py, as they are run for the table of docs/reliability.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.data, pytest.mark.real, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate" / "faults.py"


def test_scenarios_hold_and_their_figures_are_written(tmp_path: Path) -> None:
    names = ["worker killed", "engine killed"]
    command = [sys.executable, str(SCRIPT), "--only", *names, "--seconds", "3", "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads((tmp_path / "faults.json").read_text())["scenarios"]
    assert [row["scenario"] for row in rows] == names
    for row in rows:
        assert row["done"] > 0
        assert (row["lost"], row["tokens_lost"], row["changed"], row["problems"]) == (0, 0, 0, [])
    assert (tmp_path / "faults.md").read_text().strip() in ended.stdout
