"""Bad input of every kind gets an error in OpenAI's shape that names the field, and the next request is served.
`test_request_schemas` has what the types and bounds of fields alone refuse."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from server_rig import MODEL, Reply, Rig, serving

from lamina import LLM

pytestmark = pytest.mark.data

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
JSON = b"Content-Type: application/json\r\n"
DEEP = "[" * 10_000 + "]" * 10_000


@pytest.fixture(scope="module")
def rig(llm: LLM) -> Iterator[Rig]:
    with serving(llm, max_body=1 << 20) as rig:
        yield rig


def refused(rig: Rig, reply: Reply, status: int, param: str | None, says: str) -> None:
    """It is that error, and the server serves on."""
    error = reply.error
    assert (reply.status, error["param"]) == (status, param), error
    assert says in error["message"], error
    assert len(error["message"]) < 2000
    good = rig.complete(max_tokens=1)
    assert (good.status, good.json["choices"][0]["text"]) == (200, " Paris")


CHAT_CASES: list[tuple[dict[str, Any], str | None, str]] = [
    ({"logit_bias": {"99999999": 1}}, "logit_bias", "allowed are 0 to 49151"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; allowed is an integer from 1 to"),
    ({"messages": []}, "messages", "at least one message"),
    ({"messages": "hi"}, "messages", "at least one message"),
    ({"messages": [{"role": "user", "content": ""}] * 4097}, "messages", "4097 messages; allowed are 4096"),
    ({"messages": [{"role": "assistant", "content": " " * 80_000}], "n": 16, "echo": True}, "echo", "1280000 char"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "messages[0].role is 'robot'"),
    ({"messages": [{"role": "user"}]}, "messages", "messages[0].content is None"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "half of a surrogate pair"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": "word " * 150_000}]},
        "messages",
        "maximum context length is 8192 tokens",
    ),
    ({"messages": [{"role": "user", "content": "a b " * 5000}]}, "messages", "maximum context length is 8192 tokens"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "only the model's own"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "template reads"),
    ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs is true"),
    ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens", "max_completion_tokens, which is 3"),
    ({"tool_choice": "required"}, "tool_choice", "beside tools"),
    ({"modalities": ["text", "audio"]}, "modalities[1]", "'audio'; allowed is 'text'"),
    ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]}, "messages", "content[0]"),
    ({"response_format": "json"}, "response_format", "json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "text", "schema": {}}}, "response_format", "response_format.schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", '"name" and "schema"'),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
        "response_format.json_schema.schema",
        "an object",
    ),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "response_format",
        "one of them",
    ),
]

CASES: list[tuple[dict[str, Any], str | None, str]] = [
    ({"temprature": 1}, "temprature", "did you mean temperature"),
    ({"x" * 5000: 1}, "x" * 80, "unknown field"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens"),
    ({"n": 0}, "n", "n is 0; allowed is an integer from 1 to 256"),
    ({"temperature": -1}, "temperature", "temperature is -1; allowed is a number from 0 to 100"),
    ({"top_p": 2}, "top_p", "above 0 to 1"),
    ({"stop": ""}, "stop", "1 to 1024 characters"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids[0]"),
    ({"stop_token_ids": [10**8]}, "stop_token_ids", "allowed are 0 to 49151"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias", "allowed are 0 to 49151"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
    ({"logit_bias": {"²": 1}}, "logit_bias", "'²'"),
    ({"logit_bias": [1]}, "logit_bias", "an object"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least one"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids", "0 to 49151"),
    ({"allowed_token_ids": [1], "logit_bias": {"5": 1}}, "logit_bias", "one of them"),
    ({"bad_words": ["a word of many tokens"]}, "bad_words[0]", "one token"),
    ({"bad_words": [""]}, "bad_words[0]", "1 to 256"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"magic": "a"}}, "structured_outputs", "structured_outputs.magic"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "true"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "where stream is true"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1, or 1 and more"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "only where stream is false"),
    ({"policy": "magic"}, "policy", "there is no policy 'magic'; allowed are full"),
    ({"policy": "auto"}, "policy", "sketches of pages, which this engine does not keep"),
    ({"request_id": "a b"}, "request_id", "pattern"),
]


def _tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | function}]}


RECURSIVE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
NESTED: dict[str, Any] = {"type": "integer"}
for _ in range(40):
    NESTED = {"type": "object", "properties": {"a": NESTED}}
TOOL_CASES: list[tuple[dict[str, Any], str | None, str]] = [
    ({"tools": [1]}, "tools", "tools[0]"),
    (_tool(parameters=NESTED), "tools", "deep"),
    (_tool() | {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "g"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "magic"}}}},
        "response_format",
        "magic",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": RECURSIVE}}},
        "response_format",
        "json_schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": NESTED}}},
        "response_format",
        "64 levels",
    ),
    ({"structured_outputs": {"regex": "(("}}, "structured_outputs", "regex"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs", "grammar"),
]

TEXT_CASES: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": ""}, "prompt", "at least one character"),
    ({"prompt": []}, "prompt", "at least one"),
    ({"prompt": None}, "prompt", "text or token ids"),
    ({"prompt": {"a": 1}}, "prompt", "text or token ids"),
    ({"prompt": ["a", ""]}, "prompt[1]", "at least one character"),
    ({"prompt": [1, "a"]}, "prompt", "text or token ids"),
    ({"prompt": [1, True]}, "prompt", "text or token ids"),
    ({"prompt": [-1]}, "prompt", "allowed are 0 to 49151"),
    ({"prompt": [[1], [10**9]]}, "prompt", "allowed are 0 to 49151"),
    ({"prompt": ["a"] * 1025}, "prompt", "prompt has 1025 prompts and n is 1, which makes 1025 samples"),
    ({"prompt": ["a"] * 255, "n": 256, "max_tokens": 1}, "prompt", "65280 samples; allowed are 1024"),
    ({"prompt": "x" * 600_000}, "prompt", "maximum context length is 8192 tokens"),
    ({"prompt": [5] * 8190}, "prompt", "maximum context length is 8192 tokens. However, you requested 8194"),
    ({"prompt": [" " * 40_000, " " * 40_000], "n": 256, "echo": True}, "echo", "20480000 characters in 256 choices"),
    (
        {"prompt": ["a"] * 300, "structured_outputs": {"grammar": 'start: "a"\n//' + "x" * 250_000}},
        "prompt",
        "300 prompts and n is 1, with 75003900 bytes",
    ),
    ({"suffix": "end"}, "model", "no tokens for filling in"),
    ({"best_of": 3}, "best_of", "n, which is 1"),
    ({"echo": True, "logprobs": 1, "stream": True}, "echo", "only where stream is false"),
    ({"max_tokens": 0, "structured_outputs": {"regex": "a"}}, "max_tokens", "1 or more beside regex"),
    ({"prompt": [[5] * 8000] * 4, "prompt_logprobs": 20}, "prompt", "of prompts; allowed are 67108864 bytes"),
    ({"prompt": "a " * 200, "n": 256, "echo": True, "logprobs": 20}, "prompt", "n is 256, with"),
]


@pytest.mark.fault("F24")
@pytest.mark.parametrize(("fields", "param", "says"), CHAT_CASES)
def test_chats(rig: Rig, fields: dict[str, Any], param: str | None, says: str) -> None:
    refused(rig, rig.chat(**fields), 400, param, says)


@pytest.mark.fault("F23")
@pytest.mark.soak
def test_a_pattern_that_is_hard_elsewhere(rig: Rig) -> None:
    """What backtracking would never end is no work here; whether it is refused or not, others are served."""
    for pattern in ("(a+)+" * 2000, "(a|a)*" * 500 + "$", "(.*){1,50}" * 3):
        schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}
        reply = rig.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        assert reply.status in (200, 400)
        assert rig.complete(max_tokens=1).status == 200


@pytest.mark.fault("F23")
@pytest.mark.parametrize(("fields", "param", "says"), TOOL_CASES)
def test_tools_and_schemas(rig: Rig, fields: dict[str, Any], param: str | None, says: str) -> None:
    reply = rig.chat(**fields)
    refused(rig, reply, 400, reply.error["param"] if param is None else param, says)


@pytest.mark.fault("F23", "F24")
@pytest.mark.parametrize(("fields", "param", "says"), [*CASES, *TEXT_CASES])
def test_completions(rig: Rig, fields: dict[str, Any], param: str | None, says: str) -> None:
    refused(rig, rig.complete(**fields), 400, param, says)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "x" * 600_000}, "prompt"),
        ("/detokenize", {"tokens": [10**9]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens[1]"),
        ("/detokenize", {"tokens": [46778] * 20_000}, "tokens"),  # 81 characters each
    ],
)
def test_other_routes(rig: Rig, path: str, fields: dict[str, Any], param: str) -> None:
    refused(rig, rig.ask(path, fields), 400, param, param.partition("[")[0])


BODIES: list[tuple[bytes, str]] = [
    (b"", "the body is empty"),
    (b"  \n", "the body is empty"),
    (b"hello", "the body is no JSON"),
    (b'{"messages": [', "the body is no JSON"),
    (b"{'a': 1}", "the body is no JSON"),
    (b"[1]", "the body is a list"),
    (b"null", "the body is a NoneType"),
    (b'{"n": NaN}', "NaN"),
    (b'{"n": -Infinity}', "-Infinity"),
    (b'{"temperature": 1e999}', "1e999"),
    (b'{"n": ' + b"9" * 5000 + b"}", "thousands of digits"),
    (b'{"n": 1, "n": 2}', "the field 'n' twice"),
    (b'{"a": {"b": 1, "b": 2}}', "the field 'b' twice"),
    (b'\xef\xbb\xbf{"n": 1}', "byte order mark"),
    (b'{"a": "\xff"}', "no UTF-8 at byte 7"),
    ('{"a": 1}'.encode("utf-16"), "no UTF-8"),
    (f'{{"a": {DEEP}}}'.encode(), "100 deep"),
    (b'{"a": ' + b'{"a": ' * 5000 + b"1" + b"}" * 5001, "100 deep"),
    (b'{"a": "\\"[[", "b": ' + b"[" * 200 + b"]" * 200 + b"}", "100 deep"),
]


@pytest.mark.fault("F23")
@pytest.mark.parametrize(("body", "says"), BODIES)
def test_bodies(rig: Rig, body: bytes, says: str) -> None:
    reply = rig.ask("/tokenize", body)
    refused(rig, reply, 400, reply.error["param"], says)


NEWER = {  # paths beside chats and completions: a body that is wrong there, and what is said of it
    "/v1/responses": ({"input": "a", "temperature": -1}, "temperature is -1; allowed is a number from 0 to 100"),
    "/v1/responses/input_tokens": ({"input": 5}, "allowed is text, or a list of at most 4096 items"),
    "/v1/messages": ({"messages": MESSAGES, "max_tokens": 4, "top_p": 2}, "top_p is 2; allowed is a number above 0"),
    "/v1/messages/count_tokens": ({"messages": "a"}, "messages is 'a'; allowed is a list"),
    "/v1/embeddings": ({"input": []}, "input"),
    "/v1/rerank": ({"query": "a", "documents": 5}, "documents"),
}


@pytest.mark.parametrize("path", NEWER)
def test_newer_paths_refuse_alike(rig: Rig, path: str) -> None:
    fields, says = NEWER[path]
    deep = f'{{"a": {DEEP}}}'.encode()
    cases = [
        (rig.ask(path, fields), 400, says),
        (rig.ask(path, {"magic": 1}), 400, "unknown field 'magic'"),
        (rig.ask(path, fields | {"model": "gpt-4o"}), 404, f"'{MODEL}' is"),
        (rig.ask(path, b""), 400, "the body is empty"),
        (rig.ask(path, b"[1]"), 400, "the body is a list"),
        (rig.ask(path, deep), 400, "100 deep"),
        (rig.ask(path, b'{"a": 1, "a": 2}'), 400, "the field 'a' twice"),
        (rig.ask(path, b"{}", Content_Type="text/plain"), 415, "application/json"),
        (rig.ask(path, b"x" * (2 << 20)), 413, "1048576 bytes"),
        (rig.ask(path, method="PUT"), 405, f"PUT {path}"),
    ]
    for reply, status, said in cases:
        assert reply.status == status, reply.body
        assert said in reply.json["error"]["message"], reply.body
        assert (reply.json.get("type") == "error") == path.startswith("/v1/messages")
    assert rig.complete(max_tokens=1).status == 200


FUNCTION = {
    "name": "f",
    "description": "It.",
    "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
}
RIGHT: dict[
    str, dict[str, Any]
] = {  # bodies of paths that generate nothing; every value in them is replaced by wrong ones
    "/v1/messages/count_tokens": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "i", "name": "f", "input": {"x": "y"}}]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "i", "content": "b", "is_error": False}],
            },
        ],
        "system": [{"type": "text", "text": "s"}],
        "tools": [{"name": "f", "description": "It.", "input_schema": FUNCTION["parameters"]}],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "output_config": {"effort": "low"},
    },
    "/v1/responses/input_tokens": {
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
            {"type": "function_call", "call_id": "i", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "i", "output": "b"},
        ],
        "instructions": "s",
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "f"},
        "parallel_tool_calls": False,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "truncation": "auto",
    },
    "/tokenize": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {
                "role": "assistant",
                "tool_calls": [{"id": "i", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "i", "content": "b"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
    },
}


def wrong(value: Any) -> Iterator[Any]:
    """A JSON value again and again, each time with one value in it of another type."""
    yield from ({}, [], [1], 1, True, None, "\ud800")
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from ({**value, name: each} for each in wrong(inner))
    if isinstance(value, list):
        for at, inner in enumerate(value):
            yield from ([*value[:at], each, *value[at + 1 :]] for each in wrong(inner))


@pytest.mark.parametrize("path", RIGHT)
def test_a_value_of_another_type_anywhere(rig: Rig, path: str) -> None:
    """A dict where a name was wanted was no key of a table, and failed the server (500)."""
    right = RIGHT[path]
    assert rig.ask(path, right).status == 200, rig.ask(path, right).body
    for name, value in right.items():
        for each in wrong(value):
            reply = rig.ask(path, {**right, name: each})
            assert reply.status in (200, 400), (name, each, reply.body)


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/v1/responses/resp_0", 404, "there is no response 'resp_0'"),
        ("GET", f"/v1/responses/{'x' * 3000}", 404, "there is no response"),
        ("GET", "/v1/responses/%00%ff", 404, "there is no response"),
        ("DELETE", "/v1/responses/resp_0", 404, "there is no response"),
        ("POST", "/v1/responses/resp_0/cancel", 404, "there is no response"),
        ("GET", "/v1/responses/resp_0/input_items?limit=-1", 404, "there is no response"),
        ("POST", "/v1/models/gpt-4o/load", 404, f"'{MODEL}' is"),
        ("POST", f"/v1/models/{MODEL}/unload", 409, "--idle-unload"),
    ],
)
def test_what_paths_name(rig: Rig, method: str, path: str, status: int, says: str) -> None:
    reply = rig.ask(path, method=method)
    assert (reply.status, says in reply.error["message"]) == (status, True), reply.body
    assert len(reply.error["message"]) < 300


def test_machines_are_decided_by_a_boolean(rig: Rig) -> None:
    assert rig.ask("/joining").json == {"allowed": False, "machines": []}
    refused(rig, rig.ask("/joining/m", {"accept": "yes"}), 400, "accept", "a valid boolean")
    refused(rig, rig.ask("/joining/m", {"accept": True}), 404, None, "there is no machine 'm'")
    refused(rig, rig.ask("/joining/m", b'{"accept": true, "x": "' + b"y" * 2000 + b'"}'), 413, None, "1024 bytes")


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/xml", "application/json; charset=utf-16", "multipart/form-data; boundary=x"]
)
def test_content_types(rig: Rig, kind: str) -> None:
    refused(rig, rig.ask(TEXT, {"prompt": "a"}, Content_Type=kind), 415, None, "application/json")


@pytest.mark.fault("F23")
def test_too_large_a_body(rig: Rig) -> None:
    refused(rig, rig.ask(TEXT, b"x" * (2 << 20)), 413, None, "1048576 bytes")
    begun = time.monotonic()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        + JSON
        + b"Expect: 100-continue\r\nContent-Length: 100000000000\r\n\r\n"
    )
    answer = rig.raw(head)
    assert answer.startswith(b"HTTP/1.1 413")
    assert time.monotonic() - begun < 10
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\n"
    assert rig.raw(head + chunk * 17 + b"0\r\n\r\n").startswith(b"HTTP/1.1 413")


def test_models_that_are_not_served(rig: Rig) -> None:
    for reply in (
        rig.chat(model="gpt-4o"),
        rig.complete(model="gpt-4o"),
        rig.ask("/v1/models/gpt-4o"),
        rig.ask("/v1/models/a/b"),
        rig.ask("/tokenize", {"prompt": "a", "model": "gpt-4o"}),
    ):
        assert reply.error["code"] == "model_not_found"
        refused(rig, reply, 404, "model", f"'{MODEL}' is")


def test_paths_and_methods(rig: Rig) -> None:
    refused(rig, rig.ask("/v1/edits", {}), 404, None, "there is no such path: POST /v1/edits")
    refused(rig, rig.ask("/health/"), 404, None, "no such path")
    reply = rig.ask(CHAT)
    refused(rig, reply, 405, None, "GET /v1/chat/completions")
    assert reply.headers["allow"] == "POST"
    refused(rig, rig.ask("/v1/models", method="DELETE"), 405, None, "DELETE")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_timeouts_asked_for(rig: Rig, value: str) -> None:
    refused(rig, rig.ask(TEXT, {"prompt": "a"}, X_Request_Timeout=value), 400, "X-Request-Timeout", "above 0")


@pytest.mark.parametrize("value", ["a b", "x" * 129, "", "ä", "<script>"])
def test_request_ids(rig: Rig, value: str) -> None:
    reply = rig.ask("/version", X_Request_Id=value)
    refused(rig, reply, 400, "X-Request-Id", "1 to 128 letters")
    assert reply.headers["x-request-id"] != value


@pytest.mark.fault("F23")
def test_broken_http(rig: Rig) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        assert b" 400 " in rig.raw(data).partition(b"\r\n")[0]
    many = b"".join(b"x-%d: y\r\n" % i for i in range(50))
    assert rig.raw(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + many + b"\r\n").startswith(
        b"HTTP/1.1 200"
    )


def test_half_a_request_keeps_nobody_waiting(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"prompt": "a"}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\n{JSON.decode()}Content-Length: {len(body) + 1}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", rig.port)) as connection:
        connection.sendall(head + body)
        replies: list[Reply] = []
        threads = [threading.Thread(target=lambda: replies.append(rig.complete(max_tokens=1))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [reply.status for reply in replies] == [200] * 3
        connection.sendall(b" ")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_unicode_comes_back(rig: Rig) -> None:
    text = "Ünïcödé 漢字 🎉 \u2028 \x00 end"
    assert rig.complete(text, echo=True).json["choices"][0]["text"].startswith(text)
    streamed = rig.complete(text, echo=True, stream=True).events
    assert "".join(each["choices"][0]["text"] for each in streamed).startswith(text)
