"""A conversation with tools over the whole server, with the model that writes its calls in double braces: each turn is
a call, and then an answer by what the function has said. Later calls are asked for: once it has answered in words, so
small a model goes on in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from evaluate.fault_injection.server import Server, serving
from real_models import fetched

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

MODEL = "qwen2.5-coder-1.5b"
TOOLS = [
    {"type": "function", "function": {"name": name, "description": about, "parameters": {
        "type": "object", "properties": properties, "required": required}}}
    for name, about, properties, required in (
        ("get_weather", "The weather of a city now, by measurement",
         {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}}, ["city"]),
        ("convert", "Convert an amount between units or currencies",
         {"amount": {"type": "number"}, "from": {"type": "string"}, "to": {"type": "string"}},
         ["amount", "from", "to"]),
    )
]  # fmt: skip
SYSTEM = "Use the tools. Never invent numbers. When a tool has answered, tell the user its result in one sentence."
TURNS = (  # what is asked, the function that knows, what one of its arguments has, its result, and what the answer has
    ("What is the weather in Paris?", "get_weather", ("city", "Paris"), "17.4 degrees Celsius, light rain", "17.4"),
    ("How many euros are 35 dollars?", "convert", ("amount", 35), "30.18 euros", "30.18"),
    ("And what is the weather in Oslo?", "get_weather", ("city", "Oslo"), "3.6 degrees Celsius, fog", "3.6"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    fetched(MODEL)
    with serving("--kv-memory", "512MiB", "--deterministic", model=MODEL) as server:
        yield server


def answer(server: Server, messages: list[dict[str, Any]], **fields: Any) -> tuple[dict[str, Any], str]:
    """The assistant's message and why it ended."""
    status, body = server.post(
        "/v1/chat/completions", model=MODEL, messages=messages, tools=TOOLS, temperature=0, max_tokens=150, **fields
    )
    assert status == 200, (body, server.log)
    return body["choices"][0]["message"], body["choices"][0]["finish_reason"]


def test_three_turns_each_call_and_then_answer(server: Server) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    for turn, (question, function, (argument, value), result, number) in enumerate(TURNS):
        messages.append({"role": "user", "content": question})
        message, reason = answer(server, messages, tool_choice="required" if turn else "auto")
        assert reason == "tool_calls", message
        assert not message["content"]
        [call] = message["tool_calls"]
        assert call["function"]["name"] == function
        assert json.loads(call["function"]["arguments"])[argument] == value
        messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": result}]
        message, reason = answer(server, messages)
        assert (reason, message.get("tool_calls") or []) == ("stop", []), message
        assert number in message["content"]
        messages.append(message)


def test_a_required_call_is_one_call(server: Server) -> None:
    """The model wrote four calls to one question, the last of them cut."""
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    message, reason = answer(server, messages, tool_choice="required")
    assert reason == "tool_calls"
    [call] = message["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] == "Paris"
