"""`scripts/python_reference` writes what is public, from the docstrings of now."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import lamina

ROOT = Path(__file__).parents[2]


def test_the_python_reference_has_every_public_name_and_setting() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "python_reference")]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    settings = [
        field.name for kind in (lamina.EngineConfig, lamina.SamplingParams) for field in dataclasses.fields(kind)
    ]
    assert [name for name in (*lamina.__all__, *settings) if f"`{name}`" not in text] == []
    assert "The longest sequence in tokens" in text
