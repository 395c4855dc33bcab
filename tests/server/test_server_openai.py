"""The `openai` client against the server; each accepted field changes an answer or is documented as ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
import tokenizers
from server_rig import MODEL, Reply, Rig, frontend_of, serving
from tokenizers.processors import TemplateProcessing
from unobserved import Unobserved

from lamina import LLM
from lamina.client.input_processor import InputProcessor
from lamina.config import EngineConfig
from lamina.messages.engine_request import EngineRequest
from lamina.server.chat.formats.tools import ToolUse
from lamina.server.frontend import Frontend, Served, fingerprint
from lamina.server.openai.schemas import ChatRequest, CompletionRequest
from lamina.text.tokenizer import Tokenizer

pytestmark = pytest.mark.data

MESSAGES: list[Any] = [{"role": "user", "content": "Name three colours."}]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def rig(steady: LLM) -> Iterator[Rig]:
    with serving(steady, api_keys=("key",)) as rig:
        yield rig


@pytest.fixture(scope="module")
def client(rig: Rig) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{rig.url}/v1", api_key="key", max_retries=0, timeout=60) as client:
        yield client


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**({"model": MODEL, "messages": MESSAGES, "max_tokens": 8} | fields))


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**({"model": MODEL, "prompt": PROMPT, "max_tokens": 8} | fields))


def ask(rig: Rig, path: str, **fields: Any) -> Reply:
    """A request as raw JSON, with what its path needs."""
    base: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 8} if path == "/v1/chat/completions" else {}
    base |= {"prompt": PROMPT, "max_tokens": 8} if path == "/v1/completions" else {}
    return rig.ask(path, base | fields, Authorization="Bearer key")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt-4o")


def test_a_chat_and_its_stream_agree(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == answer.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    assert all(c.usage is None for c in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 8)
    assert len({c.id for c in chunks}) == 1


def test_the_fingerprint_names_what_text_depends_on_and_why_it_may_differ(client: openai.OpenAI) -> None:
    answers = [chat(client), complete(client), *chat(client, stream=True), *complete(client, stream=True)]
    assert {answer.system_fingerprint for answer in answers} == {fingerprint(MODEL, EngineConfig())}
    others = (
        ("other", EngineConfig()),
        (MODEL, EngineConfig(dtype="float32")),
        (MODEL, EngineConfig(deterministic=True)),
    )
    marks = [fingerprint(*other).split("-", 3)[2:] for other in ((MODEL, EngineConfig()), *others)]
    assert len({mark for mark, _ in marks}) == 4
    assert [why for _, why in marks] == ["rounding-varies-with-cache-placement-batch"] * 3 + ["deterministic"]


def test_the_sdk_collects_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=60, stop=":") as stream:
        for _ in stream:
            pass
        collected = stream.get_final_completion()
    assert collected.choices[0].message.content == chat(client, max_tokens=60, stop=":").choices[0].message.content


def test_several_samples(client: openai.OpenAI) -> None:
    answer = chat(client, n=3, temperature=1.0, seed=1)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    streamed = [""] * 3
    for chunk in chat(client, n=3, temperature=1.0, seed=1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert answer.usage.completion_tokens == 24


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(client: openai.OpenAI, stream: bool) -> None:
    if stream:
        chunks = [c.choices[0] for c in chat(client, logprobs=True, top_logprobs=2, stream=True)]
        entries = [entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content]
        text = "".join(choice.delta.content or "" for choice in chunks)
    else:
        choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
        entries, text = choice.logprobs.content, choice.message.content
    assert "".join(entry.token for entry in entries) == text
    assert len(entries) == 8
    for entry in entries:
        assert [entry.token, entry.logprob] == [entry.top_logprobs[0].token, entry.top_logprobs[0].logprob]
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert bytes(entry.bytes).decode() == entry.token


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_completion(client: openai.OpenAI, stream: bool) -> None:
    if stream:
        parts = [c.choices[0].logprobs for c in complete(client, logprobs=3, stream=True)]
        tokens = [token for part in parts for token in part.tokens]
        offsets = [offset for part in parts for offset in part.text_offset]
        tops = [top for part in parts for top in part.top_logprobs]
    else:
        logprobs = complete(client, logprobs=3).choices[0].logprobs
        tokens, offsets, tops = logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs
    assert "".join(tokens) == complete(client).choices[0].text
    assert offsets == [len("".join(tokens[:index])) for index in range(8)]
    assert [len(top) for top in tops] == [3] * 8


@pytest.mark.soak
def test_prompts_of_every_kind(rig: Rig, client: openai.OpenAI) -> None:
    ids = ask(rig, "/tokenize", prompt=PROMPT).json["tokens"]
    other = "Water boils at"
    one, two = complete(client).choices[0].text, complete(client, prompt=other).choices[0].text
    assert [c.text for c in complete(client, prompt=[PROMPT, other]).choices] == [one, two]
    assert complete(client, prompt=ids).choices[0].text == one
    assert [c.text for c in complete(client, prompt=[ids, ids]).choices] == [one, one]
    both = complete(client, prompt=[ids, ids], n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert both.usage.prompt_tokens == 2 * len(ids)
    streamed = [""] * 2
    for chunk in complete(client, prompt=[PROMPT, other], stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [one, two]


def test_errors_are_the_sdk_s_own(client: openai.OpenAI, rig: Rig) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is 512 tokens\. However") as caught:
        chat(client, messages=[{"role": "user", "content": "a b " * 800}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        chat(client, model="gpt-4o")
    with (
        openai.OpenAI(base_url=f"{rig.url}/v1", api_key="no", max_retries=0) as wrong,
        pytest.raises(openai.AuthenticationError),
    ):
        wrong.models.list()


@pytest.mark.fault("F24")
def test_exactly_at_the_limit(client: openai.OpenAI) -> None:
    ids = [28] * 510
    assert complete(client, prompt=ids, max_tokens=2, extra_body={"ignore_eos": True}).usage.total_tokens == 512
    with pytest.raises(openai.BadRequestError, match="requested 513 tokens"):
        complete(client, prompt=ids, max_tokens=3)


@pytest.mark.soak
def test_a_chat_s_default_length_is_what_is_left(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Say hi."}])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    answer = client.completions.create(model=MODEL, prompt="1, 2, 3, 4, 5,")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


# Each field that is accepted, with a request and one without it that are answered otherwise.
EXTRA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt_logprobs": ({"prompt_logprobs": 1}, {}),
    "temperature": ({"temperature": 1.5, "seed": 3}, {"temperature": 0, "seed": 3}),
    "top_p": ({"temperature": 1.5, "seed": 3, "top_p": 0.01}, {"temperature": 1.5, "seed": 3}),
    "top_k": ({"temperature": 1.5, "seed": 3, "top_k": 1}, {"temperature": 1.5, "seed": 3}),
    "min_p": ({"temperature": 1.5, "seed": 3, "min_p": 1.0}, {"temperature": 1.5, "seed": 3}),
    "seed": ({"temperature": 1.5, "seed": 4}, {"temperature": 1.5, "seed": 3}),
    "repetition_penalty": ({"repetition_penalty": 3.0}, {}),
    "presence_penalty": ({"presence_penalty": 2, "max_tokens": 40}, {"max_tokens": 40}),
    "frequency_penalty": ({"frequency_penalty": 2, "max_tokens": 40}, {"max_tokens": 40}),
    "logit_bias": ({"logit_bias": {"2000": 100}}, {}),
    "n": ({"n": 2}, {}),
    "max_tokens": ({"max_tokens": 3}, {}),
    "min_tokens": ({"stop": "e", "min_tokens": 7}, {"stop": "e"}),
    "stop": ({"stop": "e"}, {}),
    "stop_token_ids": ({"stop_token_ids": [28], "logit_bias": {"28": 100}}, {"logit_bias": {"28": 100}}),
    "include_stop_str_in_output": ({"stop": "e", "include_stop_str_in_output": True}, {"stop": "e"}),
    "ignore_eos": ({"logit_bias": {"2": 100}, "ignore_eos": True}, {"logit_bias": {"2": 100}}),
    "skip_special_tokens": ({"logit_bias": {"0": 100}, "skip_special_tokens": False}, {"logit_bias": {"0": 100}}),
    "allowed_token_ids": ({"allowed_token_ids": [2000, 2001]}, {}),
    "truncate_prompt_tokens": ({"truncate_prompt_tokens": 2}, {}),
    "policy": ({"policy": "streaming(sink=0, recent=1)"}, {}),
    "stream": ({"stream": True}, {}),
    "stream_options": ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}),
    "model": ({"model": "other"}, {}),
    "request_id": ({"request_id": "a"}, {"request_id": "b"}),
}
CHAT_EXTRA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = EXTRA | {
    "messages": ({"messages": [{"role": "user", "content": "Another thing."}]}, {}),
    "max_completion_tokens": ({"max_tokens": None, "max_completion_tokens": 3}, {}),
    "logprobs": ({"logprobs": True}, {}),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 2}, {"logprobs": True}),
    "return_tokens_as_token_ids": ({"logprobs": True, "return_tokens_as_token_ids": True}, {"logprobs": True}),
    "add_generation_prompt": ({"add_generation_prompt": False}, {}),
    "continue_final_message": (
        {"messages": [*MESSAGES, {"role": "assistant", "content": "Red, gr"}], "add_generation_prompt": False,
         "continue_final_message": True},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "Red, gr"}], "add_generation_prompt": False},
    ),
    "echo": (
        {"messages": [*MESSAGES, {"role": "assistant", "content": "Red"}], "echo": True},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "Red"}]},
    ),
    "bad_words": ({"bad_words": ["Red"]}, {}),
    "response_format": ({"response_format": {"type": "json_object"}}, {}),
    "structured_outputs": ({"structured_outputs": {"choice": ["yes", "no"]}}, {}),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}, {}),
    "tool_choice": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
         "tool_choice": "required", "max_tokens": 30},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
         "tool_choice": "none", "max_tokens": 30},
    ),
}  # fmt: skip
TEXT_EXTRA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = EXTRA | {
    "prompt": ({"prompt": "Water boils at"}, {}),
    "echo": ({"echo": True}, {}),
    "logprobs": ({"logprobs": 1}, {}),
    "return_tokens_as_token_ids": ({"logprobs": 0, "return_tokens_as_token_ids": True}, {"logprobs": 0}),
    "bad_words": ({"bad_words": ["Paris"]}, {}),
    "structured_outputs": ({"structured_outputs": {"regex": "[0-9]{3}"}}, {}),
}
FREE = {"parallel_tool_calls": True, "audio": None, "web_search_options": None}  # without tools; unknown, but null
ELSEWHERE = {"add_special_tokens", "suffix", "priority", "cache_salt", "parallel_tool_calls"} | {
    "reasoning_effort", "thinking_token_budget", "chat_template_kwargs"
}  # fmt: skip  # in tests of their own
NEVER = {"best_of", "chat_template"}  # in tests of bad input
IGNORED: dict[str, Any] = {
    "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "session_id": "s",
    "safety_identifier": "s", "prompt_cache_key": "k",
}  # fmt: skip
CHAT_IGNORED = IGNORED | {"verbosity": "low", "modalities": ["text"]}


@pytest.mark.parametrize(
    ("model", "changing", "ignored"),
    [(ChatRequest, CHAT_EXTRA, CHAT_IGNORED), (CompletionRequest, TEXT_EXTRA, IGNORED)],
)
def test_every_field_is_in_a_list(model: Any, changing: dict[str, Any], ignored: dict[str, Any]) -> None:
    fields = model.model_fields
    assert set(fields) <= changing.keys() | ignored.keys() | ELSEWHERE | NEVER
    assert {name for name, field in fields.items() if "Ignored" in (field.description or "")} == ignored.keys()
    assert not changing.keys() & ignored.keys()
    for name in NEVER & fields.keys():
        assert "Refused" in fields[name].description, name


def telling(body: bytes) -> str:
    """An answer without what differs between two equal requests."""
    text = body.decode()
    for event in [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: {")] or [text]:
        for name in ("id", "created"):
            value = json.loads(event).get(name)
            if value is not None and value not in ("chatcmpl-a", "chatcmpl-b", "cmpl-a", "cmpl-b"):
                text = text.replace(json.dumps(value), "0")
    return text.replace('"cached_tokens":32', '"cached_tokens":0')


FIELDS = [("/v1/chat/completions", name, *both) for name, both in CHAT_EXTRA.items()]
FIELDS += [("/v1/completions", name, *both) for name, both in TEXT_EXTRA.items()]


@pytest.mark.soak
@pytest.mark.parametrize(("path", "name", "changed", "plain"), FIELDS, ids=[f"{each[0]}-{each[1]}" for each in FIELDS])
def test_fields_change_answers(rig: Rig, path: str, name: str, changed: dict[str, Any], plain: dict[str, Any]) -> None:
    replies = [ask(rig, path, **fields) for fields in (changed, plain)]
    assert replies[1].status == 200, replies[1].body
    assert replies[0].status == (404 if name == "model" else 200), replies[0].body
    assert telling(replies[0].body) != telling(replies[1].body)


def test_ignored_fields_change_nothing(rig: Rig) -> None:
    plain = ask(rig, "/v1/chat/completions")
    for fields in ({}, CHAT_IGNORED, FREE):
        assert telling(ask(rig, "/v1/chat/completions", **fields).body) == telling(plain.body)


@pytest.mark.soak
def test_the_same_request_is_answered_the_same(rig: Rig) -> None:
    """Else the tests of fields above would prove nothing."""
    for fields in ({}, {"temperature": 1.5, "seed": 3}, {"stream": True}):
        replies = [ask(rig, "/v1/completions", **fields) for _ in (1, 2)]
        assert telling(replies[0].body) == telling(replies[1].body)


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "forecast")
]
FORCED: dict[str, Any] = {"type": "function", "function": {"name": "forecast"}}


class Colour(pydantic.BaseModel):
    name: Literal["red", "blue"]


class Weather(pydantic.BaseModel):
    """Tells the weather."""

    city: Literal["Oslo", "Rome"]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the SDK's, of its own `parsed`
def test_a_parsed_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "response_format": Colour, "max_tokens": 40}
    message = client.chat.completions.parse(messages=MESSAGES, **fields).choices[0].message
    assert message.parsed is not None
    more = {"role": "user", "content": "Another one."}
    for sent in (message, message.model_dump()):
        again = client.chat.completions.parse(messages=[*MESSAGES, sent, more], **fields)  # type: ignore[list-item]
        assert again.choices[0].message.parsed is not None
    with client.chat.completions.stream(messages=MESSAGES, **fields) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.parsed == message.parsed
    assert chat(client, messages=[*MESSAGES, streamed, more]).choices[0].message.content


def test_parsed_calls_of_tools_and_their_results(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    fields: dict[str, Any] = {"model": MODEL, "tools": tools, "max_tokens": 60}
    message = client.chat.completions.parse(
        messages=MESSAGES, tool_choice="required", parallel_tool_calls=False, **fields
    )
    with client.chat.completions.stream(
        messages=MESSAGES, tool_choice="required", parallel_tool_calls=False, **fields
    ) as stream:
        streamed = stream.get_final_completion()
    for completion in (message, streamed):
        said = completion.choices[0].message
        (call,) = said.tool_calls or ()
        assert isinstance(call.function.parsed_arguments, Weather)
        assert said.content is None
        for sent in (said, said.model_dump(warnings=False)):
            history = [*MESSAGES, sent, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
            answer = chat(client, messages=history, tool_choice="none", tools=tools, max_tokens=2)
            assert answer.choices[0].message.content


def test_without_a_call_a_stream_s_content_is_text(client: openai.OpenAI) -> None:
    """The model's end as the first token, or text; with log probabilities too."""
    for fields in ({"logit_bias": {"2": 100}}, {"stop": "e"}, {"logit_bias": {"2": 100}, "logprobs": True}):
        given: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 60} | fields
        with client.chat.completions.stream(**given) as stream:
            streamed = stream.get_final_completion().choices[0].message
        assert streamed.content == chat(client, **given).choices[0].message.content
        assert streamed.content is not None


