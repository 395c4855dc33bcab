"""Anthropic's Messages API: events in order, blocks and tools, thinking, errors in its shape, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_reply import completion, events, frames, prepared
from server_rig import MODEL, Reply, Rig, serving

from lamina import LLM
from lamina.server.anthropic.blocks import MessageWriter
from lamina.server.anthropic.conversation import chat_input
from lamina.server.anthropic.schemas import MessagesRequest
from lamina.server.chat.chat_input import ChatInput
from lamina.server.chat.thinking import Thinking
from lamina.server.http.errors import ApiError

PIECES = [">hm", "It", " is", "!weather", '+{"city":', '+"Oslo"}', "!ping", "+{}"]
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOL = {"name": "weather", "input_schema": SCHEMA}


def scripted(pieces: list[str], reason: str = "stop", omitted: bool = False) -> list[dict[str, Any]]:
    writer = MessageWriter(prepared(), "msg_1", "m", omitted)
    return frames(writer.begin() + writer.events(events(pieces, reason)) + writer.end([completion(pieces, reason)]))


def put_together(data: list[dict[str, Any]]) -> dict[str, Any]:
    """What Anthropic's clients make of a stream."""
    message: dict[str, Any] = dict(data[0]["message"])
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in data[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
            texts.append("")
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            kind, value = (item for item in event["delta"].items())
            if kind[1] == "input_json_delta":
                texts[-1] += value[1]
            else:
                blocks[-1][value[0]] += value[1]
        elif event["type"] == "content_block_stop":
            if texts[-1]:
                blocks[-1]["input"] = json.loads(texts[-1])
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    return message | {"content": blocks}


@pytest.mark.parametrize("omitted", [False, True])
@pytest.mark.parametrize(("reason", "says"), [("stop", "tool_use"), ("length", "max_tokens")])
def test_a_whole_message_is_what_its_stream_adds_up_to(reason: str, says: str, omitted: bool) -> None:
    (sample,) = completion(PIECES, reason).samples
    whole = MessageWriter(prepared(), "msg_1", "m", omitted).whole(sample)
    assert put_together(scripted(PIECES, reason, omitted)) == whole
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert whole["content"][2]["input"] == {"city": "Oslo"}
    assert (whole["stop_reason"], whole["stop_sequence"]) == (says, None)
    assert whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"] == 3
    assert whole["usage"]["output_tokens_details"] == {"thinking_tokens": 1}
    again = asked([{"role": "user", "content": "?"}, {"role": "assistant", "content": whole["content"]}])
    assert again.messages[1]["reasoning_content"] == "hm"  # also where its text was left out


@pytest.mark.fault("F23")
def test_the_end_of_a_message_decodes_nothing_to_name_its_stop_string() -> None:
    """All tokens were decoded once more, on the event loop: 30 ms for 100,000."""
    chat = prepared(stop=["b", "ab", "never"])
    written = frames(MessageWriter(chat, "msg_1", "m", False).end([completion(["x"], stop="ab")]))
    assert written[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "ab"}
    whole = MessageWriter(chat, "msg_1", "m", False).whole(completion(["x"]).samples[0])
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)


