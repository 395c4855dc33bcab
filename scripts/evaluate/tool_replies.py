#!/usr/bin/env python3
"""Raw replies of models that were given tools, as JSON lines: model, functions, prompt, whether the server's grammar
held the reply, text. A person reads them and writes down the calls: tests/server/tool_replies.jsonl.

    scripts/evaluate/tool_replies.py --models qwen2.5-coder-1.5b smollm2-135m --count 100 --out replies.jsonl

The system prompt, the tools, the questions and temperatures are drawn by `--seed`. Those that are generated together
share system prompt and tools. Half of the replies are free, as other servers would have them; the others are held by
the grammar of a request with `tool_choice: "auto"`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamina import LLM, SamplingParams
from lamina.server.chat.formats.hermes import system_note
from lamina.server.chat.reply_format import ReplyFormat

SYSTEMS = (
    None,
    "You are a helpful assistant.",
    "Use the tools. Never invent numbers.",
    "You are a coding agent. Call a function where one helps; else answer in a sentence.",
    "Answer by function calls only.",
    "Think about which functions you need, say it in a sentence, then call them.",
    "You may call several functions in one reply, one after the other.",
    "You are a terse assistant in a chat window. Write Markdown.",
)
WORD, NUMBER = {"type": "string"}, {"type": "number"}


def function(name: str, about: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    parameters = {"type": "object", "properties": required | (optional or {}), "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


FUNCTIONS = (
    function("get_weather", "The weather of a city now", {"city": WORD}, {"unit": {"enum": ["celsius", "fahrenheit"]}}),
    function("convert", "Convert an amount between units or currencies", {"amount": NUMBER, "from": WORD, "to": WORD}),
    function("search_web", "Search the web", {"query": WORD}, {"limit": {"type": "integer"}}),
    function("read_file", "The text of a file", {"path": WORD}),
    function("write_file", "Write a text into a file", {"path": WORD, "content": WORD}),
    function("run_shell", "Run a command in a shell", {"command": WORD}),
    function("send-email", "Send an e-mail", {"to": {"type": "array", "items": WORD}, "subject": WORD, "body": WORD}),
    function("query_db", "Run an SQL query", {"sql": WORD}, {"parameters": {"type": "array", "items": WORD}}),
    function(
        "create_event",
        "Put an event into the calendar",
        {"title": WORD, "when": {"type": "object", "properties": {"date": WORD, "time": WORD}, "required": ["date"]}},
    ),
    function("current_time", "The time now", {}, {"timezone": WORD}),
)
QUESTIONS = {  # by the function that they are about
    "get_weather": ("What is the weather in Paris?", "Compare the weather in Oslo and in Rome.",
                    "Is it raining in São Paulo? Answer in Fahrenheit.", "Do I need a coat in Quebec today?"),
    "convert": ("How much are 20 dollars in euros?", "Convert 100 km to miles and 30 degrees Celsius to Fahrenheit.",
                "How many feet are 1.85 metres?"),
    "search_web": ("Who won the football world cup in 2018? Search.", "Find three texts about \"sparse attention\"."),
    "read_file": ("Show me what is in src/main.py.", "Find the string {\"a\": [1, 2]} in data.json.",
                  "Read a.txt and b.txt and tell me which is longer."),
    "write_file": ("Write a file hello.py that prints \"hello\" and a newline.",
                   "Create notes.md with a heading and a list of three fruits.", "Save {\"on\": true} as config.json."),
    "run_shell": ("List the files of this folder, the largest first.", "Replace tabs by spaces in all .c files.",
                  "How many lines have \"import\" in src? Use grep."),
    "send-email": ("Tell ann@example.org and bob@example.org that the meeting is moved to 3 pm.",
                   "Write to eva@example.org: thanks for the cake, \"it was great\"!"),
    "query_db": ("How many users signed up in May? The table is users(id, name, signed_up).",
                 "Delete the users whose name is O'Brien."),
    "create_event": ("Put lunch with Eva into my calendar for 12 May at noon.", "The dentist, on 2025-03-04."),
    "current_time": ("What time is it in Tokyo?", "What time is it?"),
    "": ("Explain what a hash map is.", "Write a Python function that reverses a list.", "Say hello in Thai.",
         "Give me an example of a JSON object with a name and arguments.", "What is 17 times 23?"),
}  # fmt: skip


def prompt_of(llm: LLM, messages: list[dict[str, str]], tools: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The prompt as the server writes it, and what it would ask of the sampling."""
    if not llm.has_chat_template:  # a base model: the same note, in a transcript
        told = [system_note(tools), *(f"{message['role'].capitalize()}: {message['content']}" for message in messages)]
        return "\n\n".join([*told, "Assistant:"]), {}
    plan = ReplyFormat.of(llm.tokenizer).plan(tools)
    parts = llm.tokenizer.render_parts(
        plan.messages(messages), tools=list(plan.tools) or None, template_kwargs=plan.template_kwargs
    )
    return "".join(parts), dict(plan.params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=50, help="replies of each model")
    parser.add_argument("--max-tokens", type=int, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", type=int, default=8, help="how many are generated at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with args.out.open("a", encoding="utf-8") as out:
        for model in args.models:
            with LLM(model, kv_memory="1GiB", threads=args.threads) as llm:
                for first in range(0, args.count, args.together):
                    for row in replies(llm, model, range(first, min(first + args.together, args.count)), args):
                        print(json.dumps(row, ensure_ascii=False), file=out, flush=True)


def replies(llm: LLM, model: str, numbers: range, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The replies of these numbers, generated together."""
    source = random.Random(f"{args.seed} {model} {numbers[0]}")
    system, tools = source.choice(SYSTEMS), source.sample(FUNCTIONS, source.choice((2, 3, 5)))
    names = [tool["function"]["name"] for tool in tools]
    under_way = []
    for number in numbers:
        about = source.choice((*names, *names, "", source.choice(list(QUESTIONS))))
        question = {"role": "user", "content": source.choice(QUESTIONS[about])}
        prompt, held = prompt_of(
            llm, [question] if system is None else [{"role": "system", "content": system}, question], tools
        )
        if number % 2 == 0:
            held.pop("grammar", None)
        stop = [] if llm.has_chat_template else ["\nUser:", "\nSystem:"]
        temperature = source.choice((0.0, 0.5, 0.9))
        params = SamplingParams(max_tokens=args.max_tokens, temperature=temperature, seed=number, stop=stop, **held)
        events = llm.stream(prompt, params)
        begin = next(events).text  # the beginning of the prompt is cached for the others
        under_way.append((question["content"], "grammar" in held, begin, events))
    for asked, is_held, begin, events in under_way:
        text = begin + "".join(event.text for event in events)
        yield {"model": model, "functions": names, "asked": asked, "held": is_held, "text": text}


if __name__ == "__main__":
    main()
