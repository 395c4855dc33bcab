"""docs/models.md says of each native type what the code has and what tests compare."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_quantized_floats import CASES

from lamina.models.aliases import ALIASES
from lamina_workers.model_config.families import FAMILIES

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\w+) \| (yes|no) \| ([\w, ]*) \| ([\w., -]*) \| \S+ \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def script() -> Iterator[object]:
    """The script that writes the document."""
    sys.path.insert(0, str(ROOT / "scripts" / "evaluate"))
    try:
        import converted_models

        yield converted_models
    finally:
        sys.path.pop(0)


def test_the_table_is_what_its_script_writes_of_each_native_type(script: object) -> None:
    lines = {match[1]: match[0] for match in ROW.finditer(DOCUMENT)}
    assert lines.keys() == {family.model_type for family in FAMILIES.values()} | {"qwen3_5", "qwen3_5_moe"}
    for kind, line in lines.items():
        assert line == script.native_row(kind, line.split()[-2])  # type: ignore[attr-defined]


def test_types_that_were_compared_quantised_are_those_of_the_tests(script: object) -> None:
    compared: dict[str, set[str]] = {"gpt_oss": {"MXFP4"}} | {
        kind: {"FP8"} for kind in ("minimax_m2", "olmoe", "stablelm")
    }
    for name, (kind, *_) in CASES.items():
        compared.setdefault(kind, set()).add({"nv": "NVFP4", "mx": "MXFP4"}.get(name[:2], "FP8"))
    listed = script.QUANTISED  # type: ignore[attr-defined]
    assert {kind: set(ways.split(", ")) for kind, ways in listed.items()} == compared


def test_real_files_are_the_aliases(script: object) -> None:
    listed = script.REAL  # type: ignore[attr-defined]
    assert sorted(name for names in listed.values() for name in names) == sorted(ALIASES)
