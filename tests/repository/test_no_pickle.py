"""Nothing in the packages runs what it reads: no pickle, no eval, nothing that unpickles by another name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("lamina", "workers/lamina_workers", "kernels/lamina_kernels", "protocols/lamina_protocols")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {  # of whatever object: too many modules have a `load` to forbid that by name alone
    ("torch", "load"), ("torch", "save"), ("jit", "load"), ("numpy", "load"), ("np", "load"),
    ("multiprocessing", "Pipe"), ("multiprocessing", "Queue"), ("package", "PackageImporter"),
}  # fmt: skip


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            owner = (node.module or "").rpartition(".")[2]
            found += [f"{owner}.{alias.name}" for alias in node.names if (owner, alias.name) in METHODS]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            found.append(node.func.id)
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
            if (owner, node.attr) in METHODS:
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
        found += [name for name in names if MODULES & set(name.split("."))]
    return found


@pytest.mark.fault("F22")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert offences(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal as m",
        "from cloudpickle import loads",
        "import ray.cloudpickle",
        "torch.load(f)",
        "from torch import load",
        "torch.jit.load(f)",
        "np.load(f, allow_pickle=True)",
        "eval(text)",
        "def f():\n    exec(text)",
    ],
)
def test_the_walk_finds_what_it_looks_for(source):
    assert offences(source)


def test_every_package_was_walked():
    assert len(SOURCES) > 50
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == {"lamina", "workers", "kernels", "protocols"}
