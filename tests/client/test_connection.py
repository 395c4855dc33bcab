"""A server in the place of a model: the same answers."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from evaluate.fault_injection.server import Server, serving, until
from real_workers import write_tiny_model

import lamina
from lamina import LLM, Completion, EngineError, InvalidRequest, SamplingParams
from lamina.client.connection import Connection, begin

TEMPLATE = "{% if loud %}w9 {% else %}{{ messages[0].content }}{% endif %}"  # a text of this tokenizer is a word
KEY = "a-key"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("chatting"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [40]}))
    return folder


@pytest.fixture(scope="module")
def here(folder: Path) -> Iterator[LLM]:
    with LLM(folder, dtype="float32", kv_memory="16M", threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """`lamina serve`, in processes of its own."""
    words = ("--dtype", "float32", "--kv-memory", "16M", "--threads", "1", "--api-key", KEY)
    with serving(*words, "--served-model-name", "tiny", model=str(folder)) as server:
        yield server


@pytest.fixture
def there(server: Server) -> Connection:
    return lamina.connect(server.url, api_key=KEY)


def plain(completion: Completion) -> Completion:
    """Without what a connection measures otherwise, and the last digits of logarithms."""
    samples = tuple(
        replace(
            sample,
            logprobs=sample.logprobs
            and [(x.token_id, x.text, round(x.logprob, 3), [t.token_id for t in x.top]) for x in sample.logprobs],  # type: ignore[misc]
        )
        for sample in completion.samples
    )
    usage = replace(completion.usage, cached_tokens=0)
    return Completion(samples, usage, replace(completion.timing, queued=0, first_token=0, total=0))


ASKED: tuple[dict[str, Any], ...] = (
    {"max_tokens": 9, "ignore_eos": True},
    {"max_tokens": 9, "temperature": 1.0, "seed": 7, "n": 3, "ignore_eos": True},
    {"max_tokens": 6, "logprobs": 2, "ignore_eos": True},
    {"max_tokens": 4, "logprobs": 0, "logit_bias": {5: 50.0}, "priority": 3},
    {"max_tokens": None},
)


@pytest.mark.parametrize("keywords", ASKED, ids=str)
@pytest.mark.parametrize("prompts", ["w3 ", ["w1 ", [3, 1, 4, 1, 5]]], ids=["one", "several"])
def test_a_server_gives_the_same_completions_as_a_model_here(
    here: LLM, there: Connection, prompts: Any, keywords: dict[str, Any]
) -> None:
    if keywords["max_tokens"] is None and isinstance(prompts, list):
        prompts = [prompts[1], prompts[1]]  # of unlike lengths the longest decides
    wanted, answers = (llm.generate(prompts, **keywords) for llm in (here, there))  # type: ignore[arg-type]
    assert isinstance(answers, Completion) == isinstance(prompts, str)
    pairs = zip(*((c if isinstance(c, list) else [c]) for c in (wanted, answers)), strict=True)
    for one, other in pairs:
        assert plain(other) == plain(one)
        assert 0 < other.timing.first_token <= other.timing.total


def test_a_server_gives_the_same_events_and_chats(here: LLM, there: Connection) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.9, seed=3, n=2, stop="w7")
    streams: list[dict[tuple[int, int], list[Any]]] = [{}, {}]
    for llm, grown in zip((here, there), streams, strict=True):
        for event in llm.stream(["w1 ", "w2 "], params):
            grown.setdefault((event.prompt_index, event.sample_index), []).append(event)
    assert streams[1] == streams[0]
    conversation = [{"role": "user", "content": "w3 "}]
    variables = {"loud": True}
    for asked in (conversation, [conversation, conversation]):
        chats = [llm.chat(asked, max_tokens=5, chat_template_kwargs=variables) for llm in (here, there)]  # type: ignore[attr-defined]
        assert [str(chat) for chat in chats[0:1]] == [str(chat) for chat in chats[1:]]
    quiet, loud = (there.chat(conversation, max_tokens=2, **more) for more in ({}, {"chat_template_kwargs": variables}))
    assert [str(quiet), str(loud)] == [str(there.generate([token], max_tokens=2)) for token in (3, 9)]
    assert "".join(event.text for event in there.stream_chat(conversation, max_tokens=2)) == str(quiet)


def test_a_stream_that_is_left_ends_the_request_at_the_server(server: Server, there: Connection) -> None:
    def aborted() -> float:
        with begin(server.url, "/metrics", KEY, None, 10.0) as response:
            text = response.read().decode()
        (count,) = re.findall(r'^lamina:request_success_total{.*finished_reason="abort".*} (\S+)$', text, re.MULTILINE)
        return float(count)

    before, events = aborted(), there.stream([3, 1, 4], max_tokens=3000, ignore_eos=True)
    assert next(events).token_id == there.generate([3, 1, 4], max_tokens=1).token_ids[0]  # type: ignore[union-attr]
    events.close()  # type: ignore[attr-defined]
    until(lambda: aborted() == before + 1, server)


def test_what_a_server_refuses_or_nobody_answers_is_said(server: Server, there: Connection) -> None:
    for call, words in (
        (lambda: lamina.connect("ftp://h"), "url is 'ftp://h'"),
        (lambda: lamina.connect(server.url, "huge", api_key=KEY), "model is 'huge'; allowed at http.* are tiny"),
        (lambda: there.generate([1], prompt_logprobs=1), "prompt_logprobs is 1; allowed over a connection is None"),
        (lambda: there.generate([1], tempo=1), "unknown sampling parameter 'tempo'"),
        (lambda: there.generate([1], SamplingParams(), n=2), "both params and n were given"),
        (lambda: there.generate([1], {"n": 2}), "params is {'n': 2}; allowed is a SamplingParams"),  # type: ignore[arg-type]
        (lambda: there.generate(["w1 ", 2.5]), r"prompts\[1\] is 2.5; allowed is text or a list of token ids"),  # type: ignore[list-item]
        (lambda: there.generate([10**6]), "the server refuses: .*1000000"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            call()
    for call, words in (
        (lambda: lamina.connect(server.url, api_key="wrong"), "the server refuses"),
        (lambda: lamina.connect("http://127.0.0.1:1"), "no server answers at http://127.0.0.1:1"),
        (lambda: lamina.connect("http://127.0.0.1:port"), "no server answers at .*port: nonnumeric port"),
    ):
        with pytest.raises(EngineError, match=words):
            call()


MODELS = b'{"data": [{"id": "m", "max_model_len": 64}]}'
STREAM = (
    b'data: {"choices": [{"index": 0, "text": "x", "finish_reason": null, "logprobs": {"tokens": ["token_id:1"]}}]}\n'
)


@pytest.mark.parametrize(
    ("models", "stream", "words"),
    [
        (b"[]", b"", "is no Lamina server"),
        (b'{"data": [3]}', b"", "is no Lamina server"),
        (b"[" * (1 << 20), b"", "is no Lamina server"),
        (MODELS.replace(b"64", b"Infinity"), b"", "is no Lamina server"),
        (MODELS, b"data: {", "cannot be read"),
        (MODELS, STREAM.replace(b'"index": 0', b'"index": 9'), "cannot be read"),
        (MODELS, STREAM.replace(b"token_id:1", b"the"), "cannot be read"),
        (MODELS, b'data: {"error": {"message": "worn out"}}\n', "worn out"),
        (MODELS, STREAM, "ended the stream before the answers had ended"),
        (MODELS, b"data: " + b"x" * (1 << 21), "cannot be read"),
    ],
)
def test_a_server_that_lies_is_an_engine_error(models: bytes, stream: bytes, words: str) -> None:
    with answering(models, stream) as (url, _, _), pytest.raises(EngineError, match=words):
        lamina.connect(url).generate([1])


@pytest.mark.parametrize("context", [b"64", b"null"], ids=["loaded", "not loaded"])
def test_a_request_has_the_form_that_was_asked_for(context: bytes) -> None:
    ended = STREAM.replace(b'"finish_reason": null', b'"finish_reason": "stop"')
    with answering(MODELS.replace(b"64", context), ended) as (url, bodies, _):
        lamina.connect(url).generate([1], choice=["a", "b"], stop=["x"], logit_bias={3: 1.0}, max_tokens=None)
    body = bodies[-1]
    assert (body["structured_outputs"], body["stop"], body["logit_bias"]) == ({"choice": ["a", "b"]}, ["x"], {"3": 1.0})
    assert (body["max_tokens"], body["model"], "choice" in body) == (63, "m", False)


def test_a_key_is_for_the_server_that_was_named_alone() -> None:
    with answering(MODELS, b"") as (there, _, keys), answering(b"", b"", f"{there}/v1/models") as (url, _, first_keys):
        assert lamina.connect(url, api_key=KEY).model == "m"
    assert (first_keys, keys) == ([f"Bearer {KEY}"], [None])


@contextmanager
def answering(models: bytes, stream: bytes, elsewhere: str = "") -> Iterator[tuple[str, list[Any], list[Any]]]:
    """A server that gives these answers, or sends its clients elsewhere; and what it was sent, and the keys."""
    bodies: list[Any] = []
    keys: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.give(models)

        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.give(b'{"max_model_len": 64}' if self.path == "/tokenize" else stream)

        def give(self, content: bytes) -> None:
            keys.append(self.headers["Authorization"])
            self.send_response(302 if elsewhere else 200)
            self.send_header("Location", elsewhere)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", bodies, keys
        server.shutdown()
