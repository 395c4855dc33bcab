"""Each family's form of replies: what its grammar lets through, and what its parser makes of it, however it is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_replies import CHATML, accepts, cut_at, taken_apart, tokenizer_with

from lamina.errors import InvalidRequest
from lamina.server.chat.formats import qwen3_coder
from lamina.server.chat.formats.family import Vocabulary
from lamina.server.chat.formats.tools import ToolUse
from lamina.server.chat.reply_format import ReplyFormat, ReplyPlan
from lamina.text.tokenizer import Tokenizer


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {"properties": {}}}}


WEATHER = {
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer"}},
    "required": ["city"],
}
ADD = {"properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/n"}}, "required": ["a", "b"],
       "$defs": {"n": {"type": "integer"}}}  # fmt: skip
TOOLS = [tool("weather", WEATHER), tool("add", ADD), tool("ping")]
FORM = {"json_schema": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}
OSLO, SUM, PING = ("weather", '{"city": "Oslo", "unit": "C"}'), ("add", '{"a": 1, "b": -20}'), ("ping", "{}")

HERMES, HERMES_END = '<tool_call>\n{"name": "', "}\n</tool_call>"
# By family: template, special tokens, tokens that end a text; and how it writes the three calls.
FAMILIES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "hermes": (
        CHATML + "{{ tools }}<tool_call>", (), (),
        tuple(f'{HERMES}{name}", "arguments": {arguments}{HERMES_END}' for name, arguments in (OSLO, SUM, PING)),
    ),
    "hermes, special": (
        CHATML + "{{ tools }}<tool_call>", ("<tool_call>", "</tool_call>"), (),
        tuple(f'{HERMES}{name}", "arguments": {arguments}{HERMES_END}' for name, arguments in (OSLO, SUM, PING)),
    ),
    "llama 3": (
        CHATML + "{{ tools }}", ("<|python_tag|>", "<|eot_id|>"), ("<|eot_id|>",),
        tuple(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in (OSLO, SUM, PING)),
    ),
    "mistral": (
        CHATML + "{{ tools }}[TOOL_CALLS][", ("[TOOL_CALLS]",), (),
        tuple(f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {call}}}]' for name, call in (OSLO, SUM, PING)),
    ),
    "mistral, newer": (
        CHATML + "{{ tools }}[TOOL_CALLS]x[CALL_ID]x[ARGS]", ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), (),
        tuple(f"[TOOL_CALLS]{name}{number}[ARGS]{arguments}" for number, (name, arguments) in zip(
            ("", "[CALL_ID]abc123xyz", ""), (OSLO, SUM, PING), strict=True)),
    ),
    "qwen3-coder": (
        CHATML + "{{ tools }}<tool_call><function=f><parameter=x>", (), (),
        (
            "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=unit>\nC\n</parameter>\n"
            "</function>\n</tool_call>",
            "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n-20\n</parameter>\n"
            "</function>\n</tool_call>",
            "<tool_call>\n<function=ping>\n</function>\n</tool_call>",
        ),
    ),
    "gpt-oss": (
        CHATML + "{{ tools }}<|channel|>",
        ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"),
        ("<|return|>", "<|call|>"),
        tuple(
            f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"
            for name, arguments in (OSLO, SUM, PING)
        ),
    ),
}  # fmt: skip
ONE_MARK = ("mistral",)  # several calls come after one mark
ALONE = ("llama 3", "mistral", "mistral, newer", "gpt-oss")  # nothing comes after a call
_made: dict[str, Any] = {}
SINGLE = ("gpt-oss",)  # one call a reply


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer]:
    name = request.param
    template, special, ends, _ = FAMILIES[name]
    return name, tokenizer_with(tmp_path_factory.mktemp("model"), template, special, ends=ends)


def plan(tokenizer: Tokenizer, **fields: Any) -> ReplyPlan:
    return ReplyFormat.of(tokenizer).plan(**{"tools": TOOLS, **fields})


def test_the_grammar_lets_calls_of_known_functions_through_and_nothing_like_them(family: tuple[str, Tokenizer]) -> None:
    name, tokenizer = family
    oslo, add, ping = FAMILIES[name][3]
    tagged = f"<|python_tag|>{oslo}" if name == "llama 3" else oslo
    said = "<|channel|>final<|message|>Hello {x}" if name == "gpt-oss" else "Hello {x}"
    wrong = [ping.replace("ping", "pong"), oslo.replace("Oslo", "Oslo").replace("unit", "sky"), add.replace("-20", "x")]
    for fields, good, bad in (
        ({}, [oslo, add, ping, said], wrong),
        ({"tool_choice": "required"}, [oslo, add, ping], [*wrong, said, ""]),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, [add], [oslo, said]),
        ({"structure": FORM}, [tagged, said.replace("Hello {x}", '{"x": 1}')], [*wrong, said]),
        ({"tool_choice": "none", "structure": FORM}, [said.replace("Hello {x}", '{"x": 1}')], [said, oslo]),
    ):
        made = plan(tokenizer, **fields)
        assert [text for text in good if not accepts(tokenizer, made, text)] == []
        assert [text for text in bad if accepts(tokenizer, made, text)] == []


def several(name: str) -> str:
    oslo, add, _ = FAMILIES[name][3]
    if name == "llama 3":
        return f"{oslo}; {add}"
    if name == "mistral":
        return oslo[:-1] + ", " + add.removeprefix("[TOOL_CALLS] [")
    return f"{oslo}{'' if name == 'mistral, newer' else chr(10)}{add}"


def test_several_calls_only_where_they_may_be(family: tuple[str, Tokenizer]) -> None:
    name, tokenizer = family
    both = several(name)
    if name not in SINGLE:
        assert accepts(tokenizer, plan(tokenizer), both)
        assert accepts(tokenizer, plan(tokenizer, tool_choice="required", parallel_tool_calls=True), both)
    required = {"tool_choice": "required"}
    for fields in ({"parallel_tool_calls": False}, {"parallel_tool_calls": False} | required, required):
        assert not accepts(tokenizer, plan(tokenizer, **fields), both)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_reply_is_taken_apart_the_same_however_it_is_cut(family: tuple[str, Tokenizer], data: st.DataObject) -> None:
    name, tokenizer = family
    oslo, add, ping = FAMILIES[name][3]
    made = _made.setdefault(name, None) or plan(tokenizer)
    _made[name] = made
    texts = [(oslo, "", [OSLO]), (add, "", [SUM]), (f"{ping}<eos>", "", [PING])]
    if name == "gpt-oss":
        head = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        texts = [(f"{head}{text}<|call|>", content, calls) for text, content, calls in texts]
        texts.append(("<|channel|>commentary<|message|>First.<|end|><|start|>assistant" + oslo, "First.", [OSLO]))
        texts.append(("<|channel|>final<|message|>a < b <|x|>\n<|return|>", "a < b <|x|>\n", []))
    else:
        texts += [(several(name), "", [OSLO, SUM]), ("a < b [TOOL {x} <tool_cal\n", "a < b [TOOL {x} <tool_cal\n", [])]
    if name not in ALONE:
        texts.append((f"Well.\n{add}\n{ping}\n\nDone.", "Well.Done.", [SUM, PING]))
    for text, content, calls in texts:
        cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
        for pieces in (cut_at(text, cuts), list(text), [text]):
            thought, said, found = taken_apart(made, pieces)
            assert (thought, said, found) == ("Hm." if text.startswith("<|channel|>analysis") else "", content, calls)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_hostile_text_is_taken_apart_the_same_however_it_is_cut(
    family: tuple[str, Tokenizer], data: st.DataObject
) -> None:
    """A channel or a start of gpt-oss that no message follows within 320 characters never ended."""
    name, tokenizer = family
    _made[name] = made = _made.get(name) or plan(tokenizer)
    marks = (
        "<|channel|>", "<|start|>", "<|message|>", "<|end|>", "<|call|>", "assistant", "analysis", "<eos>", "```",
        "<tool_call>", "</tool_call>", "<function=ping>", "<parameter=a>", "</parameter>", "</function>",
        "<tools>", "[TOOL_CALLS]", "[ARGS]", '{"name": "ping", "arguments": {', '{"name": "ping", "parameters": {',
        "}", "}}", "<|python_tag|>", "ping", "{", "[", '"', ";", ",", "\\", "\n", "  ", "<", "a", "x" * 400,
    )  # fmt: skip
    text = "".join(data.draw(st.lists(st.sampled_from(marks), max_size=12)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert taken_apart(made, cut_at(text, cuts)) == taken_apart(made, [text])


def test_schemas_that_are_true_or_false_are_schemas(family: tuple[str, Tokenizer]) -> None:
    """They ended requests to models with Qwen3-Coder's form with status 500."""
    _, tokenizer = family
    for schema in ({"anyOf": [True]}, {"$ref": "#/$defs/x"}, True, {"$ref": "#/$defs/0"}):
        shared = [True] if schema == {"$ref": "#/$defs/0"} else {"x": True}
        made = plan(tokenizer, tools=[tool("f", {"properties": {"a": schema}, "$defs": shared})])
        assert "grammar" in made.params


