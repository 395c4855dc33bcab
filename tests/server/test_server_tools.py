"""Tools in the Hermes form: what requests may say, what the grammar lets through, and calls in text that comes in
pieces. `test_reply_formats` has the other forms."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_grammars import EOS, GRAMMARS, TOKENIZER

from lamina import LLM
from lamina.errors import InvalidRequest
from lamina.sampling_params import SamplingParams
from lamina.server import preparation
from lamina.server.chat.formats import tools as tools_module
from lamina.server.chat.formats.family import Vocabulary
from lamina.server.chat.formats.hermes import Hermes, HermesParser, call_text, system_note
from lamina.server.chat.formats.reply_parser import Delta
from lamina.server.chat.formats.tools import ToolUse
from lamina.server.preparation import Abandoned


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, **more} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "where"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
}
ADD = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
TOOLS = [tool("weather", WEATHER, description="How it is outside"), tool("add", ADD), tool("ping")]
OSLO = call_text("weather", '{"city": "Oslo", "unit": "C"}')
SUM = call_text("add", '{"a": 1, "b": -20}')
NAMED = {"type": "function", "function": {"name": "add"}}


def use(choice: Any = None, parallel: Any = None, tools: Any = TOOLS) -> ToolUse:
    made = ToolUse.from_request(tools, choice, parallel)
    assert made is not None
    return made


def grammar(made: ToolUse) -> str:
    return Hermes(Vocabulary({}, ()), "").grammar(made, None, None)


def accepts(made: ToolUse, text: str) -> bool:
    """Whether a text is allowed as a whole."""
    [constraint] = GRAMMARS.constraints(SamplingParams(grammar=grammar(made)), 1)
    for token in [*TOKENIZER.encode(text).ids, EOS]:
        if not np.unpackbits(constraint.allowed.view(np.uint8), bitorder="little")[token]:
            return False
        constraint.advance(token)
    return True


@pytest.mark.parametrize(
    ("choice", "parallel", "good", "bad"),
    [
        (None, None, ["", "hello <b>", OSLO, f"Well.\n{SUM}", f"{OSLO}\n{SUM}\nbye", "<tool_call"], []),
        ("auto", False, ["hello", OSLO, f"Well.\n{SUM}"], [f"{OSLO}\n{SUM}", f"{OSLO}\nbye"]),
        ("required", True, [OSLO, f"{OSLO}\n{SUM}"], ["", "hello", f"Well.\n{SUM}", f"{OSLO}\nbye"]),
        ("required", False, [OSLO, SUM], ["", "hello", f"{OSLO}\n{SUM}"]),
        (NAMED, None, [SUM], ["", "hello", OSLO, f"{SUM}\n{SUM}"]),
    ],
    ids=["auto", "auto, one", "required", "required, one", "named"],
)
def test_the_choice_decides_what_may_be_written(choice: Any, parallel: Any, good: list[str], bad: list[str]) -> None:
    made = use(choice, parallel)
    never = [
        call_text("nothing", "{}"),
        call_text("add", '{"a": 1}'),
        call_text("add", '{"a": 1, "b": "2"}'),
        call_text("weather", '{"city": "Oslo", "sky": 1}'),
        call_text("ping", '{"a": 1}'),
        "<tool_call>",
        SUM.removesuffix("</tool_call>"),
    ]
    assert [text for text in good if not accepts(made, text)] == []
    assert [text for text in bad + never if accepts(made, text)] == []
    assert made.required == (choice not in (None, "auto"))


def test_no_tools_and_none_mean_text() -> None:
    assert ToolUse.from_request(None, None, None) is None
    assert ToolUse.from_request([], None, None) is None
    assert ToolUse.from_request(TOOLS, "none", None) is None


def test_the_note_has_the_definitions() -> None:
    made = use()
    assert '"name": "weather", "description": "How it is outside"' in system_note(made.tools)
    assert made.tools[2] == tool("ping", {"type": "object", "properties": {}})


def test_schemas_that_cannot_be_held_to_in_full_work_unless_they_are_strict() -> None:
    odd = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True, "items": {"format": "int64"}}}}
    assert accepts(use(tools=[tool("f", odd)]), call_text("f", '{"x": []}'))
    with pytest.raises(InvalidRequest, match=r"tools\[0\]\.function\.parameters cannot be used: .*uniqueItems"):
        use(tools=[tool("f", odd, strict=True)])
    open_ended = {"properties": {"x": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}}
    assert accepts(use(tools=[tool("f", open_ended)]), call_text("f", '{"x": 1, "y": true}'))
    assert accepts(use(tools=[tool("f", {})]), call_text("f", '{"anything": [1]}'))
    catastrophic = {"type": "object", "properties": {"x": {"type": "string", "pattern": "^(a+)+$"}}, "required": ["x"]}
    assert accepts(use(tools=[tool("f", catastrophic)]), call_text("f", '{"x": "aaa"}'))
    node = {"type": "object", "properties": {"t": {"$ref": "#/$defs/t"}}, "additionalProperties": False}
    tree = {"$defs": {"t": node}, "properties": {"t": {"$ref": "#/$defs/t"}}}
    assert accepts(use(tools=[tool("f", tree)]), call_text("f", '{"t": {"t": {}}}'))


def allowed_tools(mode: str, tools: list[Any]) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("tools", "choice", "parallel", "message"),
    [
        (5, None, None, "tools is 5"),
        ("abc", None, None, "tools is 'abc'"),
        ([tool(f"f{i}") for i in range(129)], None, None, "129 tools.* at most 128"),
        ([3], None, None, r"tools\[0\] is 3"),
        ([{"type": "web_search"}], None, None, r"tools\[0\]\.type is 'web_search'"),
        ([{"type": "function"}], None, None, r"tools\[0\]\.function is None"),
        ([tool("f"), tool("f g")], None, None, r"tools\[1\]\.function\.name is 'f g'"),
        ([tool("f"), tool("f")], None, None, r"tools\[1\]\.function\.name is 'f'; allowed is another"),
        ([tool("a" * 129)], None, None, r"tools\[0\]\.function\.name"),
        ([tool("f\n")], None, None, r"tools\[0\]\.function\.name"),
        ([tool("f", description=3)], None, None, r"tools\[0\]\.function\.description is 3"),
        ([tool("f", description="d" * 70000)], None, None, r"tools\[0\]\.function\.description"),
        ([tool("f", strict="yes")], None, None, r"tools\[0\]\.function\.strict is 'yes'"),
        ([tool("f", color=1)], None, None, r"tools\[0\]\.function has 'color'"),
        ([{**tool("f"), "color": 1}], None, None, r"tools\[0\] has 'color'"),
        ([tool("f", [1])], None, None, r"tools\[0\]\.function\.parameters is \[1\]"),
        ([tool("f", {"type": "string"})], None, None, r"tools\[0\]\.function\.parameters\.type is 'string'"),
        ([tool("f", {"properties": {"a": {"type": "x"}}})], None, None, r"tools\[0\]\.function\.parameters cannot be"),
        ([tool("f", {"properties": 5})], None, None, r"tools\[0\]\.function\.parameters cannot be used"),
        ([tool("f", {"properties": {"a": {"pattern": "(a", "type": "string"}}})], None, None, "unclosed group"),
        ([tool("f", deep(5000))], None, None, r"tools\[0\]\.function\.parameters is nested too deeply"),
        ([tool("f", {"const": math.nan})], None, None, "no JSON"),
        ([tool("f", {"const": "\ud800"})], None, None, "no JSON"),
        ([tool("f", {"enum": ["x" * (1 << 18)]})], None, None, r"tools\[0\]\.function\.parameters has \d+ characters"),
        (TOOLS, "maybe", None, "tool_choice is 'maybe'"),
        (TOOLS, {"type": "function", "function": {"name": "x"}}, None, r"tool_choice\.function\.name is 'x'"),
        (TOOLS, {"type": "function"}, None, "tool_choice is"),
        (TOOLS, {"type": "function", "function": 5}, None, r"tool_choice\.function is 5"),
        (TOOLS, {"type": "function", "function": {"name": [1]}}, None, r"tool_choice\.function\.name"),
        (TOOLS, ["auto"], None, "tool_choice is"),
        (TOOLS, {"type": "allowed_tools"}, None, "tool_choice is"),
        (TOOLS, allowed_tools("none", [NAMED]), None, "tool_choice.allowed_tools is"),
        (TOOLS, allowed_tools("auto", []), None, "tool_choice.allowed_tools is"),
        (TOOLS, allowed_tools("auto", [{"type": "function"}]), None, r"allowed_tools.tools\[0\] is"),
        (TOOLS, allowed_tools("auto", [tool("x")]), None, "name is 'x'"),
        (None, "required", None, 'tool_choice is "required", but there are no tools'),
        (TOOLS, None, "yes", "parallel_tool_calls is 'yes'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tools: Any, choice: Any, parallel: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refusal:
        grammar(use(choice, parallel, tools))
    assert len(str(refusal.value)) < 700


def test_as_many_tools_as_may_be_are_compiled() -> None:
    parameters = {"type": "object", "properties": {f"p{i}": {"type": ["string", "null"]} for i in range(8)}}
    made = use(tools=[tool(f"f{i}", parameters, description="d" * 500) for i in range(128)])
    assert accepts(made, call_text("f127", '{"p0": "x", "p7": null}'))


@pytest.mark.fault("F23")
def test_schemas_that_take_long_are_refused() -> None:
    """All of them were compiled: 128 tools of 1.3 kB took 52 s."""
    patterns = [[{"type": "string", "pattern": f"^[a-z]{{{i},{i + j}}}$"} for j in range(4)] for i in range(6)]
    slow = {"type": "object", "properties": {"x": {"allOf": [{"anyOf": each} for each in patterns]}}}
    with pytest.raises(InvalidRequest, match=r"tools\[\d+\].function.parameters: the schemas .* allowed are 1 s"):
        use(tools=[tool(f"f{i}", slow) for i in range(32)])


@pytest.mark.fault("F23")
def test_no_schema_is_compiled_for_a_client_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread went on to the last one."""
    left, compiled = threading.Event(), []

    def compile_one(name: str, schema: str, lenient: bool) -> float:
        compiled.append(name)
        left.set()
        return 0.0

    monkeypatch.setattr(tools_module, "check_json_schema", compile_one)
    monkeypatch.setattr(preparation._under_way, "abandoned", left, raising=False)
    with pytest.raises(Abandoned):
        use()
    assert compiled == ["tools[0].function.parameters"]


