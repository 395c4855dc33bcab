"""Commands and code of README.md, CONTRIBUTING.md and docs/**/*.md against what runs: options exist, scripts can be
started, keywords of Python examples are fields, extras are in pyproject.toml. docs/internals/log.md keeps the commands
of its time."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from lamina.cli.main import app
from lamina.config import EngineConfig
from lamina.sampling_params import SamplingParams
from lamina.simulator.planning import inventory
from lamina.system.text_files import read_toml

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
DOCUMENTS += [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "log.md"]
SCRIPTS = [path for path in sorted((ROOT / "scripts").rglob("*")) if path.suffix in (".py", "") and path.is_file()]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:lamina|scripts/[\w/]+(?:\.py)?) [^`]+)`")
EXTRA = re.compile(r"(?:lamina|\.)\[([a-z,]+)\]")
COMMENT = re.compile(r"\s+#\s.*")
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # click's, or Typer's own copy of it


def commands(document: Path) -> Iterator[tuple[str, bool]]:
    """Each command of `lamina` or of scripts/ in a document, and whether it stands in a block, so that it is whole."""
    text = document.read_text()
    for language, block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash", "sh") else ():
            command = COMMENT.sub("", line.removeprefix("$ ")).rstrip(" &")
            if command.startswith(("lamina ", "scripts/")) and "  " not in command:
                yield command, True
    for command in INLINE.findall(BLOCK.sub("", text)):
        yield " ".join(command.split()), False


@cache
def cli() -> Any:
    return typer.main.get_command(app)


def check(words: list[str], whole: bool) -> None:
    """Read a command line as `lamina` does, without running it. One that is not whole may lack arguments."""
    command, name = cli(), "lamina"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name, *words = words
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    if not hasattr(command, "commands"):
        command.make_context(name, words, resilient_parsing=not whole)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_a_document_can_be_run_as_written(document: Path) -> None:
    for command, whole in commands(document):
        program, *words = shlex.split(command)
        try:
            if program == "lamina":
                check(words, whole)
                continue
        except (USAGE_ERROR, AssertionError) as error:
            pytest.fail(f"{document.name}: {command}: {error}")
        script = ROOT / program
        assert script in SCRIPTS, f"{document.name} runs {program}"
        source = "\n".join(each.read_text() for each in (script, *script.parent.glob("*.py")))
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in source]
        assert unknown == [], f"{document.name}: {command}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT / "scripts").as_posix())
def test_a_script_that_is_run_can_be_started_and_others_cannot(script: Path) -> None:
    text = script.read_text()
    run = '__name__ == "__main__"' in text or (script.suffix == "" and script.name != "_env")
    assert (text.startswith("#!"), bool(script.stat().st_mode & 0o111)) == (run, run)


def python_blocks(document: Path) -> list[str]:
    return [block for language, block in BLOCK.findall(document.read_text()) if language == "python"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_of_a_document_uses_keywords_that_exist(document: Path) -> None:
    engine = {field.name for field in dataclasses.fields(EngineConfig)} | {"model", "progress"}
    sampling = {field.name for field in dataclasses.fields(SamplingParams)} | {"model", "priority"}
    for call in (node for block in python_blocks(document) for node in ast.walk(ast.parse(block))):
        if not isinstance(call, ast.Call) or ast.unparse(call.func) == "model.generate":  # transformers' own
            continue
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = {keyword.arg for keyword in call.keywords}
        if called == "LLM":
            assert given <= engine, f"{document.name}: {ast.unparse(call)}"
        elif called in ("generate", "stream", "chat", "SamplingParams"):
            assert given <= sampling, f"{document.name}: {ast.unparse(call)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_extras_exist_and_are_installed_from_the_clone(document: Path) -> None:
    extras = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    text = document.read_text()
    assert {name for names in EXTRA.findall(text) for name in names.split(",")} <= {*extras}
    assert "pip install 'lamina" not in text.replace('"', "'"), "the package is on no index: pip install -e '.[EXTRA]'"


def test_the_inventory_of_the_document_can_be_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "simulator.md").read_text()
    (file := tmp_path / "inventory.toml").write_text(
        next(block for kind, block in BLOCK.findall(text) if kind == "toml")
    )
    found = inventory.read(file)
    assert [(have.device.name, have.count) for have in found.have] == [("h100", 4), ("big-host", 2)]
