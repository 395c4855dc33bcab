"""The life of requests: clients that leave, deadlines, overload, keys, an engine that is loading, failing or dead."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jsonschema
import pytest
from server_rig import Rig, frontend_of, serving, until
from unobserved import NoMetrics, Unobserved

from lamina import LLM, EngineError
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.messages.snapshot import Snapshot
from lamina.server.frontend import Frontend, Served
from lamina.server.http.gate import Gate
from lamina.server.http.sse import while_connected
from lamina.server.models import ModelState
from lamina.server.settings import ServerSettings

pytestmark = pytest.mark.data

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
LONG = {"max_tokens": 4000, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "Count."}]
JSON = "Content-Type: application/json\r\n"


class Script:
    """An engine that does what a test says. `answer` is called with each ticket."""

    def __init__(self, answer: Callable[[EngineRequest], None] = lambda ticket: None) -> None:
        self.alive = True
        self.halted = False
        self.answer = answer
        self.tickets: list[EngineRequest] = []
        self.aborted: list[EngineRequest] = []

    def submit(self, ticket: EngineRequest) -> None:
        if not self.alive:
            raise EngineError("it broke")
        self.tickets.append(ticket)
        self.answer(ticket)

    def abort(self, ticket: EngineRequest, sample: int | None = None, reason: str = "abort") -> None:
        self.aborted.append(ticket)

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None: ...

    def close(self) -> None: ...


class Counts(NoMetrics):
    """Metrics that keep what they are told."""

    def __init__(self) -> None:
        self.http_calls: list[tuple[str, str, int]] = []
        self.rejections: list[str] = []

    def render(self, models: Mapping[str, ModelState]) -> tuple[bytes, str]:
        [now] = models.values()
        return f"{now.state} {now.snapshot is not None}".encode(), "text/plain; version=0.0.4"

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        self.http_calls.append((handler, method, status))

    def rejected(self, reason: str) -> None:
        self.rejections.append(reason)


@pytest.fixture(scope="module")
def rig(llm: LLM) -> Iterator[Rig]:
    with serving(llm) as rig:
        yield rig


def scripted(llm: LLM, script: Script) -> Frontend:
    return frontend_of(llm, script)


def says(*words: str, last: str | None = "length") -> Callable[[EngineRequest], None]:
    """An engine that says these words, as tokens, at once."""

    def answer(ticket: EngineRequest) -> None:
        for sample in range(ticket.request.n):
            for index, word in enumerate(words):
                reason: Any = last if index == len(words) - 1 else None
                ticket.sink(ticket, [EngineOutput(sample, int(word), reason)])

    return answer


@pytest.mark.fault("F14")
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": MESSAGES}),
        (CHAT, {"messages": MESSAGES, "stream": True}),
        (CHAT, {"messages": MESSAGES, "stream": True, "n": 3, "temperature": 1}),
        (TEXT, {"prompt": "One"}),
        (TEXT, {"prompt": ["One", "Two"], "n": 2, "temperature": 1, "stream": True}),
        (TEXT, {"prompt": "word " * 3000}),  # in prefill
        (TEXT, {"prompt": "word " * 3000, "stream": True}),
    ],
)
def test_a_client_that_leaves_ends_its_requests(rig: Rig, path: str, fields: dict[str, Any]) -> None:
    with rig.open(path, fields | LONG) as connection:
        assert until(lambda: rig.tickets > 0, 5)
        if fields.get("stream") and "word" not in str(fields.get("prompt")):
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert until(lambda: rig.tickets == 0 and rig.frontend.active == 0)


@pytest.mark.fault("F14")
def test_a_client_that_leaves_while_queued(llm: LLM) -> None:
    script = Script()
    with serving(None, frontend=scripted(llm, script)) as rig:
        for stream in (True, False):
            script.aborted.clear()
            with rig.open(CHAT, {"messages": MESSAGES, "stream": stream}):
                assert until(lambda: rig.frontend.active == 1)
            assert until(lambda: rig.frontend.active == 0)
            assert script.aborted == script.tickets[-1:]


@pytest.mark.fault("F14")
def test_one_that_leaves_disturbs_nobody(rig: Rig) -> None:
    alone = rig.complete(max_tokens=24).json["choices"][0]["text"]
    connections = [rig.open(TEXT, {"prompt": "One", "stream": True} | LONG) for _ in range(4)]
    together: list[str] = []
    thread = threading.Thread(target=lambda: together.append(rig.complete(max_tokens=24).json["choices"][0]["text"]))
    thread.start()
    for connection in connections:
        connection.close()
    thread.join(30)
    assert together == [alone]
    assert until(lambda: rig.tickets == 0)


@pytest.mark.fault("F14")
def test_what_has_ended_is_not_aborted(llm: LLM) -> None:
    script = Script(says("284", "284"))
    with serving(None, frontend=scripted(llm, script)) as rig:
        assert rig.complete().status == 200
        assert rig.complete(stream=True, n=2).status == 200
        assert script.aborted == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_before_anything_came(llm: LLM, stream: bool) -> None:
    script = Script()
    with serving(None, frontend=scripted(llm, script), request_timeout=0.2) as rig:
        reply = rig.complete(stream=stream)
        assert (reply.status, reply.error["code"], reply.error["type"]) == (504, "timeout", "timeout_error")
        assert script.aborted == script.tickets
        assert rig.frontend.active == 0


def test_a_request_may_ask_for_less_time_only(llm: LLM) -> None:
    script = Script()
    with serving(None, frontend=scripted(llm, script), request_timeout=0.3) as rig:
        for asked in ("0.1", "1e9"):
            begun = time.monotonic()
            reply = rig.ask(TEXT, {"prompt": "a"}, X_Request_Timeout=asked)
            assert reply.status == 504
            assert time.monotonic() - begun < 5


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_deadline_within_a_stream(llm: LLM, path: str) -> None:
    script = Script(says("284", last=None))
    with serving(None, frontend=scripted(llm, script), request_timeout=0.3) as rig:
        reply = rig.ask(
            path, {"messages": MESSAGES, "stream": True} if path == CHAT else {"prompt": "a", "stream": True}
        )
        assert reply.status == 200
        *_, last = reply.events
        assert last["error"]["code"] == "timeout"
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert script.aborted == script.tickets


@pytest.mark.fault("F02")
def test_an_engine_that_fails_a_request(llm: LLM) -> None:
    def fail(ticket: EngineRequest) -> None:
        ticket.sink(ticket, [EngineOutput(0, None, error=EngineError("logits are NaN"))])

    script = Script(fail)
    with serving(None, frontend=scripted(llm, script)) as rig:
        for reply in (rig.complete(), rig.complete(stream=True), rig.chat(), rig.chat(stream=True)):
            assert (reply.status, reply.error["message"]) == (500, "logits are NaN")

        def fail_later(ticket: EngineRequest) -> None:
            says("284", last=None)(ticket)
            threading.Timer(0.2, fail, [ticket]).start()

        script.answer = fail_later
        *_, last = rig.chat(stream=True).events
        assert last["error"]["message"] == "logits are NaN"
        script.alive = False
        reply = rig.chat()
        assert (reply.status, reply.error["code"]) == (503, "engine_unavailable")
        assert reply.headers["retry-after"]
        assert rig.ask("/health").status == 503
        assert rig.ask("/v1/models").status == 200


def test_a_sample_that_ends_without_a_last_token(llm: LLM) -> None:
    def answer(ticket: EngineRequest) -> None:
        ticket.sink(ticket, [EngineOutput(0, 284)])
        ticket.sink(ticket, [EngineOutput(0, None, "length")])

    with serving(None, frontend=scripted(llm, Script(answer))) as rig:
        whole = rig.complete().json["choices"][0]
        chunks = [event["choices"][0] for event in rig.complete(stream=True).events]
        assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
        assert chunks[-1]["finish_reason"] == whole["finish_reason"] == "length"
        chunks = [event["choices"][0] for event in rig.chat(stream=True).events]
        assert chunks[-1]["finish_reason"] == "length"


def test_an_engine_that_is_loading_or_dead(llm: LLM) -> None:
    frontend = Frontend(Unobserved())
    frontend.loading = "weights"
    with serving(None, frontend=frontend) as rig:
        reply = rig.ask("/health")
        assert (reply.status, reply.error["code"]) == (503, "engine_loading")
        assert "weights" not in reply.error["message"]  # everybody may ask
        assert "weights" in rig.ask("/lamina/status").json["message"]
        head = rig.ask("/health", method="HEAD")
        assert (head.status, head.body) == (503, b"")
        assert rig.complete().status == rig.ask("/tokenize", {"prompt": "a"}).status == 503
        assert rig.ask("/v1/models").json["data"][0]["max_model_len"] is None
        assert rig.ask("/metrics").status == 200
        frontend.lost("it crashed")
        assert rig.ask("/health").error["message"] == "the engine is dead; try again later"
        assert "it crashed" in rig.ask("/lamina/status").json["message"]
        assert "it crashed" in rig.complete().error["message"]
        runtime = llm._runtime
        frontend.ready(Served(runtime.engine, runtime.tokenizer, runtime.inputs))
        assert rig.ask("/health").json == {"status": "ok"}
        assert rig.ask("/health", method="HEAD").status == 200
        assert rig.complete().status == 200


@pytest.mark.fault("F02")
def test_an_engine_without_attention_workers_is_not_healthy(llm: LLM) -> None:
    """/health said 200 as long as the engine lived, though every request waited and then failed."""
    script = Script(says("284"))
    with serving(None, frontend=scripted(llm, script)) as rig:
        script.halted = True
        reply = rig.ask("/health")
        assert (reply.status, reply.error["code"]) == (503, "engine_halted")
        assert "waits for an attention worker" in rig.ask("/lamina/status").json["message"]
        assert rig.complete().status == 200  # requests are taken: a worker may come back before their time is over
        script.halted = False
        assert rig.ask("/health").status == 200


@pytest.mark.fault("F11")
def test_overload(llm: LLM) -> None:
    script, counts = Script(), Counts()
    with serving(None, counts, scripted(llm, script), max_requests=2) as rig:
        with rig.open(TEXT, {"prompt": ["a", "b"]}):
            assert until(lambda: rig.frontend.active == 2)
            for reply in (rig.complete(), rig.chat(stream=True)):
                assert (reply.status, reply.error["code"]) == (429, "too_many_requests")
                assert reply.headers["retry-after"] == "1"
        assert until(lambda: rig.frontend.active == 0)
        script.answer = says("284")
        assert rig.complete(["a", "b"]).status == 200
        assert rig.complete(["a", "b", "c"]).error["param"] == "prompt"
        assert counts.rejections == ["too_many_requests"] * 2


def test_samples_are_what_is_counted(llm: LLM) -> None:
    script = Script()
    with serving(None, frontend=scripted(llm, script), max_requests=8) as rig:
        for reply, param in (
            (rig.complete(["a"] * 3, n=3), "prompt"),
            (rig.complete(["a"] * 255, max_tokens=1, n=256), "prompt"),
            (rig.complete(n=9), "n"),
            (rig.chat(n=9), "n"),
        ):
            assert (reply.status, reply.error["param"]) == (400, param)
            assert "allowed are 8" in reply.error["message"]
        with rig.open(TEXT, {"prompt": ["a", "b"], "n": 3}):
            assert until(lambda: rig.frontend.active == 6)
            for reply in (rig.complete(n=3), rig.chat(n=3)):
                assert (reply.status, reply.error["code"]) == (429, "too_many_requests")
                assert "6 of 8 samples" in reply.error["message"]
            with rig.open(CHAT, {"messages": MESSAGES, "n": 2}):
                assert until(lambda: rig.frontend.active == 8)
        assert until(lambda: rig.frontend.active == 0)


def test_web_pages_of_elsewhere(llm: LLM) -> None:
    script = Script(says("284"))
    for keys in ((), ("one",)):
        with serving(None, frontend=scripted(llm, script), api_keys=keys) as rig:
            key = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
            for path, fields in ((TEXT, {"prompt": "a"}), ("/v1/models", None), ("/lamina/status", None)):
                reply = rig.ask(path, fields, Sec_Fetch_Site="cross-site", **key)
                assert (reply.status, reply.error["code"]) == (403, "cross_site")
                for site in ("same-origin", "none"):
                    assert rig.ask(path, fields, Sec_Fetch_Site=site, **key).status == 200
            for path in ("/health", "/version", "/"):  # a link to the page is no harm
                assert rig.ask(path, Sec_Fetch_Site="cross-site").status == 200
            # Browsers send Sec-Fetch-Site to https and loopback only, so a page unloaded models of a server elsewhere.
            for origin in ("http://a.example", "null", f"http://127.0.0.1:{rig.port + 1}"):
                for path, fields in ((TEXT, {"prompt": "a"}), (f"/v1/models/{rig.settings.model}/unload", b"")):
                    reply = rig.ask(path, fields, "POST", Origin=origin, **key)
                    assert (reply.status, reply.error["code"]) == (403, "cross_site")
                assert rig.ask("/v1/models", Origin=origin, **key).status == 200
            assert rig.ask(TEXT, {"prompt": "a"}, Origin=rig.url.upper(), **key).status == 200
            moved = {"Origin": "http://chat.lan", "X_Forwarded_Host": "chat.lan", "Forwarded": "host=chat.lan"}
            reply = rig.ask(TEXT, {"prompt": "a"}, Host="127.0.0.1", **moved, **key)  # any page can send these
            assert (reply.status, reply.error["code"]) == (403, "cross_site")
            reply = rig.ask(TEXT, {"prompt": "a"}, Host="chat.lan", Origin="http://chat.lan", **key)
            assert reply.status == (200 if keys else 403)  # without a key it is a name that a page can make up
            behind = {"Origin": "https://proxy.example", "Sec_Fetch_Site": "same-origin"}  # the proxy changes Host
            assert rig.ask(TEXT, {"prompt": "a"}, **behind, **key).status == 200
            preflight = rig.ask(TEXT, method="OPTIONS", Origin="http://a.example", **key)
            assert preflight.status == 405
            assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_a_server_that_is_open_to_all_answers_to_any_name(llm: LLM) -> None:
    frontend = scripted(llm, Script(says("284")))
    with serving(None, frontend=frontend, host="0.0.0.0") as rig:
        assert rig.ask(TEXT, {"prompt": "a"}, Host="lamina:8000").status == 200


@pytest.fixture(scope="module")
def boxes(llm: LLM) -> Iterator[tuple[Rig, Rig]]:
    """A server without keys at Box.LAN, and one with the key "one"."""
    without, keyed = (scripted(llm, Script(says("284"))) for _ in range(2))
    with (
        serving(None, frontend=without, host="Box.LAN") as rig,
        serving(None, frontend=keyed, api_keys=("one",)) as other,
    ):
        yield rig, other


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True), ("LOCALHOST:8000", True), ("localhost.:80", True), ("127.0.0.1:1", True), ("[::1]", True),
        ("[::1]:8000", True), ("192.168.1.5:8000", True), ("box.lan", True), ("Box.lan:8000", True),
        ("evil.example", False), ("127.0.0.1.evil.example:8000", False), ("localhost.evil.example", False),
        ("lan", False), ("", False), ("localhost:x", False), ("[::1]evil.example", False), ("a@localhost", False),
    ],
)  # fmt: skip
def test_names_that_a_server_without_keys_answers_to(boxes: tuple[Rig, Rig], host: str, allowed: bool) -> None:
    rig, keyed = boxes
    for path, fields in ((TEXT, {"prompt": "a"}), ("/v1/models", None), ("/", None)):
        reply = rig.ask(path, fields, Host=host)
        assert reply.status == (200 if allowed else 403)
        if not allowed:
            assert reply.error["code"] == "host_not_allowed"
            assert "--api-key" in reply.error["message"]
    assert rig.ask("/health", Host=host).status == rig.ask("/version", Host=host).status == 200
    assert keyed.ask(TEXT, {"prompt": "a"}, Host=host, Authorization="Bearer one").status == 200


@pytest.mark.fault("F20")
def test_keys(llm: LLM) -> None:
    script, counts = Script(says("284")), Counts()
    with serving(None, counts, scripted(llm, script), api_keys=("one", "two")) as rig:
        for path in ("/v1/models", "/metrics", "/lamina/status", "/openapi.json", "/nowhere"):
            for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}):
                reply = rig.ask(path, **headers)
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/version", "/"):
            assert rig.ask(path).status == 200
        assert rig.ask("/health", method="HEAD").status == 200
        for key in ("Bearer one", "bearer two", "Bearer  one "):
            assert rig.ask(TEXT, {"prompt": "a"}, Authorization=key).status == 200
        assert rig.ask("/v1/models", Authorization="Bearer two").status == 200
        assert rig.ask("/v1/models", X_Api_Key="two").status == 200
        assert set(counts.rejections) == {"invalid_api_key"}
        assert "one" not in json.dumps([str(ticket.request.salt) for ticket in script.tickets])


@pytest.mark.fault("F30")
def test_prefixes_are_shared_within_a_tenant_and_salt_only(llm: LLM) -> None:
    prompt = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 4
    with serving(llm, api_keys=("one", "two")) as rig:

        def cached(key: str, **fields: Any) -> int:
            reply = rig.ask(TEXT, {"prompt": prompt, "max_tokens": 1} | fields, Authorization=f"Bearer {key}")
            return int(reply.json["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert cached("one") == 0
        assert cached("one") > 0
        assert cached("two") == 0
        assert cached("one", cache_salt="x") == 0
        assert cached("one", cache_salt="x") > 0


def test_request_ids_come_back(rig: Rig) -> None:
    reply = rig.ask(TEXT, {"prompt": "a", "max_tokens": 1}, X_Request_Id="abc-1")
    assert (reply.headers["x-request-id"], reply.json["id"]) == ("abc-1", "cmpl-abc-1")
    reply = rig.chat(request_id="mine")
    assert reply.json["id"] == "chatcmpl-mine"
    assert reply.headers["x-request-id"] != rig.ask("/version").headers["x-request-id"]
    assert rig.ask("/nope").headers["x-request-id"]


def test_what_is_counted(llm: LLM) -> None:
    counts = Counts()
    with serving(llm, counts) as rig:
        rig.ask("/v1/models/smollm2-135m")
        rig.ask("/nope/nope")
        rig.ask("/v1/models", {})
        rig.complete(stream=True)
        reply = rig.ask("/metrics")
        assert (reply.body, reply.headers["content-type"]) == (b"ready True", "text/plain; version=0.0.4")
        with rig.open(TEXT, {"prompt": "a"} | LONG):
            assert until(lambda: rig.tickets > 0)
        assert until(lambda: len(counts.http_calls) == 6)
        assert counts.http_calls == [
            ("/v1/models/{model_id:path}", "GET", 200),
            ("none", "GET", 404),
            ("/v1/models", "POST", 405),
            ("/v1/completions", "POST", 200),
            ("/metrics", "GET", 200),
            ("/v1/completions", "POST", 499),
        ]


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_streams_for_http_1_0(llm: LLM, http: str) -> None:
    body = json.dumps({"prompt": "The capital of France is", "max_tokens": 3, "stream": True}).encode()
    with serving(llm, http=http) as rig:
        head = f"POST {TEXT} HTTP/1.0\r\n{JSON}Content-Length: {len(body)}\r\n\r\n".encode()
        answer, _, data = rig.raw(head + body).partition(b"\r\n\r\n")
        assert b" 200 " in answer.splitlines()[0]
        assert b"chunked" not in answer.lower()
        assert b"text/event-stream" in answer
        events = data.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        text = "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2])
        assert text == rig.complete(max_tokens=3).json["choices"][0]["text"]
        streamed = rig.raw(
            head.replace(b"1.0", b"1.1").replace(b"\r\n\r\n", b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            + body
        )
        assert b"chunked" in streamed.lower()
        for header in (b"cache-control: no-cache", b"x-accel-buffering: no"):
            assert header in streamed.lower()


def test_a_failure_that_nobody_foresaw(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("secret")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    gate = Gate(broken, ServerSettings(model="m"), NoMetrics(), ())
    asyncio.run(gate({"type": "http", "path": "/", "method": "GET", "headers": []}, receive, send))
    assert sent[0]["status"] == 500
    error = json.loads(sent[1]["body"])["error"]
    assert (error["code"], "secret" in error["message"]) == ("internal_error", False)
    assert "secret" in caplog.text


def test_work_is_over_before_its_client_is_gone() -> None:
    async def main() -> list[str]:
        steps: list[str] = []

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)
                steps.append("given back")

        async def forever() -> Any:
            await asyncio.sleep(60)

        outer = asyncio.ensure_future(while_connected(forever, work(), 60))
        await asyncio.sleep(0.01)
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outer
        steps.append("gone")
        return steps

    assert asyncio.run(main()) == ["given back", "gone"]


@pytest.mark.fault("F14")
def test_a_client_that_reads_nothing_is_given_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What had piled up for it was written in one go: 0.7 s for 32,000 tokens, in which nobody else was served."""
    monkeypatch.setattr("lamina.server.openai.chat.GRACE", 0.2)
    answer = says(*["284"] * 2000)
    script = Script(lambda ticket: threading.Thread(target=answer, args=(ticket,)).start())
    with serving(None, frontend=scripted(llm, script), request_timeout=0.5) as rig, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", rig.port))
        body = json.dumps({"messages": MESSAGES, "stream": True, "n": 16, "max_tokens": 2000}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert until(lambda: rig.frontend.active == 16, 10)
        assert until(lambda: rig.frontend.active == 0, 10)


def test_the_document_describes_what_is_there(rig: Rig) -> None:
    document = rig.ask("/openapi.json").json
    assert set(document["paths"]) == {
        "/detokenize", "/health", "/infill", "/joining", "/joining/{machine_id}", "/metrics", "/rerank", "/tokenize",
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/messages/count_tokens",
        "/v1/models", "/v1/models/{model_id}", "/v1/models/{model_id}/load", "/v1/models/{model_id}/unload",
        "/v1/rerank", "/v1/responses", "/v1/responses/input_tokens", "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel", "/v1/responses/{response_id}/input_items", "/version",
    }  # fmt: skip
    schemas = document["components"]["schemas"]
    assert "Ignored" in schemas["ChatRequest"]["properties"]["user"]["description"]
    assert "StreamOptions" in schemas
    responses = document["paths"][CHAT]["post"]["responses"]
    assert {"400", "401", "404", "413", "429", "500", "503", "504"} <= set(responses)
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    error = schemas[responses["400"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]]
    for path in (CHAT, "/v1/messages"):  # in OpenAI's and in Anthropic's shape
        jsonschema.validate(rig.ask(path, {"nothing": 1}).json, error)
    assert set(document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
