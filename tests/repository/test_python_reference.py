"""docs/python.md is what `scripts/python_reference` makes of the docstrings of now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_python_reference_is_what_the_docstrings_say() -> None:
    checked = subprocess.run([sys.executable, str(ROOT / "scripts" / "python_reference"), "--check"], timeout=120)
    assert checked.returncode == 0, "docs/python.md is old: run scripts/python_reference"
