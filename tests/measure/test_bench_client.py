"""The client of benches: streams cut anywhere give the same answer, and each way in which a server fails is named."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock_openai_server import NAME, Behaviour, serving

from lamina.errors import EngineError, InvalidRequest, ProtocolError
from lamina.measure.bench import client
from lamina.measure.bench.client import (
    MAX_LINE,
    Answer,
    Chunk,
    Client,
    EventStream,
    Usage,
    checked_url,
    message,
    parse,
    plainly_text,
    read_usage,
    request_body,
)


def sent(behaviour, endpoint="chat", output=6, timeout=20.0, key=None, times=1):
    """The outcomes of requests one after another, and the server that answered them."""

    async def ask():
        async with serving(behaviour) as (url, server), Client(url, key, timeout) as client:
            body = request_body(endpoint, NAME, "some words here", output)
            return [await client.send(endpoint, body, planned=3, asked=output) for _ in range(times)], server

    return asyncio.run(ask())


@pytest.mark.parametrize("spaced", [True, False])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_streamed_answer_is_timed_and_counted(endpoint, spaced):
    (outcome,), server = sent(Behaviour(ttft=0.05, itl=0.02, cached=2, spaced=spaced), endpoint)
    assert (outcome.error, outcome.finish) == ("", "length")
    assert (outcome.prompt, outcome.output, outcome.cached, len(outcome.chunks)) == (4, 6, 2, 6)
    assert outcome.ttft >= 0.05
    assert all(after - before >= 0.005 for before, after in zip(outcome.chunks, outcome.chunks[1:], strict=False))
    assert outcome.chunks[-1] - outcome.chunks[0] >= 5 * 0.02 - 0.005
    assert outcome.sent < outcome.chunks[0] <= outcome.chunks[-1] <= outcome.ended
    fields = server.behaviour.requests[0]
    assert fields["stream_options"] == {"include_usage": True}
    assert (fields["max_tokens"], fields["temperature"], fields["model"]) == (6, 0, NAME)


def test_an_answer_of_special_tokens_alone_is_one():
    (outcome,), _ = sent(Behaviour(fails=lambda n: "no text"))
    assert (outcome.error, outcome.output_tokens, len(outcome.chunks)) == ("", 6, 1)


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        ("500", "HTTP 500", "told to fail"),
        ("redirect", "HTTP 307", ""),
        ("not a stream", "no stream", "application/json"),
        ("huge body", "malformed answer", "bytes"),
        ("malformed", "malformed stream", "not JSON"),
        ("error chunk", "error in the stream", "the engine died"),
        ("disconnect", "disconnected", ""),
        ("no end", "ended early", "finish_reason"),
    ],
)
def test_failures_have_a_name_and_words(failure, kind, words):
    """And the next request is fine."""
    outcomes, _ = sent(Behaviour(fails=lambda number: failure if number == 0 else ""), times=2)
    assert outcomes[0].error == kind
    assert words in outcomes[0].detail
    assert outcomes[0].ended >= outcomes[0].sent
    assert outcomes[1].error == ""


def test_what_happens_after_the_end_does_not_matter():
    outcomes, _ = sent(Behaviour(fails=lambda number: "late disconnect"), times=3)
    assert [(outcome.error, outcome.output) for outcome in outcomes] == [("", 6)] * 3


def test_a_server_that_hangs_ends_with_the_timeout():
    (outcome,), _ = sent(Behaviour(fails=lambda n: "hang"), timeout=0.2)
    assert outcome.error == "timeout"
    assert outcome.e2el < 10


def test_a_server_that_is_not_there():
    async def ask():
        async with serving(Behaviour()) as (url, _):
            pass
        async with Client(url) as client:
            with pytest.raises(EngineError, match="cannot connect"):
                await client.models()
            return await client.send("chat", b"{}")

    assert asyncio.run(ask()).error == "cannot connect"


def test_keys_are_shown():
    assert sent(Behaviour(key="secret"))[0][0].error == "HTTP 401"
    assert sent(Behaviour(key="secret"), key="secret")[0][0].error == ""


def asked(behaviour, question):
    async def ask():
        async with serving(behaviour) as (url, _), Client(url + "/v1/") as client:
            return await question(client)

    return asyncio.run(ask())


def test_questions_before_the_run():
    assert asked(Behaviour(context=99), lambda client: client.models()) == {NAME: 99}
    assert asked(Behaviour(context=None), lambda client: client.models()) == {NAME: None}
    for style in ("vllm", "llama.cpp"):
        assert asked(Behaviour(tokenize=style), lambda client: client.tokenized(NAME, " a b c")) == 4
    with pytest.raises(EngineError, match="HTTP 404"):
        asked(Behaviour(tokenize=""), lambda client: client.tokenized(NAME, " a b c"))
    for endpoint in ("chat", "completions"):
        assert asked(Behaviour(around=9), lambda c, endpoint=endpoint: c.counted(endpoint, NAME, " a b c")) == 12
    with pytest.raises(EngineError, match="usage"):
        asked(Behaviour(usage=False), lambda client: client.counted("chat", NAME, " a"))


@pytest.mark.parametrize("url", ["http://h:8000", "http://h:8000/", "http://h:8000/v1", " http://h:8000/v1/ "])
def test_addresses_with_and_without_v1(url):
    assert checked_url(url) == "http://h:8000"


@pytest.mark.parametrize(
    "url", ["", "h:8000", "ftp://h", "http://", "http://h:x", "http://h:99999", "http://h/?a", "http://a b"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(InvalidRequest, match="base-url"):
        checked_url(url)


@pytest.mark.parametrize("key", ["", "a\nb", "\u00e9", "x" * 5000])
def test_keys_that_no_header_can_carry(key):
    with pytest.raises(InvalidRequest, match="API key"):
        Client("http://h", key)


def test_bodies_are_json_with_what_was_asked_for():
    chat = json.loads(request_body("chat", "m", " a b", 5, ignore_eos=True))
    assert (chat["messages"], chat["ignore_eos"]) == ([{"role": "user", "content": "a b"}], True)
    plain = json.loads(request_body("completions", "m", " a b", 5))
    assert (plain["prompt"], "ignore_eos" in plain) == (" a b", False)


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(words, finish=None):
    return event(choices=[{"delta": {"content": words}, "finish_reason": finish}])


ROLE = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
USAGE = event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"


def answer(*pieces):
    """With a second between them."""
    found = Answer(0.0)
    for second, piece in enumerate(pieces, 1):
        found.take(piece, float(second))
    found.close()
    return found


def test_an_answers_times_are_those_of_its_chunks():
    found = answer(ROLE, text("a"), text(""), text("b") + text("c"), text("", "stop"), USAGE, DONE, b"rubbish\n")
    assert list(found.chunks) == [2.0, 4.0, 4.0]
    assert (found.ended, found.finish, found.error, found.usage.output) == (6.0, "stop", "", 3)


@given(st.data())
def test_it_does_not_matter_how_bytes_are_cut(data):
    whole = ROLE + text('a "content":"x"') + text("b", "stop") + USAGE + DONE
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=9)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    found = answer(*pieces)
    assert (len(found.chunks), found.finish, found.usage.output, found.done, found.error) == (2, "stop", 3, True, "")
    assert list(found.chunks) == sorted(found.chunks)
    assert found.ended <= len(pieces)


def test_an_end_is_one_with_tokens_and_done_or_a_finish_reason():
    assert answer(text("a"), text("b", "length")).error == ""
    assert [answer(*pieces).error for pieces in ((ROLE, DONE), (USAGE, DONE))] == ["no tokens"] * 2
    assert [answer(*pieces).error for pieces in ((text("a"),), ())] == ["ended early"] * 2
    assert answer(text("a"), event(error={"message": "x"}), text("b", "stop")).error == "error in the stream"


def test_streams_are_bounded(monkeypatch):
    monkeypatch.setattr(client, "MAX_STREAM", 1000)
    endless = Answer(0.0)
    for _ in range(100):
        endless.take(b": ping\n\n", 1.0)
    with pytest.raises(ProtocolError, match="1000 bytes"):
        endless.take(b": ping\n\n" * 30, 1.0)


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
