"""How child processes start: what they import, and what they inherit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.system.child_process import KEY_VARIABLE, module_command, start_child
from lamina.text.chat_template import ChatTemplate

PLANTED = ("grpc", "jinja2", "json", "logging", "msgpack", "numpy", "pip", "runpy", "torch", "typer", "uvicorn")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, as a stranger made it: each of its modules says in `ran` that it was imported."""
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ran"


@pytest.mark.fault("F22")
@pytest.mark.parametrize(
    "command",
    [
        ("lamina.server.processes.http_main",),
        ("lamina_workers.attention_main", "--help"),
        ("lamina_workers.model_main", "--help"),
        ("pip", "--version"),
    ],
)
def test_no_child_imports_from_the_working_folder(planted: Path, command: tuple[str, ...]) -> None:
    """`python -m` has the working folder first on its path, so that `lamina serve .` ran a model's uvicorn.py."""
    child = start_child(module_command(*command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert child.wait(100) == 0
    assert not planted.exists(), planted.read_text()


def test_a_chat_template_is_rendered_by_this_jinja(planted: Path) -> None:
    """As above; this child's working folder was the one that has the package, site-packages for an installed one."""
    template = ChatTemplate("{{ messages[0] }}")
    assert template.render([{"a": "b"}]) == "{'a': 'b'}"
    template.close()
    assert not planted.exists(), planted.read_text()


def test_a_module_runs_as_the_main_one_with_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shown.py").write_text("import sys; print(__name__, __spec__.name, sys.argv)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = subprocess.run(module_command("shown", "-a", ""), capture_output=True, text=True, check=True).stdout
    assert said == f"__main__ shown ['{tmp_path / 'shown.py'}', '-a', '']\n"


def test_a_child_inherits_all_but_the_keys_and_its_children_are_safe_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's API keys were in the environment of the engine and of every attention worker."""
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    monkeypatch.setenv("A", "1")
    command = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    child = start_child(command, {"B": "2"}, stdout=subprocess.PIPE)
    inherited = json.loads(child.communicate(timeout=60)[0])
    assert KEY_VARIABLE not in inherited
    assert (inherited["A"], inherited["B"], inherited["PYTHONSAFEPATH"]) == ("1", "2", "1")
