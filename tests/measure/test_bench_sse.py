"""Streams cut anywhere give the same events; what is plainly text is what parsing says is text; hostile ones end."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import ProtocolError
from lamina.measure.bench.client import MAX_LINE, Chunk, EventStream, Usage, message, parse, plainly_text, read_usage

ENDS = st.sampled_from([b"\n", b"\r\n"])
PAYLOADS = st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"").replace(b"\r", b"").strip()))


@given(PAYLOADS, ENDS, st.data())
def test_events_do_not_depend_on_how_bytes_arrive(payloads, end, data):
    whole = b"".join(b"data: " + payload + end + b": a comment" + end + b"event: x" + end + end for payload in payloads)
    stream, found, at = EventStream(), [], 0
    while at < len(whole):
        step = data.draw(st.integers(1, len(whole)))
        found += stream.feed(whole[at : at + step])
        at += step
    assert found == payloads


def test_a_line_without_end_is_refused_before_it_fills_memory():
    stream = EventStream()
    for _ in range(MAX_LINE // 1024):
        stream.feed(b"x" * 1024)
    with pytest.raises(ProtocolError, match=str(MAX_LINE)):
        stream.feed(b"x")


TEXTS = st.text(max_size=20) | st.sampled_from(
    ['"content":"x"', '"usage":{', '"finish_reason":"stop"', "\\", '"', "error"]
)


@st.composite
def chunks(draw):
    text = draw(TEXTS)
    choice = draw(st.sampled_from([{"text": text}, {"delta": {"content": text}}, {"delta": {"content": None}}, {}]))
    choice = {**choice, "index": 0, "finish_reason": draw(st.sampled_from([None, "stop"]))}
    if draw(st.booleans()):
        choice["logprobs"] = {"content": [{"token": draw(TEXTS)}]}
    fields = {"id": draw(TEXTS), "choices": [choice], "usage": draw(st.sampled_from([None, {"prompt_tokens": 3}]))}
    keys = draw(st.permutations(sorted(fields)))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    return json.dumps(
        {key: fields[key] for key in keys}, separators=separators, ensure_ascii=draw(st.booleans())
    ).encode("utf-8", "replace")


@given(chunks())
def test_what_is_plainly_text_is_text_without_end_or_usage(payload):
    parsed = parse(payload)
    if plainly_text(payload):
        assert (parsed.text, parsed.finish, parsed.usage, parsed.error) == (True, "", None, "")


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize(
    "choice", [{"delta": {"content": "a"}}, {"text": '"quoted"'}, {"delta": {"content": "\u00e9"}}]
)
def test_usual_chunks_are_not_parsed(choice, separators):
    fields = {"id": "c-1", "choices": [{"index": 0, "logprobs": None, "finish_reason": None, **choice}], "usage": None}
    assert plainly_text(json.dumps(fields, separators=separators).encode())


@pytest.mark.parametrize(
    "payload",
    [
        b'{"error": {"message": "\\"content\\":\\"x\\""}}',
        b'{"error": "x", "choices": [{"text": "a"}]}',
        b'{"choices": [{"delta": {"content": ""}}]}',
        b'{"choices": [{"text": "a"}], "usage": {}}',
        b'{"choices": [{"text": "a", "finish_reason": "stop"}]}',
        b'{"choices": [{"text": "a"}]',
        b'{"content": "a"}',
        b'"content":',
        b"",
    ],
)
def test_all_else_is_looked_at(payload):
    assert not plainly_text(payload)


def test_what_chunks_say():
    assert parse(b'{"choices": [{"delta": {"role": "assistant", "content": ""}}]}') == Chunk()
    assert parse(b'{"choices": [{"text": "", "finish_reason": "stop"}]}') == Chunk(output=True, finish="stop")
    assert parse(b'{"choices": [{"delta": {"tool_calls": [{}]}}]}') == Chunk(text=True, output=True)
    assert parse(b'{"choices": [{"delta": {"reasoning_content": "hm"}}]}').text
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}
    assert parse(json.dumps({"choices": [], "usage": usage}).encode()) == Chunk(usage=Usage(5, 7, 4))
    assert parse(b'{"usage": {"completion_tokens": 7}}') == Chunk(usage=Usage(None, 7, None))
    assert parse(b'{"choices": [], "prompt_filter_results": []}') == Chunk()
    assert parse(b'{"object": "error", "message": "it broke"}') == Chunk(error="it broke")
    assert parse(b'{"error": {"message": "it\\nbroke"}}') == Chunk(error="it broke")


@pytest.mark.parametrize(
    "payload", [b"{", b"[]", b"1", b"{}", b'{"choices": 3}', b'{"choices": [4]}', b"[" * 100000, b"\xff"]
)
def test_what_is_no_chunk_is_an_error(payload):
    with pytest.raises(ProtocolError):
        parse(payload)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3)))
def test_counts_are_counts(value):
    fields = {"prompt_tokens": value, "completion_tokens": value, "prompt_tokens_details": {"cached_tokens": value}}
    found = read_usage(fields)
    expected = value if type(value) is int and 0 <= value < 1 << 31 else None
    assert found == Usage(expected, expected, expected)
    assert read_usage(value) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ({"message": "a"}, "a"),
        ({"error": {"message": "a"}}, "a"),
        ({"detail": "a"}, "a"),
        ("a\n b", "a b"),
        ("", "no message"),
        ({"error": None}, "{'error': None}"),
        ({"message": "x" * 999}, "x" * 200),
    ],
)
def test_words_of_errors(error, words):
    assert message(error) == words