COLOR = {"title": "Color", "type": "string", "enum": ["red", "12"]}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"7": 7, "null": None}, ("seven",)),
        ({"$ref": "#/$defs/Color"}, {"red": "red", "12": "12"}, ("blue", "null")),
        ({"allOf": [{"$ref": "#/$defs/Color"}], "default": "red"}, {"12": "12"}, ("blue",)),
        ({"allOf": [{"type": "string"}, {"minLength": 1}]}, {"12": "12", "null": "null"}, ()),
        ({"type": ["string", "number"], "enum": ["a", 1]}, {"a": "a", "1": 1}, ("b", "2")),
        ({"anyOf": [{"$ref": "#/$defs/Color"}, {"type": "null"}]}, {"12": "12", "null": None}, ("blue",)),
        ({"type": ["string", "null"], "enum": ["7", None]}, {"7": "7", "null": None}, ("8",)),
        ({"oneOf": [{"$ref": "#/definitions/Size"}, {"$ref": "#/$defs/Text"}]}, {"12": 12, "x": "x"}, ()),
        ({"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "boolean"}]}, {"true": True, "12": "12"}, ("blue",)),
        ({"enum": ["none", None]}, {"none": "none", "null": None}, ("None",)),
        ({"anyOf": [{"const": 1}, {"const": "one"}]}, {"1": 1, "one": "one"}, ("two", "2")),
        ({"anyOf": [{"type": "string"}, {"not": {}}]}, {"12": 12, "x": "x"}, ()),
    ],
)
def test_an_argument_has_the_types_of_its_schemas_choices_and_definitions(
    tmp_path: Path, schema: Any, good: dict[str, Any], bad: tuple[str, ...]
) -> None:
    """A reference within a choice was of no type: the text "12" of an optional enum became a number."""
    shared: dict[str, Any] = {"Color": COLOR, "Text": {"type": "string"}}
    shared["Loop"] = {"anyOf": [{"$ref": "#/$defs/Loop"}, {"$ref": "#/$defs/Color"}]}
    parameters = {"properties": {"x": schema}, "$defs": shared, "definitions": {"Size": {"type": "integer"}}}
    tokenizer = tokenizer_with(tmp_path, FAMILIES["qwen3-coder"][0])
    made = plan(tokenizer, tools=[tool("f", parameters | {"required": ["x"]})])
    for text in (*good, *bad):
        reply = f"<tool_call>\n<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>\n</tool_call>"
        assert accepts(tokenizer, made, reply) == (text in good), text
        if text in good:
            [(name, arguments)] = taken_apart(made, list(reply))[2]
            assert (name, json.loads(arguments)) == ("f", {"x": good[text]})


