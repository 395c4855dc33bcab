"""A scripted conversation by instructor, in each of its modes for this server's dialects."""

from __future__ import annotations

import instructor
from anthropic import Anthropic
from conversation import Conversation
from openai import OpenAI
from pydantic import BaseModel

talk = Conversation("instructor")
M = instructor.Mode


class City(BaseModel):
    name: str
    country: str


asked = [{"role": "user", "content": "Which city and country is the Eiffel tower in?"}]
openai = OpenAI(base_url=f"{talk.address}/v1", api_key="none")
anthropic = Anthropic(base_url=talk.address, api_key="none")
for mode in (M.TOOLS, M.TOOLS_STRICT, M.JSON, M.JSON_SCHEMA, M.MD_JSON):
    client = instructor.from_openai(openai, mode=mode)
    with talk.step(f"{mode.name}") as say:
        say(
            client.chat.completions.create(
                model=talk.model, messages=asked, response_model=City, max_tokens=96, max_retries=3
            )
        )
with talk.step("TOOLS, streamed in parts") as say:
    client = instructor.from_openai(openai, mode=M.TOOLS)
    parts = client.chat.completions.create_partial(model=talk.model, messages=asked, response_model=City, max_tokens=96)
    say(list(parts)[-1])
with talk.step("RESPONSES_TOOLS") as say:
    client = instructor.from_openai(openai, mode=M.RESPONSES_TOOLS)
    say(client.responses.create(model=talk.model, input=asked, response_model=City, max_output_tokens=96))
with talk.step("ANTHROPIC_TOOLS") as say:
    client = instructor.from_anthropic(anthropic, mode=M.ANTHROPIC_TOOLS)
    say(client.messages.create(model=talk.model, messages=asked, response_model=City, max_tokens=96))
talk.end()
