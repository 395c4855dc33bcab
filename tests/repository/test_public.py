"""What `import lamina` offers, and what it costs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib import metadata, resources
from typing import get_type_hints

import pytest

import lamina
from lamina import errors
from lamina.config import EngineConfig, EngineKeywords
from lamina.sampling_params import SamplingKeywords, SamplingParams


def test_the_public_names() -> None:
    assert lamina.__all__ == [
        "LLM",
        "Completion",
        "Embedding",
        "EngineConfig",
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
        "chat",
        "close",
        "configure",
        "connect",
        "embed",
        "generate",
        "stream",
    ]
    assert [name for name in lamina.__all__ if not hasattr(lamina, name)] == []
    assert set(lamina.__all__) <= set(dir(lamina))


@pytest.mark.parametrize(("keywords", "checked"), [(EngineKeywords, EngineConfig), (SamplingKeywords, SamplingParams)])
def test_keywords_for_type_checkers_are_the_fields(keywords: type, checked: type) -> None:
    fields = dataclasses.fields(checked)  # type: ignore[arg-type]  # a dataclass, whatever its type
    hints = get_type_hints(checked)
    assert get_type_hints(keywords) == {field.name: hints[field.name] for field in fields}


@pytest.mark.parametrize("package", ["lamina", "lamina_workers", "lamina_kernels", "lamina_protocols"])
def test_each_package_says_that_it_is_typed(package: str) -> None:
    assert (resources.files(package) / "py.typed").is_file()


def test_the_tree_of_errors_names_what_can_be_imported_from_it() -> None:
    assert set(errors.__all__) - {"cut"} <= set((errors.__doc__ or "").split())


def test_the_version_is_that_of_the_package() -> None:
    assert lamina.__version__ == metadata.version("lamina")


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, lamina; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {"torch", "numpy", "numba", "ray", "tokenizers", "rich", "typer"}.isdisjoint(loaded)