# Calls in text.


def parse(pieces: Sequence[str], hidden: Sequence[str] = ()) -> tuple[str, list[tuple[str, str, str]], list[Delta]]:
    """The content, the calls (id, name, arguments) and all deltas."""
    numbers = itertools.count()
    known: dict[str, Any] = {name: {} for name in ("weather", "add", "f", "g")}
    parser = HermesParser(functions=known, new_id=lambda: f"call_{next(numbers)}", hidden=hidden)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    calls: list[list[str]] = []
    for delta in deltas:
        if delta.content is not None:
            assert (delta.index, delta.id, delta.name, delta.arguments) == (None, None, None, "")
            assert delta.content
        elif delta.id is not None:
            assert delta.index == len(calls)
            calls.append([delta.id, delta.name or "", delta.arguments])
        else:
            assert delta.index == len(calls) - 1
            assert delta.arguments
            calls[-1][2] += delta.arguments
    assert parser.calls == len(calls)
    content = "".join(delta.content for delta in deltas if delta.content is not None)
    return content, [(call[0], call[1], call[2]) for call in calls], deltas


TEXTS = [
    ("Hello, world.\n", "Hello, world.\n", []),
    (OSLO, "", [("weather", '{"city": "Oslo", "unit": "C"}')]),
    (f"Well.\n{SUM}", "Well.", [("add", '{"a": 1, "b": -20}')]),
    (f"\n{OSLO}\n{SUM}\n", "", [("weather", '{"city": "Oslo", "unit": "C"}'), ("add", '{"a": 1, "b": -20}')]),
    (f"{SUM}\n\nDone, <b>.", "Done, <b>.", [("add", '{"a": 1, "b": -20}')]),
    ("a < b <tool <tool_cal", "a < b <tool <tool_cal", []),
    (call_text("f", r'{"x": "}\"]{</tool_call>", "y": [{}]}'), "", [("f", r'{"x": "}\"]{</tool_call>", "y": [{}]}')]),
    ("<tool_call>\nnot a call\n</tool_call>!", "<tool_call>\nnot a call\n</tool_call>!", []),
    ("<tool_call>" + " " * 400 + "x", "<tool_call>" + " " * 400 + "x", []),
    ('<tool_call>\n{"name": "f", "arguments": {"x": [1, 2', "", [("f", '{"x": [1, 2')]),
    ('<tool_call>\n{"name": "f", "argu', '<tool_call>\n{"name": "f", "argu', []),
    ('<tool_call>{"name":"f","arguments":{}}</tool_call><tool_call>{"name":"g","arguments":{"a":1}}</tool_call>', "",
     [("f", "{}"), ("g", '{"a":1}')]),
    (f"{SUM}<|end|>", "", [("add", '{"a": 1, "b": -20}')]),
    ("Bye<|end|>", "Bye", []),
    ("Bye <|en", "Bye <|en", []),
    ('```json\n{\n  "name": "add",\n  "arguments": {\n    "a": 1\n  }\n}\n```', "", [("add", '{\n    "a": 1\n  }')]),
    ('So:\n```\n{"name": "f", "arguments": {}}\n```\nBye', "So:Bye", [("f", "{}")]),
    ('{{"name": "f", "arguments": {"a": {}}}}', "", [("f", '{"a": {}}')]),
    ('<tool_call>\n{{"name": "f", "arguments": {}}}\n</tool_call>', "", [("f", "{}")]),
    ('```json\n{{"name": "f", "arguments": {}} }\n```', "", [("f", "{}")]),
    ('{"name": "f", "arguments": {"x": 1}}\n{"name": "g", "arguments": {}}', "", [("f", '{"x": 1}'), ("g", "{}")]),
    ('{"name": "F", "arguments": {}}', '{"name": "F", "arguments": {}}', []),
    ('Write\n\n```json\n{"name": "app"}\n```\n', 'Write\n\n```json\n{"name": "app"}\n```\n', []),
    ("```python\nf()\n```", "```python\nf()\n```", []),
    ('Take {"name": "f", "arguments": {}}', 'Take {"name": "f", "arguments": {}}', []),
    ('<tools>\n{"name": "f", "arguments": {}}\n</tools>', "", [("f", "{}")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), TEXTS, ids=range(len(TEXTS)))
@settings(max_examples=25)
@given(data=st.data())
def test_a_text_gives_the_same_however_it_is_cut(
    text: str, content: str, calls: list[Any], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    for cut in (pieces, list(text)):
        said, made, _ = parse(cut, ["<|end|>"])
        assert said == content
        assert [(name, arguments) for _, name, arguments in made] == calls
        assert [call_id for call_id, _, _ in made] == [f"call_{i}" for i in range(len(calls))]


def test_content_and_arguments_come_as_soon_as_they_can() -> None:
    parser = HermesParser(functions={"f": {}}, new_id=lambda: "call_x")
    assert parser.push("Hello") == [Delta(content="Hello")]
    assert parser.push(" ") == []
    assert parser.push("you <too") == [Delta(content=" you")]
    assert parser.push("th") == [Delta(content=" <tooth")]
    assert parser.push('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.push('{"a') == [Delta(index=0, id="call_x", name="f"), Delta(index=0, arguments='{"a')]
    assert parser.push('": "}') == [Delta(index=0, arguments='": "}')]
    assert parser.push('"}}\n</tool_') == [Delta(index=0, arguments='"}')]
    assert parser.push("call>\n") == []
    assert parser.finish() == []


@pytest.mark.data
@pytest.mark.real
def test_the_real_model_calls_what_exists(llm: LLM) -> None:
    for choice, seed in itertools.product(("required", NAMED, "auto"), range(3)):
        made = use(choice)
        messages = [
            {"role": "system", "content": f"You are helpful.\n\n{system_note(made.tools)}"},
            {"role": "user", "content": "What is 17 + 25, and how is the weather in Oslo?"},
        ]
        completion = llm.chat(messages, grammar=grammar(made), max_tokens=200, temperature=1.0, seed=seed)
        _, calls, _ = parse([completion.text])
        assert calls or choice == "auto"
        for index, (_, name, arguments) in enumerate(calls):
            if completion.finish_reason == "stop" or index < len(calls) - 1:
                schema = {"weather": WEATHER, "add": ADD, "ping": {"maxProperties": 0}}[name]
                jsonschema.validate(json.loads(arguments), schema)
                assert choice is not NAMED or name == "add"
