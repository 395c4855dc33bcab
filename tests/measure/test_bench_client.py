"""The client against a server that does what it is told: times, counts, and every way to fail, each by its name."""

from __future__ import annotations

import asyncio
import json

import pytest
from mock_openai_server import NAME, Behaviour, serving

from lamina.errors import EngineError, InvalidRequest
from lamina.measure.bench.client import Client, ModelInfo, checked_url, request_body


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


def test_several_tokens_in_a_chunk_are_counted_by_usage():
    (outcome,), _ = sent(Behaviour(tokens_a_chunk=4), output=10)
    assert (len(outcome.chunks), outcome.output_tokens) == (3, 10)


def test_without_usage_chunks_count():
    (outcome,), _ = sent(Behaviour(usage=False, role_first=False), output=7)
    assert (outcome.error, outcome.output, outcome.output_tokens, outcome.prompt_tokens) == ("", None, 7, 3)


def test_an_answer_of_special_tokens_alone_is_one():
    (outcome,), _ = sent(Behaviour(fails=lambda n: "no text"))
    assert (outcome.error, outcome.output_tokens, len(outcome.chunks)) == ("", 6, 1)


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        ("500", "HTTP 500", "told to fail"),
        ("429", "HTTP 429", "told to fail"),
        ("redirect", "HTTP 307", ""),
        ("not a stream", "no stream", "application/json"),
        ("huge body", "malformed answer", "bytes"),
        ("malformed", "malformed stream", "not JSON"),
        ("not an object", "malformed stream", "expected an object"),
        ("deep", "malformed stream", "not JSON"),
        ("long line", "malformed stream", "more than"),
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
    assert asked(Behaviour(context=99), lambda client: client.models()) == [ModelInfo(NAME, 99)]
    assert asked(Behaviour(context=None), lambda client: client.models()) == [ModelInfo(NAME, None)]
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
