"""A scripted conversation by the package anthropic: messages with tools and thinking, streamed and whole."""

from __future__ import annotations

from anthropic import Anthropic, NotFoundError
from conversation import QUESTION, WEATHER, Conversation, expect

talk = Conversation("anthropic")
client = Anthropic(base_url=talk.address, api_key="none")
TOOL = {"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}
GREEDY = {"extra_body": {"temperature": 0}}  # which this package has no argument for
asked = [{"role": "user", "content": QUESTION}]

with talk.step("models") as say:
    say([model.id for model in client.models.list()])
with talk.step("unknown model is NotFoundError"):
    try:
        client.messages.create(model="no-such", messages=asked, max_tokens=8)
    except NotFoundError:
        pass
    else:
        raise ValueError("it was answered")
with talk.step("tokens counted") as say:
    say(client.messages.count_tokens(model=talk.model, messages=asked, tools=[TOOL]).input_tokens)
with talk.step("message") as say:
    message = client.messages.create(model=talk.model, system="Be brief.", messages=asked, max_tokens=24)
    say(message.content[0].text, message.stop_reason)
with talk.step("message, cut at a stop sequence") as say:
    counted = [{"role": "user", "content": "Count from 1 to 9 with commas."}]
    message = client.messages.create(model=talk.model, messages=counted, max_tokens=40, stop_sequences=[","], **GREEDY)
    say(message.stop_reason, message.stop_sequence)
with talk.step("message, streamed") as say:
    with client.messages.stream(model=talk.model, messages=asked, max_tokens=24) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    say(final.content[0].text, final.usage.output_tokens)
    expect(kinds[0] == "message_start" and kinds[-1] == "message_stop", f"events are {kinds}")
with talk.step("message, a tool called, streamed, and answered") as say:
    with client.messages.stream(
        model=talk.model,
        messages=asked,
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_tokens=80,
        **GREEDY,
    ) as stream:
        final = stream.get_final_message()
    call = next(block for block in final.content if block.type == "tool_use")
    say(final.stop_reason, call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Sunny, 21 C"}]}
    history = [*asked, {"role": "assistant", "content": final.content}, {"role": "user", "content": [result]}]
    say(client.messages.create(model=talk.model, messages=history, tools=[TOOL], max_tokens=32).content)
with talk.step("message, with cached blocks") as say:
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    say(client.messages.create(model=talk.model, system=system, messages=asked, max_tokens=8).usage)
talk.end()
