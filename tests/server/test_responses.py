"""The Responses API: events in order, conversations that are kept, items and tools, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from urllib.parse import quote

import openai
import pydantic
import pytest
from loop_watch import slow_callbacks
from scripted_reply import completion, events, frames, prepared
from server_rig import MODEL, Rig, serving, until

from lamina import LLM
from lamina.server.chat.chat_input import joined
from lamina.server.http.errors import ApiError
from lamina.server.openai.responses import items, routes, store
from lamina.server.openai.responses.events import ResponseEvents, ResponseObject, given_fields
from lamina.server.openai.responses.schemas import ResponsesRequest
from lamina.server.openai.responses.store import ResponseStore, StoredResponse, with_output

PIECES = [">hm", ">so", "It", " is", "!weather", '+{"city":', '+"Oslo"}', "!ping", "+{}"]
TOOL = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


MANY = [0] * 100
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def scripted(pieces: list[str], reason: str = "stop", logprobs: bool = False, **fields: Any) -> list[dict[str, Any]]:
    """The events of a scripted reply."""
    chat = prepared(logprobs=0 if logprobs else None)
    request = ResponsesRequest(**fields)
    response = ResponseObject(request, given_fields(request), "m", chat, {"weather": "city"})
    ended: list[Sequence[str]] = []
    writer = ResponseEvents(chat, response, ended.append)
    written = (
        writer.begin() + writer.events(events(pieces, reason, logprobs)) + writer.end([completion(pieces, reason)])
    )
    data = frames(written)
    assert [event["sequence_number"] for event in data] == list(range(len(data)))
    assert data[-1]["response"] == json.loads(with_output(response.head, ended[0]))
    return data


def test_the_events_of_a_reply_come_in_order() -> None:
    data = scripted(PIECES)
    kinds = [event["type"].removeprefix("response.") for event in data]
    assert kinds == [
        "created", "in_progress",
        "output_item.added", "content_part.added", *["reasoning_text.delta"] * 2, "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", *["output_text.delta"] * 2, "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", *["function_call_arguments.delta"] * 2, "function_call_arguments.done",
        "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    response = data[-1]["response"]
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert [event["item"] for event in data if event["type"].endswith("item.done")] == response["output"]
    assert response["output"][2] | {"id": ""} == {
        "id": "", "type": "function_call", "status": "completed", "call_id": "call_0", "name": "weather",
        "arguments": '{"city":"Oslo"}', "namespace": "city",
    }  # fmt: skip
    assert response["usage"] == {
        "input_tokens": 3, "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 12,
    }  # fmt: skip
    places = [event["output_index"] for event in data if "output_index" in event]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("reason", "status"), [("stop", "completed"), ("length", "incomplete"), ("abort", "cancelled")]
)
def test_a_whole_response_is_what_its_stream_ends_with(reason: str, status: str) -> None:
    streamed = scripted(PIECES, reason)[-1]["response"]
    chat = prepared()
    response = ResponseObject(ResponsesRequest(), given_fields(ResponsesRequest()), "m", chat, {"weather": "city"})
    output = response.of(chat, completion(PIECES, reason))
    whole = with_output(response.head, output)
    other = streamed["id"].removeprefix("resp_")
    renamed = json.loads(whole.replace(response.id.removeprefix("resp_"), other))
    assert renamed | {"created_at": 0, "completed_at": 0} == streamed | {"created_at": 0, "completed_at": 0}
    assert streamed["status"] == status


def test_reasoning_is_its_own_summary_where_one_is_wanted() -> None:
    data = scripted([">hm", "Yes"], reasoning={"summary": "auto"})
    kinds = [event["type"] for event in data if "reasoning" in event["type"]]
    assert kinds == [
        f"response.reasoning_summary_{kind}" for kind in ("part.added", "text.delta", "text.done", "part.done")
    ]
    thought = data[-1]["response"]["output"][0]
    assert thought["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert items.messages(data[-1]["response"]["output"]) == [
        {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}
    ]


def test_log_probabilities_belong_to_the_text() -> None:
    message = scripted([">hm", "Yes", "!"], logprobs=True)[-1]["response"]["output"][1]
    assert [entry["token"] for entry in message["content"][0]["logprobs"]] == ["Yes"]
    data = scripted(["Yes", "", "No"], logprobs=True)  # the text of the second is held back
    deltas = [event["logprobs"] for event in data if event["type"].endswith("text.delta")]
    assert [[entry["token"] for entry in each] for each in deltas] == [["Yes"], ["", "No"]]


def test_a_failure_ends_the_stream() -> None:
    chat = prepared()
    response = ResponseObject(ResponsesRequest(), given_fields(ResponsesRequest()), "m", chat, {})
    writer = ResponseEvents(chat, response, lambda output: None)
    (data,) = frames(writer.failed(ApiError(500, "it broke")))
    assert (data["type"], data["response"]["status"]) == ("response.failed", "failed")
    assert data["response"]["error"] == {"code": "server_error", "message": "it broke"}


def test_items_become_messages() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    given = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Wait", "annotations": []}],
        },
        call,
        call | {"call_id": "d", "namespace": "n"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "1"}]},
        {"type": "function_call_output", "call_id": "d", "output": "2"},
    ]
    made = items.messages(given)
    assert [message["role"] for message in made] == ["user", "assistant", "tool", "tool"]
    assert made[1]["reasoning_content"] == "hm"
    assert [each["id"] for each in made[1]["tool_calls"]] == ["c", "d"]
    assert [message["content"] for message in made[2:]] == ["1", "2"]


def test_neighbours_of_one_role_are_one_turn() -> None:
    given = [
        {"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, {"role": "user", "content": "c"},
        {"role": "developer", "content": "d"}, {"role": "assistant", "content": None, "tool_calls": [1]},
        {"role": "tool", "content": "e"}, {"role": "tool", "content": "f"},
    ]  # fmt: skip
    assert [(turn["role"], turn["content"]) for turn in joined(given)] == [
        ("system", "a\n\nb"), ("user", "c\n\nd"), ("assistant", None), ("tool", "e"), ("tool", "f"),
    ]  # fmt: skip


def stored(name: str, previous: str | None = None, size: int = 10) -> StoredResponse:
    given, head, output = [{"text": "x" * size}], {"id": f"resp_{name}"}, {"id": f"msg_{name}_0"}
    return StoredResponse(f"resp_{name}", json.dumps(given), previous, json.dumps(head), [json.dumps(output)])


def test_the_store_keeps_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_RESPONSES", 6)
    monkeypatch.setattr(store, "MAX_BYTES", 44_000)
    now = 0.0
    kept = ResponseStore(2, lambda: now)
    for name in "abc":
        kept.put("k", stored(name, f"resp_{chr(ord(name) - 1)}" if name != "a" else None))
    kept.put("other", stored("z"))
    assert [turn.id for turn in kept.conversation("k", "resp_c") or ()] == ["resp_a", "resp_b", "resp_c"]
    assert store.item(kept.of("k"), "msg_b_0") == '{"id": "msg_b_0"}'
    assert kept.get("other", "resp_a") is store.item(kept.of("other"), "msg_b_0") is None  # each key has its own
    kept.put("k", stored("d"))  # the fourth of three
    assert kept.get("k", "resp_a") is None or kept.get("k", "resp_c") is None
    kept.put("k", stored("e", size=17_000))
    assert kept.get("k", "resp_e") is not None
    kept.put("k", stored("f", size=30_000))  # too large by itself
    assert kept.get("k", "resp_f") is None
    now = store.MAX_AGE + 1
    assert kept.get("k", "resp_e") is None
    assert not kept._bytes.get("k")


def test_the_store_keeps_json_and_counts_its_bytes() -> None:
    """Objects took 25 times the bytes of their JSON, and a walk over a million values, which nobody else could pass."""
    kept = ResponseStore(1)
    one = stored("a", size=1000)
    kept.put("k", one)
    assert one.size - 1024 == len(one.input + one.head + one.output[0])
    assert json.loads(one.response) == {"id": "resp_a", "output": [{"id": "msg_a_0"}]}
    one.output = []
    kept.put("k", one)
    assert kept._bytes["k"] == one.size
    for item_id in ("msg_a_0", "msg_a_0" + "x" * 1000, "msg_a_", "msg_a_-1", "msg_c_0", "a", ""):
        assert store.item(kept.of("k"), item_id) is None
    kept.drop("k", "resp_a")
    assert not kept._bytes


def test_many_messages_of_one_role_are_joined_in_linear_time() -> None:
    """Each message copied all those before it: 4,000 of 900 characters stopped all clients for 8 s."""
    for role in ("assistant", "user"):
        (turn,) = joined(items.messages([{"role": role, "content": "x" * 900}] * 4000))
        assert len(turn["content"]) > 3_600_000


@pytest.fixture(scope="module")
def rig(steady: LLM) -> Iterator[Rig]:
    with serving(steady, api_keys=("key", "other")) as rig:
        yield rig


@pytest.fixture(scope="module")
def client(rig: Rig) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{rig.url}/v1", api_key="key", max_retries=0, timeout=60) as client:
        yield client


def create(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(
        **({"model": MODEL, "input": "Hi", "max_output_tokens": 6, "temperature": 0} | fields)
    )


@pytest.mark.data
def test_a_conversation_goes_on_and_is_forgotten(rig: Rig, client: openai.OpenAI) -> None:
    first = create(client, instructions="Be brief.", metadata={"a": "b"})
    assert (first.status, first.incomplete_details.reason, first.metadata) == (
        "incomplete",
        "max_output_tokens",
        {"a": "b"},
    )
    again = create(client, input="More", previous_response_id=first.id)
    whole = create(
        client, input=[{"role": "user", "content": "Hi"}, *first.output, {"role": "user", "content": "More"}]
    )
    assert again.output_text == whole.output_text
    assert again.usage.input_tokens == whole.usage.input_tokens > first.usage.input_tokens
    count = client.responses.input_tokens.count(model=MODEL, input="More", previous_response_id=first.id)
    assert count.input_tokens == again.usage.input_tokens
    referred = create(
        client, input=[{"type": "item_reference", "id": first.output[0].id}, {"role": "user", "content": "x"}]
    )
    assert referred.output_text
    assert client.responses.retrieve(again.id).output == again.output
    assert [item.content[0].text for item in client.responses.input_items.list(again.id)] == ["More"]
    for limit in ("0", "101", "0001" + "0" * 4400, "\u0661"):  # a number of thousands of digits was status 500
        reply = rig.ask(f"/v1/responses/{again.id}/input_items?limit={quote(limit)}", Authorization="Bearer key")
        assert reply.error["param"] == "limit"
    elsewhere = client.with_options(api_key="other")
    with pytest.raises(openai.NotFoundError):
        elsewhere.responses.retrieve(first.id)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="send the whole input"):
        create(client, previous_response_id=again.id)
    hidden = create(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(hidden.id)
    with pytest.raises(openai.BadRequestError, match="incomplete; allowed is"):
        client.responses.cancel(again.id)


class Weather(pydantic.BaseModel):
    """Tells the weather."""

    city: Literal["Oslo", "Rome"]


@pytest.mark.data
def test_the_sdk_reads_calls_and_parsed_text(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "input": "Weather in Oslo?", "temperature": 0, "max_output_tokens": 60}
    choice: Any = {"type": "function", "name": "weather"}
    with client.responses.stream(**fields, tools=[TOOL], tool_choice=choice) as stream:
        kinds = [event.type for event in stream]
        (called,) = stream.get_final_response().output
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    assert json.loads(called.arguments)["city"] in ("Oslo", "Rome")
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "Rain."}
    history = [{"role": "user", "content": "Weather?"}, called.model_dump(exclude={"parsed_arguments"}), result]
    assert create(client, input=history, tools=[TOOL], tool_choice="none").output_text
    parsed = client.responses.parse(**fields, text_format=Weather)
    assert isinstance(parsed.output_parsed, Weather)
    logged = create(client, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = logged.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == logged.output_text
    assert len(entries[0].top_logprobs) == 2


@pytest.mark.data
def test_a_response_under_way_is_cancelled(rig: Rig, client: openai.OpenAI) -> None:
    endless: dict[str, Any] = {"model": MODEL, "input": "Hi", "stream": True, "extra_body": {"ignore_eos": True}}
    with client.responses.create(**endless) as stream:
        begun = next(stream)
        assert client.responses.retrieve(begun.response.id).status == "in_progress"
        client.responses.cancel(begun.response.id)
        *_, last = stream
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    assert client.responses.retrieve(begun.response.id).status == "cancelled"
    assert until(lambda: rig.tickets == 0)


@pytest.mark.data
def test_the_oldest_turns_are_left_out_where_that_is_wanted(rig: Rig) -> None:
    turns = [{"role": role, "content": f"{at} " * 40} for at in range(8) for role in ("user", "assistant")]
    fields = {"input": [*turns, {"role": "user", "content": "Hi"}], "max_output_tokens": 5}
    refused = rig.ask("/v1/responses", fields, Authorization="Bearer key")
    assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
    reply = rig.ask("/v1/responses", fields | {"truncation": "auto"}, Authorization="Bearer key")
    assert reply.status == 200, reply.body
    assert 100 < reply.json["usage"]["input_tokens"] < 512


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, "input", "at least one item"),
    ({"input": 1}, "input", "a list of at most 4096 items"),
    ({"input": ["a"]}, "input[0]", "an item"),
    ({"input": [{"type": "local_shell_call"}]}, "input[0].type", "function_call_output"),
    ({"input": [{"type": "custom_tool_call"}]}, "input[0].type", "allowed is function_call"),
    ({"input": [IMAGE]}, "input[0].content[0].type", "the model reads text"),
    ({"input": [{"role": "robot", "content": ""}]}, "input[0].role", "user, assistant"),
    ({"input": [{"role": "user", "content": "", "x": 1}]}, "input", "unknown field input[0].x"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]}, "input", "an object"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id", "no kept response has it"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "the server runs no tools"),
    ({"tools": [{"type": "custom", "name": "a"}]}, "tools[0].type", "a function with one parameter"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools", "tools[0].name is 'a b'"),
    ({"tool_choice": "required"}, "tool_choice", "beside tools"),
    ({"background": True}, "background", "on its connection"),
    ({"conversation": "c"}, "conversation", "previous_response_id"),
    ({"prompt": {"id": "p"}}, "prompt", "instructions and input"),
    ({"previous_response_id": "resp_0"}, "previous_response_id", "send the whole input"),
    ({"text": {"format": {"type": "xml"}}}, "text.format", "json_schema"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "none, minimal"),
    ({"metadata": {"a": 1}}, "metadata.a", "at most 16 texts"),
    ({"reasoning": {"context": MANY}}, "reasoning.context", "at most 16 of these"),
    ({"reasoning": {"mode": "x" * 600}}, "reasoning.mode", "at most 512 characters"),
    ({"text": {"verbosity": MANY}}, "text.verbosity", "at most 16 of these"),
    ({"input": [{"role": "user", "content": "", "status": MANY}]}, "input[0].status", "at most 16 of these"),
    ({"input": [{"role": "user", "content": "", "phase": {"a": [1]}}]}, "input[0].phase", "at most 16 of these"),
    ({"input": [CALL | {"async": MANY}]}, "input[0].async", "at most 16 of these"),
    ({"input": [CALL | {"caller": {"x" * 600: 1}}]}, "input[0].caller", "at most 512 characters"),
    ({"input": [{"type": "reasoning", "encrypted_content": [1]}]}, "input[0].encrypted_content", "text"),
    ({"tools": [TOOL | {"output_schema": MANY}]}, "tools[0].output_schema", "an object"),
    ({"tools": [TOOL | {"allowed_callers": MANY}]}, "tools[0].allowed_callers", "at most 16 of these"),
    ({"include": ["everything"]}, "include[0]", "message.output_text.logprobs"),
]


@pytest.mark.data
@pytest.mark.parametrize(("fields", "param", "says"), REFUSED, ids=[str(case[0])[:40] for case in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(rig: Rig, fields: dict[str, Any], param: str, says: str) -> None:
    reply = rig.ask("/v1/responses", {"input": "Hi", "max_output_tokens": 1} | fields, Authorization="Bearer key")
    assert reply.status in (400, 404), reply.body
    assert reply.error["param"] == param, reply.error
    assert says in reply.error["message"], reply.error


@pytest.mark.data
@pytest.mark.fault("F23")
def test_long_fields_keep_nobody_waiting(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop walked over a million values, three times, and wrote them as JSON: 3 to 8 s for 1.9 MB."""
    many = [0] * 450_000
    said = {"type": "input_text", "text": "Hi", "annotations": many}
    fields = {"input": [{"role": "user", "content": [said]}], "tools": [TOOL | {"output_schema": {"enum": many}}]}
    slow_callbacks(rig.thread)
    for stream in (False, True):
        reply = rig.ask(
            "/v1/responses", fields | {"max_output_tokens": 1, "stream": stream}, Authorization="Bearer key"
        )
        assert reply.status == 200
        assert not slow_callbacks(rig.thread)
    response = frames(reply.body)[-1]["response"]
    assert response["tools"] == fields["tools"]
    shown = rig.ask(f"/v1/responses/{response['id']}", Authorization="Bearer key")
    assert shown.json == response
    (item,) = rig.ask(f"/v1/responses/{response['id']}/input_items", Authorization="Bearer key").json["data"]
    assert item["content"] == [said]
    more = {"input": "Go on", "previous_response_id": response["id"], "max_output_tokens": 1}
    assert rig.ask("/v1/responses", more, Authorization="Bearer key").status == 200
    monkeypatch.setattr(routes, "MAX_HISTORY", 800_000)
    reply = rig.ask("/v1/responses", more, Authorization="Bearer key")
    assert (reply.status, reply.error["param"]) == (400, "previous_response_id")
    assert not slow_callbacks(rig.thread)


@pytest.mark.data
def test_what_codex_sends_is_understood(rig: Rig) -> None:
    """Codex 0.171 with a provider of its own."""
    inner = {
        "type": "function",
        "name": "close_agent",
        "strict": False,
        "parameters": {"type": "object", "properties": {}},
    }
    fields = {
        "input": [
            {"type": "message", "id": "msg_1", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "message", "id": "msg_2", "role": "user", "content": [{"type": "input_text", "text": "b"}]},
        ],
        "instructions": "", "tool_choice": "required", "parallel_tool_calls": False, "store": False, "stream": True,
        "tools": [
            {"type": "namespace", "name": "agents", "description": "Agents.", "tools": [inner]},
            {"type": "web_search", "external_web_access": False},
        ],
        "include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}, "prompt_cache_key": "k",
        "client_metadata": {"turn_id": "t"}, "max_output_tokens": 40,
    }  # fmt: skip
    reply = rig.ask("/v1/responses", fields, Authorization="Bearer key")
    last = frames(reply.body)[-1]["response"]
    assert (last["status"], last["output"][0]["namespace"], len(last["tools"])) == ("completed", "agents", 1)
