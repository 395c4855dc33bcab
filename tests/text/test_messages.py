"""Messages: what their fields may be, what of them reaches a template, and their bounds."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from lamina.errors import InvalidRequest, cut
from lamina.text.messages import ROLES, check_messages

ONE = [{"role": "user", "content": "hi"}]


def called(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


CALL = called('{"x": [1]}')


def test_what_clients_send_back_with_an_answer_is_left_out() -> None:
    more = {
        "parsed": {"a": [1]}, "annotations": [{"type": "url_citation"}], "audio": {"id": "a"}, "reasoning": "",
        "reasoning_content": None, "refusal": None, "function_call": None, "tool_calls": None, "of_tomorrow": None,
    }  # fmt: skip
    plain = {"role": "assistant", "content": "x"}
    assert check_messages([plain | more]) == [plain]
    for name in ("reasoning_content", "reasoning"):
        assert check_messages([plain | {name: "hm"}]) == [plain | {"reasoning_content": "hm"}]
        with pytest.raises(InvalidRequest, match=rf"messages\[0\]\.{name} is 5"):
            check_messages([plain | {name: 5}])
    parts = [{"type": "text", "text": "x", "parsed": {"a": 1}, "annotations": []}]
    assert check_messages([{"role": "assistant", "content": parts}]) == [plain]
    for role in ROLES:
        cached = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
        assert check_messages([{"role": role, "content": cached}]) == [{"role": role, "content": "x"}]
    call = called('{"x": 1}') | {"index": 0}
    call["function"] |= {"parsed_arguments": {"x": 2}}
    (message,) = check_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"refusal": "I cannot."}, "I cannot."),
        ({"content": "Well.", "refusal": "I cannot."}, "Well.\nI cannot."),
        ({"content": [{"type": "refusal", "refusal": "I cannot."}]}, "I cannot."),
        ({"content": [{"type": "text", "text": "Well."}, {"type": "refusal", "refusal": "No."}]}, "Well.\nNo."),
    ],
)
def test_a_refusal_is_text(message: dict[str, Any], content: str) -> None:
    assert check_messages([{"role": "assistant"} | message])[0]["content"] == content


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hi", "at least one message"),
        (None, "at least one message"),
        (["hi"], r"messages\[0\] is 'hi'"),
        ([*ONE, {"role": "user"}], r"messages\[1\].content is None"),
        ([{"content": "x"}], r"messages\[0\].*role and content"),
        ([{"role": "user", "content": "x", "nam": "y"}], "'nam'; allowed for user are role, content, name"),
        ([{"role": "user", "content": "x", "name": 1}], r"messages\[0\].name is 1"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "'tool_calls'; allowed for user are"),
        ([{"role": "assistant", "refusal": 5}], r"messages\[0\].refusal is 5"),
        ([{"role": "assistant", "content": "x", "function_call": {"name": "f"}}], "'function_call'; allowed for"),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}], r"content\[0\].*refusal"),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "parsed": 1}]}], r"content\[0\].*parsed"),
        ([{"role": "assistant", "content": [{"type": "refusal", "text": "no"}]}], r"content\[0\].*refusal"),
        ([{"role": "assistant", "content": [{"type": ["text"], "text": "no"}]}], r"content\[0\] is"),
        ([{"role": "assistant", "tool_calls": "f"}], "tool_calls is 'f'; allowed is a list"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], r"tool_calls\[0\] is"),
        ([{"role": "assistant", "tool_calls": [called("[1]")]}], "arguments is '\\[1\\]'; allowed is the JSON text of"),
        ([{"role": "assistant", "tool_calls": [called("{")]}], "arguments is '{'"),
        ([{"role": "assistant", "tool_calls": [called('{"a":' * 65 + "1" + "}" * 65)]}], "at most 64 deep"),
        ([{"role": "assistant", "tool_calls": [called("[" * 9999)]}], "at most 64 deep"),
        ([{"role": "robot", "content": "x"}], f"'robot'; allowed are {', '.join(ROLES)}"),
        ([{"role": ["user"], "content": "x"}], "allowed are"),
        ([{"role": "user", "content": 7}], "content is 7; allowed is text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], r"content\[0\].*image"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"content\[0\].text is 1"),
    ],
)
def test_wrong_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_messages(messages)


def test_arguments_are_bounded_before_they_are_parsed() -> None:
    """The limits of a body do not see JSON within a text: 15 MB of arguments took 378 MB."""
    half = '{"a": [' + "[]," * 200_000 + "[]]}"
    calls = [{"role": "assistant", "tool_calls": [called(half)]}]
    assert check_messages(calls)
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="characters of arguments of calls; allowed are 1048576"):
        check_messages(calls * 2)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    ["x" * 5_000_000, [["y" * 1000] * 1000] * 1000, {str(at): at for at in range(500_000)}, 10**5000, [10**5000]],
    ids=["text", "lists", "object", "integer", "integers"],
)
def test_an_error_makes_no_more_text_of_a_value_than_it_shows(value: object) -> None:
    """All of a value was written out, and then cut to 80 characters; of a huge integer that is an error in Python."""
    tracemalloc.start()
    shown = cut(value)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert 0 < len(shown) <= 80
