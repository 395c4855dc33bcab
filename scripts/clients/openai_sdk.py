"""A scripted conversation by the package openai: chats, completions and responses, with tools, streamed and whole."""

from __future__ import annotations

import json

from conversation import QUESTION, WEATHER, Conversation, expect
from openai import NotFoundError, OpenAI
from pydantic import BaseModel

talk = Conversation("openai")
client = OpenAI(base_url=f"{talk.address}/v1", api_key="none")
CHAT_TOOL = {"type": "function", "function": WEATHER}
TOOL = {
    "type": "function",
    "strict": True,
    **WEATHER,
    "parameters": {**WEATHER["parameters"], "additionalProperties": False},
}
hello = [{"role": "user", "content": "Say hi."}]
asked = [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    name: str
    country: str


with talk.step("models") as say:
    say([model.id for model in client.models.list()])
with talk.step("unknown model is NotFoundError"):
    try:
        client.chat.completions.create(model="no-such", messages=asked)
    except NotFoundError:
        pass
    else:
        raise ValueError("it was answered")

with talk.step("chat") as say:
    chat = client.chat.completions.create(model=talk.model, messages=hello, max_tokens=16)
    say(chat.choices[0].message.content)
    expect(chat.usage and chat.usage.prompt_tokens_details, "usage has no details")
with (
    talk.step("chat, streamed") as say,
    client.chat.completions.stream(model=talk.model, messages=hello, max_tokens=64) as stream,
):
    kinds = {event.type for event in stream}
    say(sorted(kinds), stream.get_final_completion().choices[0].message.content)
with talk.step("chat, a tool called, streamed, and answered") as say:
    tools = [CHAT_TOOL]
    with client.chat.completions.stream(
        model=talk.model,
        messages=asked,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=80,
        temperature=0,
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    call = message.tool_calls[0]
    say(call.function.name, json.loads(call.function.arguments))
    history = [
        *asked,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 C"},
    ]
    told = client.chat.completions.create(model=talk.model, messages=history, tools=tools, max_tokens=32)
    say(told.choices[0].message.content)
with talk.step("chat, parsed") as say:
    parsed = client.chat.completions.parse(
        model=talk.model,
        messages=[{"role": "user", "content": "Which city is the Eiffel tower in?"}],
        response_format=City,
        max_tokens=64,
    )
    say(parsed.choices[0].message.parsed)
with talk.step("completion, streamed") as say:
    pieces = client.completions.create(model=talk.model, prompt="def add(a, b):", max_tokens=16, stream=True)
    say("".join(piece.choices[0].text for piece in pieces if piece.choices))

with talk.step("response") as say:
    first = client.responses.create(model=talk.model, input="My name is Ada. Say hi.", max_output_tokens=24)
    say(first.output_text)
with talk.step("response, continued by previous_response_id, streamed") as say:
    with client.responses.stream(
        model=talk.model, input="What is my name?", previous_response_id=first.id, max_output_tokens=24
    ) as stream:
        numbers = [event.sequence_number for event in stream]
        say(stream.get_final_response().output_text)
    expect(numbers == list(range(len(numbers))), f"sequence numbers are {numbers}")
with talk.step("response, a tool called, streamed, and answered") as say:
    with client.responses.stream(
        model=talk.model,
        input=QUESTION,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=80,
        temperature=0,
    ) as stream:
        for _ in stream:
            pass
        response = stream.get_final_response()
    call = next(item for item in response.output if item.type == "function_call")
    say(call.name, json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 21 C"}
    told = client.responses.create(
        model=talk.model, input=[result], previous_response_id=response.id, tools=[TOOL], max_output_tokens=32
    )
    say(told.output_text)
with talk.step("response, parsed") as say:
    parsed = client.responses.parse(
        model=talk.model, input="Which city is the Eiffel tower in?", text_format=City, max_output_tokens=64
    )
    say(parsed.output_parsed)
with talk.step("response, retrieved and deleted") as say:
    say(client.responses.retrieve(first.id).status, len(client.responses.input_items.list(first.id).data))
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except NotFoundError:
        pass
    else:
        raise ValueError("it is still there")
talk.end()
