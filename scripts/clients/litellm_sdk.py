"""A scripted conversation by litellm, which speaks each dialect of the server."""

from __future__ import annotations

import litellm
from conversation import QUESTION, WEATHER, Conversation, expect

talk = Conversation("litellm")
TOOLS = [{"type": "function", "function": WEATHER}]
asked = [{"role": "user", "content": QUESTION}]
routes = {
    f"openai/{talk.model}": f"{talk.address}/v1",
    f"hosted_vllm/{talk.model}": f"{talk.address}/v1",
    f"anthropic/{talk.model}": talk.address,
}
for model, base in routes.items():
    common = {"model": model, "api_base": base, "api_key": "none", "messages": asked}
    with talk.step(f"{model}, whole") as say:
        say(litellm.completion(max_tokens=16, **common).choices[0].message.content)
    with talk.step(f"{model}, streamed") as say:
        pieces = litellm.completion(max_tokens=16, stream=True, stream_options={"include_usage": True}, **common)
        say("".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices))
    with talk.step(f"{model}, a tool called") as say:
        called = litellm.completion(
            max_tokens=80, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=0, **common
        )
        expect(called.choices[0].message.tool_calls, "no tool was called")
        say(called.choices[0].message.tool_calls[0].function.arguments)
with talk.step("text_completion") as say:
    text = litellm.text_completion(
        model=f"text-completion-openai/{talk.model}",
        api_base=f"{talk.address}/v1",
        api_key="none",
        prompt="1, 2,",
        max_tokens=8,
    )
    say(text.choices[0].text)
with talk.step("responses") as say:
    response = litellm.responses(
        model=f"openai/{talk.model}",
        api_base=f"{talk.address}/v1",
        api_key="none",
        input="Say hi.",
        max_output_tokens=16,
    )
    say(response.output[0].content[0].text)
talk.end()