@pytest.mark.fault("F23")
def test_arguments_that_share_a_long_definition_cost_no_more_than_their_schema() -> None:
    """Each of the arguments read all of the definition, and their grammar repeated it."""
    shared: dict[str, Any] = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 10} for n in range(40)}
    shared |= {"d40": {"type": "integer"}, "long": {"enum": ["x" * 10_000]}}
    properties = {"deep": {"$ref": "#/$defs/d0"}} | {f"a{n}": {"$ref": "#/$defs/long"} for n in range(1000)}
    arguments = qwen3_coder.Arguments({"properties": properties, "$defs": shared})
    assert arguments.named("deep").types == {"integer"}  # not 10 ** 40 ways through them
    typed = [name for name in properties if arguments.named(name).types]
    assert 20 < len(typed) < 30
    few = {"title": "x" * 100_000, "type": "integer"}
    one, many = ({f"a{n}": {"$ref": "#/$defs/d"} for n in range(count)} for count in (1, 1000))
    for properties, most in ((one, 200_000), (many, 700_000)):
        use = ToolUse((), {"f": {"properties": properties, "$defs": {"d": few}}}, False, False)
        assert len("".join(qwen3_coder.Qwen3Coder(Vocabulary({}, ()), "").calls(use)[1])) < most


def test_what_cannot_be_held_is_refused(tmp_path: Path) -> None:
    large = [tool(f"f{i}", {"properties": {"a": {"enum": ["x" * (1 << 17)]}}}) for i in range(5)]
    untagged = tokenizer_with(tmp_path, CHATML + '{{ tools }}"parameters": ')
    for fields, message in (
        ({"tools": large}, "tools make a grammar of"),
        ({"structure": FORM}, "response_format is given beside tools"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            plan(untagged, **fields)


def test_json_that_is_no_call_is_content(family: tuple[str, Tokenizer]) -> None:
    name, tokenizer = family
    head = "<|channel|>final<|message|>" if name == "gpt-oss" else ""
    made = plan(tokenizer, structure=FORM)
    for text in ('{"x": 1}', ' {\n"name": "pong"}', '{"name": "ping"'):
        for pieces in ([head + text], list(head + text)):
            assert taken_apart(made, pieces) == ("", text, [])
