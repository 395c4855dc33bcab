"""Processes are started by one function of the package, so that none imports from the working folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELPER = ROOT / "lamina/system/child_process.py"
FOLDERS = ("lamina", "workers/lamina_workers", "kernels/lamina_kernels", "protocols/lamina_protocols")
STARTS = {"Popen", "run", "call", "check_call", "check_output", "getoutput", "getstatusoutput"}
OS_STARTS = ("system", "popen", "fork", "exec", "spawn", "posix_spawn")


def starts(source: str) -> list[int]:
    """The lines that start a process."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(function := node.func, ast.Attribute)
        and isinstance(module := function.value, ast.Name)
        and (
            (module.id == "subprocess" and function.attr in STARTS)
            or (module.id == "os" and function.attr.startswith(OS_STARTS))
        )
    ]


@pytest.mark.fault("F32")
def test_every_child_is_started_by_the_same_function() -> None:
    """Five files had a `python -m` of their own, four of them with the working folder on the path."""
    found = {path: starts(path.read_text()) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert {path for path, lines in found.items() if lines} == {HELPER}
    assert len(found[HELPER]) == 1
    assert starts("subprocess.run(x)\nos.execv(y)\nos.forkpty()") == [1, 2, 3]
