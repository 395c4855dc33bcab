"""A scripted conversation by LangChain: chats and responses by langchain-openai, messages by langchain-anthropic."""

from __future__ import annotations

from conversation import QUESTION, Conversation, expect
from langchain.agents import create_agent
from langchain.agents.middleware import ModelCallLimitMiddleware
from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

talk = Conversation("langchain")


class City(BaseModel):
    """A city."""

    name: str
    country: str


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"Sunny in {city}, 21 C"


common = {"model": talk.model, "api_key": "none", "temperature": 0.0, "max_tokens": 64}
models = {
    "chat": ChatOpenAI(base_url=f"{talk.address}/v1", **common),
    "responses": ChatOpenAI(base_url=f"{talk.address}/v1", use_responses_api=True, **common),
    "messages": ChatAnthropic(base_url=talk.address, **common),
}
for name, model in models.items():
    with talk.step(f"{name}, invoked") as say:
        say(model.invoke("Say hi.").text)
    with talk.step(f"{name}, streamed") as say:
        say("".join(chunk.text for chunk in model.stream("Say hi.")))
    with talk.step(f"{name}, a tool called") as say:
        message = model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False).invoke(QUESTION)
        expect(message.tool_calls, "no tool was called")
        say(message.tool_calls[0]["args"])
    methods = ("function_calling",) if name == "messages" else ("function_calling", "json_schema")
    for method in methods:
        with talk.step(f"{name}, structured by {method}") as say:
            say(model.with_structured_output(City, method=method).invoke("Which city is the Eiffel tower in?"))
    with talk.step(f"{name}, an agent") as say:
        limit = ModelCallLimitMiddleware(run_limit=3, exit_behavior="end")  # small models call without end
        answer = create_agent(model, [get_weather], middleware=[limit]).invoke({"messages": [("user", QUESTION)]})
        say([type(message).__name__ for message in answer["messages"]])
talk.end()
