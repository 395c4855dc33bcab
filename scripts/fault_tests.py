#!/usr/bin/env python
"""The tests of each group of faults of docs/reliability.md, as a table: those marked `@pytest.mark.fault("F07")`.

scripts/fault_tests.py [F07 ...]
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"


def fault_tests() -> Mapping[str, Sequence[str]]:
    """`file::test` below tests/ of each group, by its number."""
    groups: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for group in _marks(node):
                    groups[group].append(f"{path.relative_to(TESTS).as_posix()}::{node.name}")
    return groups


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