def test_the_events_of_a_message_come_in_order() -> None:
    kinds = [event["type"] for event in scripted([">hm", "Yes"])]
    block = ["content_block_start", "content_block_delta"]
    assert kinds == [
        "message_start", "ping", *block, "content_block_delta", "content_block_stop",  # with the signature
        *block, "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    (failed,) = frames(MessageWriter.failed(ApiError(503, "gone")))
    assert failed == {"type": "error", "error": {"type": "overloaded_error", "message": "gone"}}


def asked(messages: Any, **fields: Any) -> ChatInput:
    return chat_input(MessagesRequest(messages=messages, max_tokens=5, **fields))


def test_blocks_become_messages() -> None:
    chat = asked(
        [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "system", "content": [{"type": "text", "text": "c", "cache_control": {"type": "ephemeral"}}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "d"},
                    {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Oslo"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "e"}]},
                    {"type": "tool_result", "tool_use_id": "2", "is_error": True},
                    {"type": "text", "text": "f"},
                ],
            },
        ],
        system=[{"type": "text", "text": "x"}, {"type": "text", "text": "y"}],
        tools=[TOOL | {"defer_loading": True, "cache_control": None}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    said = [(message["role"], message["content"]) for message in chat.messages]
    assert said == [
        ("system", "x\n\ny"), ("user", "a\nb\n\nc"), ("assistant", "d"),
        ("tool", "e"), ("tool", "error"), ("user", "f"),
    ]  # fmt: skip
    assert chat.messages[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert chat.tools == [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    assert (chat.tool_choice, chat.parallel_tool_calls) == ("required", False)


def test_several_required_calls_are_asked_for_by_a_field_that_is_false() -> None:
    for disabled, parallel in ((None, None), (False, True), (True, False)):
        choice = {"type": "any", "disable_parallel_tool_use": disabled}
        chat = asked([{"role": "user", "content": "a"}], tools=[TOOL], tool_choice=choice)
        assert chat.parallel_tool_calls is parallel


@pytest.mark.parametrize(
    ("thinking", "config", "means"),
    [
        (None, {"effort": "low"}, Thinking(False, None, None)),
        ({"type": "disabled"}, None, Thinking(False, None, None)),
        ({"type": "enabled", "budget_tokens": 7}, None, Thinking(True, None, 7)),
        ({"type": "adaptive", "display": "omitted"}, {"effort": "max"}, Thinking(None, "xhigh", None)),
    ],
)
def test_thinking_is_asked_for(thinking: Any, config: Any, means: Thinking) -> None:
    assert asked([{"role": "user", "content": "a"}], thinking=thinking, output_config=config).thinking == means


@pytest.fixture(scope="module")
def rig(steady: LLM) -> Iterator[Rig]:
    with serving(steady, api_keys=("key",), allow_origins=("https://chat.example.org",)) as rig:
        yield rig


def ask(rig: Rig, path: str = "/v1/messages", **fields: Any) -> Reply:
    """A request with Anthropic's headers."""
    given = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0} | fields
    return rig.ask(path, given, x_api_key="key", anthropic_version="2023-06-01", anthropic_beta="effort-2025-11-24")


@pytest.mark.data
def test_a_message_and_its_stream_agree(rig: Rig) -> None:
    whole = ask(rig, "/v1/messages?beta=true").json
    streamed = put_together(frames(ask(rig, stream=True).body))
    assert (streamed["content"], streamed["usage"]) == (whole["content"], whole["usage"])
    assert (whole["stop_reason"], whole["model"]) == ("max_tokens", MODEL)
    counted = rig.ask("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hi"}]}, x_api_key="key")
    assert counted.json == {"input_tokens": whole["usage"]["input_tokens"]}


@pytest.mark.data
def test_the_end_of_a_message_says_why(rig: Rig) -> None:
    text = ask(rig, max_tokens=20).json["content"][0]["text"]
    stops = ["never", text.split()[2], text.split()[1]]
    for stream in (False, True):
        reply = ask(rig, max_tokens=20, stop_sequences=stops, stream=stream)
        message = put_together(frames(reply.body)) if stream else reply.json
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stops[2])
    filled = ask(rig, max_tokens=100_000, system="word " * 440).json
    assert filled["stop_reason"] in ("model_context_window_exceeded", "end_turn")
    continued = ask(
        rig, messages=[{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]
    )
    assert continued.json["content"][0]["text"]


@pytest.mark.data
def test_tools_are_called_and_answered(rig: Rig) -> None:
    choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    called = ask(rig, tools=[TOOL], tool_choice=choice, max_tokens=60).json
    (block,) = called["content"]
    assert called["stop_reason"] == "tool_use"
    assert block["input"]["city"] in ("Oslo", "Rome")
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": "Rain."}
    history = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": called["content"]},
        {"role": "user", "content": [result]},
    ]
    assert ask(rig, messages=history, tools=[TOOL], tool_choice={"type": "none"}).json["content"][0]["text"]
    schema = {"type": "json_schema", "schema": SCHEMA | {"additionalProperties": False}}
    held = ask(rig, output_config={"format": schema}, max_tokens=60).json["content"][0]["text"]
    assert json.loads(held)["city"] in ("Oslo", "Rome")


