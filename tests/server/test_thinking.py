"""Reasoning: what switches it, how it is limited, how it is told from content, and how its history is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_replies import CHATML, accepts, allowed, cut_at, grammars_of, taken_apart, tokenizer_with

from lamina.errors import InvalidRequest
from lamina.sampling_params import SamplingParams
from lamina.server.chat.reply_format import ReplyFormat, ReplyPlan
from lamina.server.chat.thinking import Thinking
from lamina.text.messages import check_messages
from lamina.text.tokenizer import Tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
FORM = {"json_schema": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}
SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
# By family: template, special tokens, tokens that are one, and whether the prompt opens the reasoning.
FAMILIES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], bool]] = {
    "qwen3": (f"{CHATML}{SWITCH}{{{{ tools }}}}", (), ("<think>", "</think>"), False),
    "r1": (f"{CHATML}<think>\n", (), ("<think>", "</think>"), True),
    "spelled": (f"{CHATML}{{# </think> #}}", (), (), False),
    "magistral": (f"{CHATML}{{# [THINK] [/THINK] [TOOL_CALLS] #}}", ("[THINK]", "[/THINK]", "[TOOL_CALLS]"), (), False),
}
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer]:
    template, special, single, _ = FAMILIES[request.param]
    return request.param, tokenizer_with(tmp_path_factory.mktemp("model"), template, special, single)


def plan(tokenizer: Tokenizer, **fields: Any) -> ReplyPlan:
    return ReplyFormat.of(tokenizer).plan(**fields)


def around(name: str, thought: str) -> str:
    """The reasoning as the model writes it."""
    if name == "magistral":
        return f"[THINK]{thought}[/THINK]"
    return f"{'' if FAMILIES[name][3] else '<think>'}\n{thought}\n</think>\n\n"


def test_reasoning_is_told_from_content(family: tuple[str, Tokenizer]) -> None:
    name, tokenizer = family
    text = around(name, "So <b> 1 + 1.\n\nYes") + "Two.\n"
    made = plan(tokenizer)
    assert "grammar" not in made.params
    for pieces in ([text], list(text), cut_at(text, (3, 9, 30))):
        assert taken_apart(made, pieces) == ("So <b> 1 + 1.\n\nYes", "Two.\n", [])
    if not FAMILIES[name][3]:
        assert taken_apart(made, ["Two", "."]) == ("", "Two.", [])
        assert taken_apart(made, ["<th", "e>"]) == ("", "<the>", [])
    cut_short = text[: text.index("Yes") + 2]
    assert taken_apart(made, list(cut_short)) == ("So <b> 1 + 1.\n\nYe", "", [])
    assert plan(tokenizer, continued=True).parser() is None


def test_the_tokens_of_reasoning_are_counted(family: tuple[str, Tokenizer]) -> None:
    name, tokenizer = family
    text = around(name, "abcd efgh") + "Two."
    ids = tokenizer.encode(text, add_special_tokens=False)
    made = plan(tokenizer)
    special = made.params.get("skip_special_tokens", True)
    one_by_one, at_once = made.parser(), made.parser()
    assert one_by_one is not None
    assert at_once is not None
    for token in ids:
        one_by_one.push(tokenizer.decode([token], special), 1)
    at_once.push(text, len(ids))
    assert at_once.reasoning_tokens == len(tokenizer.encode("abcd efgh", add_special_tokens=False))
    most = at_once.reasoning_tokens + len(around(name, "").strip())
    assert at_once.reasoning_tokens <= one_by_one.reasoning_tokens <= most


def test_structure_and_calls_are_for_what_follows_the_reasoning(family: tuple[str, Tokenizer]) -> None:
    name, tokenizer = family
    thought = around(name, 'Is it {"x": 2}? <tool_call> no')
    call = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]' if name == "magistral" else ADD
    held = plan(tokenizer, structure=FORM)
    assert accepts(tokenizer, held, thought + '{"x": 1}')
    assert not accepts(tokenizer, held, thought + "no")
    assert accepts(tokenizer, held, '{"x": 1}') is not FAMILIES[name][3]
    must = plan(tokenizer, tools=TOOLS, tool_choice="required")
    assert accepts(tokenizer, must, thought + call)
    assert not accepts(tokenizer, must, thought + "no")
    may = plan(tokenizer, tools=TOOLS)
    assert accepts(tokenizer, may, thought + "no")
    assert accepts(tokenizer, may, thought + call)
    assert not accepts(tokenizer, may, thought + call.replace("add", "odd"))
    assert taken_apart(may, list(thought + call)) == ('Is it {"x": 2}? <tool_call> no', "", [("add", '{"a": 1}')])


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_ends_the_reasoning(family: tuple[str, Tokenizer], budget: int) -> None:
    name, tokenizer = family
    if name == "spelled":
        pytest.skip("its closing tag has many tokens, so no count can end it")
    made = plan(tokenizer, thinking=Thinking(budget=budget))
    closing = "[/THINK]" if name == "magistral" else "</think>"
    [constraint] = grammars_of(tokenizer).constraints(SamplingParams(grammar=made.params["grammar"]), 1)
    opening = "" if FAMILIES[name][3] else closing.replace("/", "")
    for token in tokenizer.encode(opening, add_special_tokens=False):
        constraint.advance(token)
    [letter] = tokenizer.encode("q")
    for _ in range(budget):
        constraint.foresee(letter)
        constraint.advance(letter)
    end = tokenizer.added_tokens[closing]
    line_breaks = set(tokenizer.encode("\n", add_special_tokens=False)) if budget == 0 else set()
    assert allowed(constraint) - line_breaks == {end}
    text = f"{opening}{'q' * budget}{closing}Two."
    assert accepts(tokenizer, made, text)
    assert taken_apart(made, [text]) == ("q" * budget, "Two.", [])
    assert accepts(tokenizer, made, f"{opening}{closing}Two.")


def test_a_budget_of_gpt_oss_ends_the_analysis(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(
        tmp_path, f"{CHATML}<|channel|>{{{{ reasoning_effort }}}}{{{{ m.thinking }}}}", HARMONY, ends=("<|return|>",)
    )
    head, tail = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>Two."
    for budget, most in ((Thinking(budget=3), 3), (Thinking(enabled=False), 0)):
        made = plan(tokenizer, thinking=budget)
        assert accepts(tokenizer, made, head + "q" * most + tail)
        assert accepts(tokenizer, made, "<|channel|>final<|message|>Two.")
        assert not accepts(tokenizer, made, head + "q" * (most + 1) + tail)
    assert plan(tokenizer, thinking=Thinking(effort="xhigh")).template_kwargs == {"reasoning_effort": "high"}
    free = plan(tokenizer)
    assert free.params == {"skip_special_tokens": False}
    assert taken_apart(free, list(f"{head}Hm.{tail}<|return|>")) == ("Hm.", "Two.", [])


def test_switches_are_those_of_the_template(tmp_path: Path) -> None:
    template, _, single, _ = FAMILIES["qwen3"]
    tokenizer = tokenizer_with(tmp_path, template, (), single)
    question: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]

    def prompt(**fields: Any) -> str:
        made = plan(tokenizer, **fields)
        return "".join(tokenizer.render_parts(made.messages(question), template_kwargs=made.template_kwargs))

    on, off = prompt(), prompt(thinking=Thinking(enabled=False))
    assert off == f"{on.removesuffix('None')}<think>\n\n</think>\n\nNone"
    assert prompt(thinking=Thinking(effort="none")) == off
    assert prompt(template_kwargs={"enable_thinking": False}, thinking=Thinking(effort="high")) == off
    assert prompt(thinking=Thinking(effort="medium")) == on
    assert plan(tokenizer, thinking=Thinking(effort="medium")).params == {}
    assert plan(tokenizer, thinking=Thinking(enabled=False)).params == {}
    assert "max_tokens=512" in plan(tokenizer, thinking=Thinking(effort="minimal")).params["grammar"]
    assert "max_tokens=9" in plan(tokenizer, thinking=Thinking(effort="low", budget=9)).params["grammar"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "an object of at most 32"),
        ({str(n): 1 for n in range(33)}, "at most 32"),
        ({"tools": []}, "use tools instead"),
        ({"bos_token": "x"}, "bos_token"),
        ({"a b": 1}, "names of variables"),
        ({"tone": 1}, "variables that the model's chat template reads"),
        ({"enable_thinking": {"a": 1}}, r"enable_thinking is .*text of at most 4096"),
        ({"enable_thinking": "x" * 5000}, "at most 4096"),
        ({"enable_thinking": float("nan")}, "numbers"),
        ({"enable_thinking": "\ud800"}, "text"),
        ({"enable_thinking": 1 << 70}, "numbers"),
    ],
)
def test_template_kwargs_are_plain_values_that_the_template_reads(
    family: tuple[str, Tokenizer], given: Any, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        plan(family[1], template_kwargs=given)
    assert plan(family[1], template_kwargs={"enable_thinking": True}).template_kwargs == {"enable_thinking": True}


@pytest.mark.parametrize("fields", [{"effort": "extreme"}, {"budget": -1}, {"budget": True}, {"budget": 1 << 40}])
def test_what_is_wrong_with_thinking_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="allowed are"):
        Thinking(**fields)


CALL = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SHOWN = (
    "{% for m in messages %}[{{ m.role }} {{ m.content }} {{ m.reasoning_content or m.thinking or '' }} "
    "{% for c in m.tool_calls %}{{ c.id }}{% endfor %}{{ m.tool_call_id }}]{% endfor %}{% if tools %}{% endif %}"
)
PLAIN = "[system S\n\nD  ][user U  ][assistant A T toolu_1toolu_2][tool R  toolu_1][tool Q  toolu_2]"


def test_variables_of_templates_are_not_kept(tmp_path: Path) -> None:
    """The answers to whether the prompt opens the reasoning were kept by the variables themselves, 800 kB each."""
    tokenizer = tokenizer_with(tmp_path, f"{CHATML}{{{{ lang }}}}{{# </think> #}}")
    for number in range(80):
        plan(tokenizer, template_kwargs={"lang": f"{number:04}" * 1024})
    kept = ReplyFormat.of(tokenizer)._opened
    assert 0 < len(kept) <= 64
    assert sum(map(len, kept)) <= 64 * 64


@pytest.mark.parametrize(
    ("more", "special", "expected"),
    [
        ("</think> tools", (), PLAIN),
        ("developer tools", (), PLAIN),
        ("<|channel|> tools", HARMONY, "[system S\n\nD  ][user U  ][assistant  T\n\nA toolu_1][tool R  toolu_1]"
         "[assistant   toolu_2][tool Q  toolu_2]"),
        ("tools single tool-calls at once", ("<|python_tag|>",), "[system S\n\nD  ][user U  ][assistant A T toolu_1]"
         "[tool R  toolu_1][assistant   toolu_2][tool Q  toolu_2]"),
        ("tools", ("[TOOL_CALLS]",), "[system S\n\nD  ][user U  ][assistant A T 111111111222222222][tool R  111111111]"
         "[tool Q  222222222]"),
    ],
    ids=["hermes", "developer", "gpt-oss", "llama 3", "mistral"],
)  # fmt: skip
def test_the_history_is_in_the_templates_words(tmp_path: Path, more: str, special: Any, expected: str) -> None:
    tokenizer = tokenizer_with(tmp_path, f"{SHOWN}{{# {more} #}}", special)
    messages = check_messages(
        [
            {"role": "system", "content": "S"},
            {"role": "developer", "content": "D"},
            {"role": "user", "content": "U"},
            {"role": "assistant", "content": "A", "reasoning": "T", "tool_calls": [CALL, CALL | {"id": "toolu_2"}]},
            {"role": "tool", "tool_call_id": "toolu_1", "content": "R"},
            {"role": "tool", "tool_call_id": "toolu_2", "content": "Q"},
        ]
    )
    made = plan(tokenizer, tools=TOOLS)
    text = "".join(tokenizer.render_parts(made.messages(messages), tools=list(made.tools)))
    if "[TOOL_CALLS]" in special:
        ids = [made.messages(messages)[2]["tool_calls"][n]["id"] for n in (0, 1)]
        assert all(len(each) == 9 and each.isalnum() for each in ids)
        expected = expected.replace("111111111", ids[0]).replace("222222222", ids[1])
    assert text == expected
