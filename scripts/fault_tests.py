#!/usr/bin/env python
"""The tests of each group of faults of docs/internals/reliability.md, a table: those with `@pytest.mark.fault("F07")`.
Behind a test stands (soak) where it is marked so, and (soak in part) where some of its cases are.

scripts/fault_tests.py [F07 ...]
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

_SOAK = "pytest.mark.soak"
TESTS = Path(__file__).resolve().parents[1] / "tests"


def fault_tests() -> Mapping[str, Sequence[str]]:
    """`file::test` below tests/ of each group, by its number, each with a word where it is marked `soak`."""
    groups: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        statements = [ast.unparse(node) for node in module.body if isinstance(node, ast.Assign)]
        soak = any(text.startswith("pytestmark") and _SOAK in text for text in statements)
        for node in ast.walk(module):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for group in _marks(node):
                    word = " (soak)" if soak else _soak(node)
                    groups[group].append(f"{path.relative_to(TESTS).as_posix()}::{node.name}{word}")
    return groups


def _soak(test: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    marks = [ast.unparse(mark) for mark in test.decorator_list]
    if _SOAK in marks:
        return " (soak)"
    return " (soak in part)" if any(_SOAK in mark or mark.startswith("crossing(") for mark in marks) else ""


def _marks(test: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    calls = [call for call in test.decorator_list if isinstance(call, ast.Call)]
    return [
        ast.literal_eval(group)
        for call in calls
        if ast.unparse(call.func) == "pytest.mark.fault"
        for group in call.args
    ]


def main(wanted: Sequence[str]) -> None:
    for group, tests in sorted(fault_tests().items()):
        if not wanted or group in wanted:
            print(f"| {group} | {', '.join(tests)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