IMAGE = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
SEARCH = [{"type": "web_search_20250305", "name": "web_search"}]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages is a list of 0; allowed is a list of 1 to 4096"),
    ({"messages": [{"role": "system", "content": "a"}]}, "at least one block"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role is 'tool'; allowed is one of user"),
    ({"messages": IMAGE}, "messages[0].content[0].type is 'image'; allowed is text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "input": {}}]}]}, ".name is null"),
    ({"max_output_tokens": 5}, "unknown field 'max_output_tokens': did you mean max_tokens"),
    ({"tools": SEARCH}, "the server runs no tools"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name is 'a b'"),
    ({"tools": [{"name": "a", "input_schema": {"type": "string"}}]}, "tools[0].input_schema.type is 'string'"),
    ({"tool_choice": {"type": "any"}}, "allowed only beside tools"),
    ({"tool_choice": {"type": "tool", "name": "b"}, "tools": [TOOL]}, "the name of one of the tools"),
    ({"tool_choice": "auto"}, "auto, any, none, tool"),
    ({"thinking": {"type": "often"}}, "enabled, disabled, adaptive"),
    ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens is -1"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort is 'huge'"),
    ({"output_config": {"format": {"type": "xml"}}}, '{"type": "json_schema"'),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"mcp_servers": [{"url": "x"}]}, "gives their tools"),
]


@pytest.mark.data
@pytest.mark.parametrize(("fields", "says"), REFUSED, ids=[str(case[0])[:40] for case in REFUSED])
def test_what_cannot_be_done_is_refused_in_anthropic_s_shape(rig: Rig, fields: dict[str, Any], says: str) -> None:
    reply = ask(rig, **fields)
    error = reply.json
    assert (reply.status, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error"), error
    assert says in error["error"]["message"], error
    assert "function" not in error["error"]["message"].replace("functions", "")  # that is OpenAI's word


@pytest.mark.data
def test_errors_of_any_stage_have_anthropic_s_shape(rig: Rig) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    kinds = [
        (rig.ask("/v1/messages", body), 401, "authentication_error"),
        (rig.ask("/v1/messages", body, x_api_key="wrong"), 401, "authentication_error"),
        (ask(rig, model="claude-opus"), 404, "not_found_error"),
        (rig.ask("/v1/messages/batches", body, x_api_key="key"), 404, "not_found_error"),
        (rig.ask("/v1/messages", method="GET", x_api_key="key"), 405, "invalid_request_error"),
        (rig.ask("/v1/messages", b"{", x_api_key="key"), 400, "invalid_request_error"),
    ]
    for reply, status, kind in kinds:
        assert (reply.status, reply.json["error"]["type"]) == (status, kind), reply.body
    assert rig.ask("/v1/models", x_api_key="key").status == 200


@pytest.mark.data
def test_web_pages_of_allowed_origins_may_ask(rig: Rig) -> None:
    ours, theirs = "https://chat.example.org", "https://evil.example.org"
    for origin, status in ((ours, 200), (theirs, 400)):
        asked = {
            "Origin": origin,
            "Access_Control_Request_Method": "POST",
            "Access_Control_Request_Headers": "x-api-key",
        }
        assert rig.ask("/v1/messages", method="OPTIONS", **asked).status == status
    for origin, status in ((ours, 200), (theirs, 403)):
        reply = rig.ask("/v1/models", Origin=origin, Sec_Fetch_Site="cross-site", Authorization="Bearer key")
        assert reply.status == status
        assert reply.headers.get("access-control-allow-origin") == (ours if origin == ours else None)
    for origin, status in ((ours, 400), (theirs, 403)):
        assert rig.ask("/v1/messages", {}, Origin=origin, Authorization="Bearer key").status == status
    refused = rig.ask("/v1/messages", {}, Origin=ours, Sec_Fetch_Site="cross-site")
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, ours)


@pytest.mark.data
def test_what_claude_code_sends_is_understood(rig: Rig) -> None:
    """Claude Code 2.1.332."""
    reply = ask(
        rig,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "system", "content": [{"type": "text", "text": "c", "cache_control": {"type": "ephemeral"}}]},
        ],
        system=[{"type": "text", "text": "d"}, {"type": "text", "text": "e", "cache_control": {"type": "ephemeral"}}],
        metadata={"user_id": "u"},
        max_tokens=32000,
        thinking={"type": "adaptive", "display": "omitted"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
        tools=[TOOL | {"defer_loading": True}],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        stream=True,
    )
    assert put_together(frames(reply.body))["stop_reason"] == "tool_use"
