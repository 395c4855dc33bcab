"""Groups of options: their fields become a command's options, and the command gets instances."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from lamina.cli.options import EngineOptions, PromptOptions, SamplingOptions, Without, flatten_options
from lamina.cli.terminal import print_rows
from lamina.errors import InvalidRequest
from lamina.sampling_params import SamplingParams


@dataclass(frozen=True)
class Paint:
    """A group with one argument that is required, and options with defaults."""

    colour: Annotated[str, typer.Argument()]
    coats: Annotated[int, typer.Option(help="How often.")] = 2
    gloss: Annotated[bool, typer.Option("--gloss/--matt")] = False


calls: list[tuple[object, ...]] = []
app = typer.Typer()


@app.command()
@flatten_options
def whole(first: Annotated[int, typer.Option()] = 1, *, paint: Paint, last: Annotated[int, typer.Option()] = 9) -> None:
    calls.append((first, paint, last))


@app.command()
@flatten_options
def short(paint: Annotated[Paint, Without(frozenset({"gloss"}))]) -> None:
    calls.append((paint,))


def invoke(*words: str) -> int:
    calls.clear()
    return CliRunner().invoke(app, list(words)).exit_code


def test_group_comes_as_an_instance_when_its_fields_are_options() -> None:
    assert invoke("whole", "red", "--gloss", "--first", "3") == 0
    assert calls == [(3, Paint("red", 2, True), 9)]


def test_help_lists_a_group_in_the_place_of_its_parameter() -> None:
    shown = CliRunner().invoke(app, ["whole", "--help"]).output
    places = [shown.index(name) for name in ("--first", "--coats", "--gloss", "--last")]
    assert places == sorted(places)
    assert "How often." in shown


def test_field_without_a_default_is_required_when_the_group_is_taken() -> None:
    assert invoke("whole") == 2
    assert not calls


def test_dropped_field_keeps_its_default_when_a_command_does_not_take_it() -> None:
    assert invoke("short", "red") == 0
    assert calls == [(Paint("red"),)]
    assert invoke("short", "red", "--gloss") == 2


def test_sampling_has_the_defaults_of_the_params_when_nothing_was_given() -> None:
    assert SamplingOptions(stop=[]).params() == SamplingParams()
    assert SamplingOptions(temperature=0.0, stop=["x"]).params() == SamplingParams(temperature=0.0, stop=["x"])


@pytest.mark.parametrize("prompts", [None, [], ["a", ""]])
def test_prompts_are_refused_when_there_is_none_or_an_empty_one(
    prompts: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(InvalidRequest, match="prompt"):
        PromptOptions(prompts).texts()


def test_a_table_wider_than_the_terminal_folds_its_widest_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    print_rows([("system", "$/h"), ("a name of many words that no line can hold at once", "12.50")])
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0].rstrip().endswith("$/h")
    assert lines[1].rstrip().endswith("12.50")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_autoscale_is_two_numbers() -> None:
    assert EngineOptions(autoscale="1:3").config() == {"autoscale": (1, 3)}
    with pytest.raises(typer.BadParameter, match="--autoscale is '3'; allowed is MIN:MAX"):
        EngineOptions(autoscale="3").config()
