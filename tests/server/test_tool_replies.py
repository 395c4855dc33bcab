"""Raw replies of real models that were given tools, with the calls that a person reads in them: these are found, and no
others, however a reply is cut. `tool_replies.jsonl` has the replies that scripts/evaluate/tool_replies.py has made.

Each line has the model, the functions that it was given, its text, and the calls: names, and arguments as JSON text.
Those of a call that was cut are what there is of them. A function that was not given cannot be called.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from small_replies import CHATML, cut_at, taken_apart, tokenizer_with

from lamina.server.chat.reply_format import ReplyFormat, ReplyPlan
from lamina.text.tokenizer import Tokenizer

FILE = Path(__file__).with_name("tool_replies.jsonl")
ROWS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
CALLING = [row for row in ROWS if row["calls"]]
SILENT = [row for row in ROWS if not row["calls"]]
MODELS = {"smollm2-135m", "gemma-3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of all these models the replies are of the Hermes form."""
    return tokenizer_with(tmp_path_factory.mktemp("model"), CHATML + "{{ tools }}<tool_call>")


def plan(tokenizer: Tokenizer, row: dict[str, Any]) -> ReplyPlan:
    tools = [{"type": "function", "function": {"name": name}} for name in row["functions"]]
    return ReplyFormat.of(tokenizer).plan(tools)


def calls_of(plan: ReplyPlan, pieces: list[str]) -> list[tuple[str, Any]]:
    """The calls, their arguments as values; as text where they were cut."""
    return [(name, value_of(arguments)) for name, arguments in taken_apart(plan, pieces)[2]]


def value_of(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def test_there_are_enough_of_each_kind() -> None:
    assert len(CALLING) >= 200
    assert len(SILENT) >= 200
    assert {row["model"] for row in ROWS} >= MODELS


def test_the_calls_of_replies_are_found(tokenizer: Tokenizer) -> None:
    missed = []
    for row in CALLING:
        wanted = [(name, value_of(arguments)) for name, arguments in row["calls"]]
        if calls_of(plan(tokenizer, row), [row["text"]]) != wanted:
            missed.append(row["text"])
    assert len(missed) <= 0.01 * len(CALLING), missed


def test_no_call_is_found_where_there_is_none(tokenizer: Tokenizer) -> None:
    for row in SILENT:
        thought, content, calls = taken_apart(plan(tokenizer, row), [row["text"]])
        assert (thought, calls) == ("", []), row["text"]
        assert content == row["text"]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_an_escaped_apostrophe_is_read_as_one(tokenizer: Tokenizer, quote: str) -> None:
    text = '{"name": "say", "arguments": {"text": ' + quote + r"it\'s \\ \n" + quote + "}}"
    for pieces in ([text], list(text)):
        assert calls_of(plan(tokenizer, {"functions": ["say"]}), pieces) == [("say", {"text": "it's \\ \n"})]


def test_a_stream_has_the_same_calls(tokenizer: Tokenizer) -> None:
    """Cut into tokens of some characters, and at drawn places."""
    source = random.Random(43)
    for row in ROWS:
        text, made = row["text"], plan(tokenizer, row)
        whole = taken_apart(made, [text])
        for cuts in (range(0, len(text), source.randint(1, 7)), source.choices(range(len(text) + 1), k=4)):
            assert taken_apart(made, cut_at(text, cuts)) == whole, text
