"""A model that writes what a client wants it to: every parser takes it apart the same however it is cut, and its work,
which is counted, not measured, grows as the text does."""

from __future__ import annotations

import inspect
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_reply import completion, prepared
from server_rig import serving
from small_replies import cut_at, taken_apart

from lamina import LLM
from lamina.server.anthropic.blocks import MessageWriter
from lamina.server.chat.formats import harmony, hermes, json_calls, llama3, mistral, qwen3_coder
from lamina.server.chat.formats.family import THINK
from lamina.server.chat.formats.reply_parser import ReplyParser, Tags
from lamina.server.chat.reply import Reply

PARSERS = {
    "hermes": hermes.HermesParser,
    "llama 3": llama3.Llama3Parser,
    "mistral": mistral.MistralParser,
    "qwen3-coder": qwen3_coder.Qwen3CoderParser,
    "gpt-oss": harmony.HarmonyParser,
}
FUNCTIONS = {"ping": {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}}}, "f": {}}
MARKS = (
    *(THINK.open, THINK.close, "```", "json", "<tool_call>", "</tool_call>", "<tools>", "</tools>", "<|python_tag|>"),
    *("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[", "f", "ping", ",", ', "id": "', "x", '"', "\\", ";", "{", "}", "}}"),
    *("<function=", "<function=ping>", "</function>", "<parameter=", "<parameter=a>", "<parameter=n>", "</parameter>"),
    *("<|channel|>", "<|start|>", "<|message|>", "<|end|>", "<|call|>", "assistant", "analysis", " to=functions.f"),
    *(
        '{"name": "ping", "arguments": {',
        '{"name": "f", "parameters": {',
        '{"type": "function", "name": "',
        "</s>",
        "<",
    ),
)
SPACES = (" ", "\n", "\n \t", "\u3000")
EDGES = (1, 2, 13, 255, 256, 257, 320, 321, 511, 700)
MOST_AT_ONCE = 1 << 11  # characters: a piece, and what may be held back


class Made:
    """As a `ReplyPlan`: parsers of one kind."""

    def __init__(self, name: str, tags: Tags | None, opened: bool) -> None:
        self._arguments = (PARSERS[name], tags, opened)

    def parser(self) -> ReplyParser:
        kind, tags, opened = self._arguments
        return kind(tags, opened, FUNCTIONS, lambda: "id", ("</s>",), len)


def plans(name: str) -> st.SearchStrategy[Any]:
    """With reasoning that the prompt has opened, that the model may open, and without any."""
    return st.sampled_from([Made(name, THINK, True), Made(name, THINK, False), Made(name, None, False)])


runs = st.builds(lambda space, count: (space * count)[:count], st.sampled_from(SPACES), st.sampled_from(EDGES))
names = st.builds(lambda count: "x" * count, st.sampled_from(EDGES))
written = st.lists(st.one_of(st.sampled_from(MARKS), runs, names), max_size=14).map("".join)


def test_every_parser_is_tried() -> None:
    kinds, kept = [ReplyParser], set()
    for kind in kinds:
        kinds += kind.__subclasses__()
        if kind.__module__.startswith("lamina.") and not kind.__subclasses__():
            kept.add(kind)
    assert kept == set(PARSERS.values())


@pytest.mark.fault("F23")
@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=150)
@given(data=st.data())
def test_a_hostile_reply_is_the_same_however_it_is_cut(name: str, data: st.DataObject) -> None:
    plan, text = data.draw(plans(name)), data.draw(written)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    whole = taken_apart(plan, [text])
    assert taken_apart(plan, cut_at(text, cuts)) == whole
    assert taken_apart(plan, text) == whole


def work(parser: ReplyParser, pieces: Sequence[str]) -> int:
    """How many characters the parser's states were given in all. None ever gets many at once."""
    given: list[int] = []

    def counted(state: Any) -> Any:
        def read(text: str, ended: bool, deltas: Any) -> Any:
            given.append(len(text))
            return state(text, ended, deltas)

        return read

    for name, state in inspect.getmembers(parser, inspect.ismethod):
        if [*inspect.signature(state).parameters] == ["text", "ended", "deltas"]:
            setattr(parser, name, counted(state))
    for piece in pieces:
        parser.push(piece)
    parser.finish()
    assert max(given, default=0) <= MOST_AT_ONCE
    return sum(given)


@pytest.mark.fault("F23")
@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=30)
@given(data=st.data())
def test_twice_the_text_is_twice_the_work(name: str, data: st.DataObject) -> None:
    """A whole answer of "```" and white space stopped the HTTP process for minutes: four times the work for twice the
    text."""
    plan, head, unit = data.draw(plans(name)), data.draw(written), data.draw(written.filter(bool))
    text = unit * (4000 // len(unit) + 1)
    for size in (None, 80, 3):

        def cut(text: str, size: int | None = size) -> list[str]:
            return [text[at : at + (size or len(text))] for at in range(0, len(text), size or len(text))]

        once, twice = (work(plan.parser(), cut(head + text * times)) for times in (1, 2))
        assert twice <= 3 * once + 4 * MOST_AT_ONCE


@contextmanager
def ending_within(seconds: float) -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


PATTERNS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": pattern
    for module in (harmony, hermes, json_calls, llama3, mistral, qwen3_coder)
    for name, pattern in vars(module).items()
    if isinstance(pattern, re.Pattern)
}


@pytest.mark.fault("F23")
@pytest.mark.parametrize("name", PATTERNS)
def test_no_pattern_tries_white_space_again_and_again(name: str) -> None:
    """200,000 spaces take milliseconds, and by the square of their number half a minute."""
    heads = ["json", "{", '{"name"', '{"type": "function"', '{"name": "f", "arguments":', "f", "f[CALL_ID]", "[", ","]
    heads += [
        "f[CALL_ID]x",
        ', "id": "x"',
        "<function=",
        "<function=f",
        "<parameter=x>",
        "<|channel|>",
        "to=functions.",
    ]
    with ending_within(10):
        for head in ("", *heads):
            for tail in ("", "x", "[ARGS]"):
                PATTERNS[name].match(head + " " * 200_000 + tail + " " * 200_000)


@pytest.mark.fault("F23")
@pytest.mark.parametrize("arguments", ['{"a": ' + "[" * 200_000, '{"a": NaN}', '{"a": 1e999}', "[]", '{"a": 1' * 3])
def test_arguments_that_are_no_json_end_no_message(arguments: str) -> None:
    (sample,) = completion(["!ping", f"+{arguments}"], "stop").samples
    whole = MessageWriter(prepared(), "msg_1", "m", False).whole(sample)
    assert whole["content"][0]["input"] == {}


@pytest.mark.fault("F23")
@pytest.mark.data
def test_whole_answers_are_read_on_a_thread(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop serves everybody."""
    threads = []
    finish = Reply.finish

    def noted(reply: Reply, sample: Any) -> Any:
        threads.append(threading.current_thread().name)
        return finish(reply, sample)

    monkeypatch.setattr(Reply, "finish", noted)
    said = [{"role": "user", "content": "Hi"}]
    with serving(llm) as rig:
        for path, fields in (
            ("/v1/chat/completions", {"messages": said, "max_tokens": 2}),
            ("/v1/responses", {"input": said, "max_output_tokens": 2}),
            ("/v1/messages", {"messages": said, "max_tokens": 2}),
        ):
            assert rig.ask(path, fields).status == 200
    assert [name.rpartition("_")[0] for name in threads] == ["lamina-answers"] * 3
