"""What `import lamina` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import lamina


def test_the_public_names() -> None:
    assert lamina.__all__ == [
        "LLM",
        "Completion",
        "EngineError",
        "Interrupted",
        "InvalidRequest",
        "LaminaError",
        "ModelFileError",
        "Sample",
        "SamplingParams",
        "Timing",
        "TokenEvent",
        "TokenLogprob",
        "UnsupportedModelError",
        "Usage",
        "close",
        "generate",
        "stream",
    ]
    assert [name for name in lamina.__all__ if not hasattr(lamina, name)] == []


def test_the_version_is_that_of_the_package() -> None:
    assert lamina.__version__ == metadata.version("lamina")


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, lamina; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {"torch", "numpy", "numba", "ray", "tokenizers", "rich", "typer"}.isdisjoint(loaded)