def test_only_allowed_tools_are_in_the_grammar() -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [FORCED]}}
    use = ToolUse.from_request(TOOLS, allowed, None)
    assert use is not None
    assert (list(use.functions), use.required) == (["forecast"], False)
    assert [tool["function"]["name"] for tool in use.tools] == ["weather", "forecast"]


def test_negative_seeds(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        return str(complete(client, temperature=1.5, seed=seed).choices[0].text)

    assert text(-1) == text(-1) == text(2**64 - 1)
    assert text(-1) != text(-2)


def test_a_tool_is_called(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": FORCED, "max_tokens": 60}
    choice = chat(client, **fields).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert call.function.name == "forecast"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    chunks = [chunk.choices[0] for chunk in chat(client, stream=True, **fields)]
    assert (chunks[0].delta.role, chunks[0].delta.content) == ("assistant", None)
    pieces = [piece for chunk in chunks for piece in chunk.delta.tool_calls or ()]
    assert (pieces[0].function.name, pieces[0].index, pieces[0].type) == ("forecast", 0, "function")
    assert pieces[0].id.startswith("call_")
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    history = [*MESSAGES, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    assert chat(client, messages=history, tools=TOOLS, tool_choice="none").choices[0].message.content
    assert chat(client, messages=history).choices[0].message.content


def test_an_answer_in_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    answer = chat(client, response_format=wanted, max_tokens=40).choices[0]
    assert answer.finish_reason == "stop"
    assert json.loads(answer.message.content)["colour"] in ("red", "blue")
    streamed = chat(client, response_format=wanted, max_tokens=40, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == answer.message.content
    chosen = complete(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}).choices[0]
    assert chosen.text in ("yes", "no")


def test_priority_reaches_the_scheduler(steady: LLM) -> None:
    seen: list[EngineRequest] = []

    class Watching:
        alive = True
        halted = False

        def submit(self, ticket: EngineRequest) -> None:
            seen.append(ticket)
            steady._runtime.engine.submit(ticket)

        def abort(self, *arguments: Any) -> None: ...

    with serving(None, frontend=frontend_of(steady, Watching())) as rig:
        rig.complete(priority=-3)
        rig.chat(priority=5)
        rig.chat()
    assert [ticket.request.priority for ticket in seen] == [-3, 5, 0]


def test_special_tokens_of_the_tokenizer(steady: LLM, tmp_path: Path) -> None:
    """SmolLM2's adds none: one that does takes its place."""
    runtime = steady._runtime
    rust = tokenizers.Tokenizer.from_file(str(runtime.model_path / "tokenizer.json"))
    rust.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    rust.save(str(tmp_path / "tokenizer.json"))
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((runtime.model_path / name).read_bytes())
    tokenizer = Tokenizer(tmp_path)
    inputs = InputProcessor(tokenizer, runtime.limits.max_model_len, runtime.possible, runtime.model.vocab_size, {})
    frontend = Frontend(Unobserved())
    frontend.ready(Served(runtime.engine, tokenizer, inputs))

    def tokens(reply: Any) -> int:
        return int(reply.json["usage"]["prompt_tokens"])

    with serving(None, frontend=frontend) as rig:
        assert tokens(rig.complete()) == tokens(rig.complete(add_special_tokens=False)) + 1
        assert tokens(rig.chat()) == tokens(rig.chat(add_special_tokens=True)) - 1
        counts = [
            rig.ask("/tokenize", {"prompt": "a", "add_special_tokens": add}).json["count"] for add in (True, False)
        ]
        assert counts == [2, 1]
    tokenizer.close()


def test_tokenize_and_detokenize(rig: Rig) -> None:
    def told(path: str, **fields: Any) -> Any:
        reply = ask(rig, path, **fields)
        assert reply.status == 200, reply.body
        return reply.json

    there = told("/tokenize", prompt="Ünïcödé 漢字", return_token_strs=True)
    assert there["count"] == len(there["tokens"]) == len(there["token_strs"])
    assert there["max_model_len"] == 512
    assert told("/detokenize", tokens=there["tokens"]) == {"prompt": "Ünïcödé 漢字"}
    open_end = told("/tokenize", messages=MESSAGES)
    assert told("/detokenize", tokens=open_end["tokens"])["prompt"].endswith("<|im_start|>assistant\n")
    closed = told("/tokenize", messages=MESSAGES, add_generation_prompt=False)
    assert closed["count"] < open_end["count"]


@pytest.mark.soak
def test_continuous_usage(rig: Rig) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, first in (("/v1/chat/completions", 0), ("/v1/completions", 1)):
        reply = ask(rig, path, max_tokens=5, stream=True, stream_options=options)
        counts = [event["usage"]["completion_tokens"] for event in reply.events]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (first, 5)


def test_why_a_sample_stopped(rig: Rig) -> None:
    def reason(**fields: Any) -> tuple[Any, Any]:
        reply, streamed = (ask(rig, "/v1/completions", stream=stream, **fields) for stream in (False, True))
        choice, last = reply.json["choices"][0], streamed.events[-1]["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == (last["finish_reason"], last["stop_reason"])
        return choice["finish_reason"], choice["stop_reason"]

    assert reason() == ("length", None)
    assert reason(stop=" Paris") == ("stop", " Paris")
    assert reason(stop=["never", "Paris", " Paris"]) == ("stop", " Paris")
    assert reason(stop_token_ids=[28], logit_bias={"28": 100}) == ("stop", 28)
    assert reason(logit_bias={"2": 100}) == ("stop", None)
