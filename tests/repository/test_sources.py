"""What the sources of the packages may do: nothing runs what it reads, one function starts processes, and the wall
clock, which jumps, gives times that people see, but no deadline and no duration."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("lamina", "workers/lamina_workers", "kernels/lamina_kernels", "protocols/lamina_protocols")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"torch.load", "torch.save", "jit.load", "numpy.load", "np.load", "package.PackageImporter"}
METHODS |= {"multiprocessing.Pipe", "multiprocessing.Queue"}  # of whatever object: too many modules have a `load`
STARTS = {"Popen", "run", "call", "check_call", "check_output", "getoutput", "getstatusoutput"}
OS_STARTS = ("system", "popen", "fork", "exec", "spawn", "posix_spawn")
WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today"}
SHOWN = {
    "lamina/cli/bench.py": "the date of a report",
    "lamina/cli/doctor.py": "in how many days a certificate ends",
    "lamina/cli/simulate.py": "the date of a report",
    "lamina/joining/server.py": "since when a machine is in its state",
    "lamina/ray_cluster/actor.py": "the age of a folder that an earlier process left",
    "lamina/server/metrics/tracing.py": "the times of spans",
    "lamina/server/openai/answers.py": "`created`",
    "lamina/server/openai/model_routes.py": "`created`",
    "lamina/server/openai/responses/events.py": "`created_at`",
    "lamina/server/page/page.py": "the times of events",
    "lamina/server/processes/kv_events.py": "the times of events",
    "lamina/server/processes/running.py": "how long a server has run, by the time of its file",
    "lamina/server/processes/supervisor.py": "the age of a folder that an earlier process left",
    "lamina/text/chat_template_child.py": "the date that a chat template asks for",
    "workers/lamina_workers/process/credentials.py": "from when to when a certificate is valid",
}


@cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(source)))


@pytest.fixture(autouse=True, scope="module")
def _trees_are_let_go() -> Iterator[None]:
    """Each collection of garbage would look at them to the end of the run."""
    yield
    nodes.cache_clear()


def dotted(attribute: ast.Attribute) -> str:
    """The names before and after the last dot."""
    value = attribute.value
    return f"{value.id if isinstance(value, ast.Name) else getattr(value, 'attr', '')}.{attribute.attr}"


def unsafe(source: str) -> list[str]:
    """What runs what it reads: pickle, eval, or what unpickles by another name."""
    offences = []
    for node in nodes(source):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            package = (node.module or "").rpartition(".")[2]
            offences += METHODS & {f"{package}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            offences.append(node.func.id)
        elif isinstance(node, ast.Attribute) and dotted(node) in METHODS:
            offences.append(dotted(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            offences.append("allow_pickle")
        offences += [name for name in names if MODULES & set(name.split("."))]
    return offences


def starts(source: str) -> list[int]:
    """The lines that start a process."""
    return [
        node.lineno
        for node in nodes(source)
        if isinstance(node, ast.Call)
        and isinstance(function := node.func, ast.Attribute)
        and isinstance(module := function.value, ast.Name)
        and (
            (module.id == "subprocess" and function.attr in STARTS)
            or (module.id == "os" and function.attr.startswith(OS_STARTS))
        )
    ]


def readings(source: str) -> list[str]:
    """Where a wall clock is read, or handed on to be read."""
    return [dotted(node) for node in nodes(source) if isinstance(node, ast.Attribute) and dotted(node) in WALL]


@pytest.mark.fault("F22")
def test_no_source_runs_what_it_reads() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == {"lamina", "workers", "kernels", "protocols"}
    assert {str(path): offences for path in SOURCES if (offences := unsafe(path.read_text()))} == {}


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
def test_the_walk_finds_what_runs_what_it_reads(source: str) -> None:
    assert unsafe(source)


@pytest.mark.fault("F32")
def test_every_child_is_started_by_the_same_function() -> None:
    """Five files had a `python -m` of their own, four of them with the working folder on the path."""
    lines = {path.relative_to(ROOT).as_posix(): starts(path.read_text()) for path in SOURCES}
    assert [(path, len(found)) for path, found in lines.items() if found] == [("lamina/system/child_process.py", 1)]
    assert starts("subprocess.run(x)\nos.execv(y)\nos.forkpty()") == [1, 2, 3]


@pytest.mark.fault("F27")
def test_only_what_people_see_is_by_the_wall_clock() -> None:
    assert {path.relative_to(ROOT).as_posix() for path in SOURCES if readings(path.read_text())} == set(SHOWN)
    assert readings("f(time.time)\nx = datetime.datetime.now()") == ["time.time", "datetime.now"]
