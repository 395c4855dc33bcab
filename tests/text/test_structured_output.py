"""Constrained decoding: what a text may go on with, alone and in an engine, and what hostile schemas do (nothing)."""

from __future__ import annotations

import gc
import json
import queue
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from engine_rig import Rig, collect, tiny_decoder
from faulty_ports import FaultyPorts
from llguidance import LLParserLimits
from small_grammars import EOS, GRAMMARS, TOKENIZER, VOCABULARY

from lamina import LLM
from lamina.errors import EngineError, InvalidRequest, ModelFileError
from lamina.messages.engine_messages import Submit, pack_commands, unpack_commands
from lamina.sampling_params import JSON_OBJECT, SamplingParams
from lamina.text import structured_output
from lamina.text.structured_output import (
    MAX_COLONS,
    MAX_CONTAINERS,
    MAX_OPTIONS,
    MAX_REMAINDERS,
    Constraint,
    Grammars,
    check_json_schema,
)
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.messages import Exchange

HARD = 'start: "ab" e{0,500}\ne: (/[a-z]/ | "a" | "ab" | "abc"){1,50}'
ODD = ['a"b', "é", "🎉", "\n\t\\", "\x01", "/x/"]


def held(**asked: Any) -> Constraint:
    [constraint] = GRAMMARS.constraints(SamplingParams(**asked), 1)
    return constraint


def tokens(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def possible(constraint: Constraint) -> set[int]:
    bits = np.unpackbits(constraint.allowed.view(np.uint8), bitorder="little")
    return set(bits.nonzero()[0].tolist())


def accepts(text: str, **asked: Any) -> bool:
    """Whether all of a text is allowed, and it may end there."""
    constraint = held(**asked)
    for token in tokens(text):
        if token not in possible(constraint):
            return False
        constraint.advance(token)
    return EOS in possible(constraint)


def text_of(output: list[int]) -> str:
    return str(TOKENIZER.decode(output, skip_special_tokens=True))


def test_a_choice_goes_letter_by_letter_and_ends_by_itself() -> None:
    constraint = held(choice=["ab", "axe"])
    assert possible(constraint) == {*tokens("a"), *tokens("ab")}
    constraint.advance(tokens("a")[0])
    assert possible(constraint) == {*tokens("b"), *tokens("x")}
    assert not constraint.finished
    constraint.advance(tokens("b")[0])
    assert constraint.finished
    assert possible(constraint) == {EOS}


def test_a_choice_of_the_most_and_longest_texts() -> None:
    """Its texts were alternatives of a rule, of which 1,000 may be open at a time: it was compiled, and failed at its
    first token."""
    choice = [f"{'a' * 114}{index:06d}" for index in range(4096)]
    assert accepts(choice[4095], choice=choice)
    assert not accepts("a" * 113 + "0000000", choice=choice)


def test_a_choice_that_begins_like_another_may_end_or_go_on() -> None:
    constraint = held(choice=["x", "xy"])
    constraint.advance(tokens("x")[0])
    assert possible(constraint) == {EOS, *tokens("y")}


def test_the_end_is_allowed_where_the_text_may_end() -> None:
    constraint = held(regex="a(b?)c?")
    assert EOS not in possible(constraint)
    constraint.advance(tokens("a")[0])
    assert EOS in possible(constraint)
    assert not constraint.finished
    constraint.advance(EOS)
    assert constraint.finished


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        ({"regex": r"\d{3}-[a-z]+"}, ["123-x", "120-abc"], ["12-a", "123-", "123-A"]),
        ({"choice": ODD}, ODD, ["a", "e"]),
        ({"regex": "/x/|\\\\|\n"}, ["/x/", "\\", "\n"], ["x"]),
        ({"json_schema": JSON_OBJECT}, ["{}", '{"a": [1, true]}', '{\n  "a": null\n}'], ["[]", " {}", "{  }", "{"]),
        (
            {"json_schema": {"$schema": "http://json-schema.org/draft-07/schema#", "title": "T", "type": "object",
             "properties": {"a": {"type": "integer", "default": 3}}, "required": ["a"], "additionalProperties": False}},
            ['{"a": 1}', '{"a":12}'],
            ["{}", '{"a": "1"}', '{"a": 1, "b": 2}'],
        ),
        (
            {"json_schema": {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}},
             "additionalProperties": False}}, "$ref": "#/$defs/n"}},
            ["{}", '{"next": {"next": {}}}'],
            ['{"next": 1}'],
        ),
        ({"grammar": 'start: e\ne: e "+" t | t\nt: /[0-9]+/ | "(" e ")"'}, ["1+(2+12)"], ["1+", ")"]),
    ],
    ids=["regex", "choice", "slashes", "object", "schema", "recursive", "grammar"],
)  # fmt: skip
def test_what_fits_is_accepted_and_nothing_else(asked: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not accepts(text, **asked)] == []
    assert [text for text in bad if accepts(text, **asked)] == []


def test_a_model_may_have_more_logits_than_tokens_or_fewer() -> None:
    more = held(regex="(.|\n)*")
    assert len(more.allowed) == 10
    assert max(possible(more)) < TOKENIZER.get_vocab_size()
    fewer = Grammars(TOKENIZER.to_str, [EOS], 260).constraints(SamplingParams(regex="(.|\n)*"), 1)[0]
    assert len(fewer.allowed) == 9
    assert possible(fewer) == {token for token in possible(more) if token < 260}


def test_samples_are_held_one_by_one() -> None:
    first, second = GRAMMARS.constraints(SamplingParams(regex="ab*c"), 2)
    first.advance(tokens("a")[0])
    assert possible(second) == {*tokens("a"), *tokens("ab")}
    [fresh] = GRAMMARS.constraints(SamplingParams(regex="ab*c"), 1)
    assert possible(fresh) == possible(second)


def test_unwanted_tokens_give_way_where_nothing_else_is_allowed() -> None:
    constraint = held(regex="ab?")
    a = tokens("a")[0]
    assert constraint.impossible([a], ignore_eos=False) == (a,)
    assert constraint.impossible([a, *tokens("ab")], ignore_eos=False) == ()
    constraint.advance(a)
    assert constraint.impossible([], ignore_eos=True) == (EOS,)
    assert constraint.impossible(tokens("b"), ignore_eos=True) == ()
    assert constraint.impossible([], ignore_eos=False) == ()


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": r"[^\s\S]"}, "no token of this model can come next"),
        ({"regex": "(" * 8000 + "a" + ")" * 8000}, "at 1.*nest"),
        ({"json_schema": {"not": {"type": "string"}}}, "not"),
        ({"json_schema": {"type": "strin"}}, "strin"),
        ({"json_schema": {"type": "string", "pattern": "(a"}}, "unclosed group"),
        ({"json_schema": {"$ref": "file:///etc/passwd"}}, "does not fetch"),
        ({"json_schema": {"$ref": "#"}}, "json_schema cannot be used"),
        ({"json_schema": {"type": "array", "minItems": 5, "maxItems": 2}}, "minItems"),
        ({"json_schema": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}}, "items|large|big|rows"),
        ({"json_schema": {"type": "integer", "multipleOf": 999_983}}, f"allowed is .* {MAX_REMAINDERS}"),
        ({"json_schema": {"items": {"multipleOf": 9.99983}}}, f"allowed is .* {MAX_REMAINDERS}"),
        ({"json_schema": {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}}, "multipleOf 2 times"),
        ({"grammar": r'start: %json {"multiple\u004ff" : 999983}'}, f"allowed is .* {MAX_REMAINDERS}"),
        ({"json_schema": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for i in range(4)]}
          for j in range(16)]}}, "schema too large"),
        ({"grammar": "nothing: /a/"}, "no start rule"),
        ({"grammar": "start: <|zorg|>"}, "unknown special token"),
        ({"grammar": "start: start"}, "grammar cannot be used"),
        ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "nested"),
        ({"grammar": "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60)) + 'A60: "x"'}, "too big"),
        ({"grammar": "start: %json " + "[" * 100_000}, f"allowed are {MAX_CONTAINERS}"),
        ({"grammar": 'start: "a"\n' + 'a: "b"\n' * 20_000}, f"allowed are {MAX_COLONS}"),
        ({"grammar": "start: T\nT: " + '"a"? ' * 12_000}, f"allowed are {MAX_OPTIONS}"),
        ({"grammar": "start: T\nT: " + '("a"|"") ' * 12_000}, f"allowed are {MAX_OPTIONS}"),
        ({"regex": "a?" * 8000}, f"allowed are {MAX_OPTIONS}"),
        ({"json_schema": {"properties": dict.fromkeys(map(str, range(8000)), True)}}, f"allowed are {MAX_COLONS}"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_to_is_refused_by_name_and_the_next_one_works(asked: dict[str, Any], why: str) -> None:
    """A terminal of 80,000 optional parts was compiled: two minutes and 12 GB. So was an object of 8,000 optional
    properties, for ten seconds, and a multiple of 999,983, for thirteen seconds and with 340 MB."""
    with pytest.raises(InvalidRequest) as refusal:
        held(**asked)
    message = str(refusal.value)
    assert re.search(why, message)
    assert message.startswith(next(iter(asked)))
    assert len(message) < 500
    assert accepts("ab", regex="ab")


CHAINS = """
import sys
from lamina.text.structured_output import Grammars
from lamina.errors import InvalidRequest
from lamina.sampling_params import SamplingParams

def rules(count, form):
    lines = [form.replace("X", f"a{i}").replace("Y", f"a{i + 1}") for i in range(count)]
    return "start: a0\\n" + "".join(lines) + f'a{count}: "x"'

def schemas(count, form):
    chain = {f"a{i}": form(f"#/$defs/a{i + 1}") for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {f"a{count}": {}} | chain}

grammars = Grammars(sys.stdin.read, [257], 300)
for asked in (
    {"grammar": rules(4000, "X: Y\\n")},
    {"grammar": rules(4000, 'X: "z" (Y "y")*\\n')},
    {"grammar": rules(4000, 'X: "z" Y\\n').replace("a", "A").replace("stArt: A", "start: A")},
    {"json_schema": schemas(800, lambda ref: {"type": "object", "properties": {"x": {"$ref": ref}}})},
    {"json_schema": schemas(1000, lambda ref: {"anyOf": [{"$ref": ref}, {"type": "integer"}]})},
    {"json_schema": schemas(2000, lambda ref: {"$ref": ref})},
):
    try:
        grammars.constraints(SamplingParams(**asked), 1)
    except InvalidRequest as error:
        print(error)
print("done")
"""


def test_the_longest_chains_of_references_do_not_end_the_process() -> None:
    """On a stack of the usual size each of them does."""
    run = subprocess.run(
        [sys.executable, "-c", CHAINS],
        input=TOKENIZER.to_str(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (run.returncode, run.stdout.splitlines()[-1:]) == (0, ["done"]), run.stderr[-500:]


def test_going_on_that_takes_too_much_is_refused_at_that_token() -> None:
    constraint = held(grammar=HARD)
    refusals: list[str] = []
    while not refusals:
        try:
            constraint.advance(min(possible(constraint)))
        except InvalidRequest as error:
            refusals.append(str(error))
    assert "any further" in refusals[0]


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "a{4000000000}"},
        {"regex": "ab" * 8000},
        {"regex": "(a+)+b"},
        {"regex": "(a|b)*a(a|b){60}c"},
        {"json_schema": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}},
        {"json_schema": {"type": "string", "minLength": 2**31}},
        {"json_schema": {"const": "ab" * 100_000}},
        {"json_schema": {"type": "array", "minItems": 2**31}},
        {"json_schema": {"enum": [f"value-{i}" for i in range(10_000)]}},
        {"grammar": 'start: "' + "ab" * 200_000 + '"'},
    ],
    ids=lambda asked: str(asked)[:40],
)
def test_what_is_long_is_still_stepped_through(asked: dict[str, Any]) -> None:
    constraint = held(**asked)
    for _ in range(50):
        if not constraint.finished:
            constraint.advance(min(possible(constraint) - {EOS}))


def test_a_token_that_is_not_allowed_is_refused() -> None:
    constraint = held(regex="ab")
    with pytest.raises(InvalidRequest, match="any further"):
        constraint.advance(tokens("x")[0])


def test_a_model_without_an_end_of_text_cannot_be_held() -> None:
    unusable = Grammars(TOKENIZER.to_str, [], VOCABULARY)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="no end-of-text token"):
            unusable.constraints(SamplingParams(regex="a"), 1)
        unusable.load()  # which says nothing itself
    assert Grammars(TOKENIZER.to_str, [], VOCABULARY).constraints(SamplingParams(), 1) == ()


@pytest.mark.fault("F26")
def test_a_tokenizer_that_is_refused_ends_no_start() -> None:
    """The error of its file ended the thread that connects a server to its engine: it never said that it serves."""

    def refused() -> str:
        raise ModelFileError("a token of id 8388608")

    grammars = Grammars(refused, [EOS], VOCABULARY)
    grammars.load()
    with pytest.raises(ModelFileError, match="8388608"):
        grammars.constraints(SamplingParams(regex="a"), 1)


def test_a_tokenizer_that_cannot_be_read_is_named() -> None:
    with pytest.raises(InvalidRequest, match="no schema or grammar can be held to with this model"):
        Grammars(lambda: '{"model": 3}', [EOS], VOCABULARY).constraints(SamplingParams(regex="a"), 1)


def test_a_schema_can_be_checked_without_a_tokenizer() -> None:
    check_json_schema("x", '{"type": "object", "frobnicate": 3}')
    with pytest.raises(InvalidRequest, match=r"x cannot be used: .*uniqueItems"):
        check_json_schema("x", '{"type": "array", "uniqueItems": true}')
    check_json_schema("x", '{"type": "array", "uniqueItems": true, "items": {"format": "int64"}}', lenient=True)
    with pytest.raises(InvalidRequest, match=r"^x\b"):
        check_json_schema("x", "[" * 9000)


# In an engine.

PROMPTS = [[1, 2, 3], list(range(40)), [7] * 21]
WORD = r"[a-z]{3,30}(-[0-9]{2,9})?"
LONG = r"([a-z]{7,9}-){4,}[0-9]*"
SAMPLINGS = [{"max_tokens": 45}, {"max_tokens": 45, "temperature": 1.5, "seed": 5, "top_p": 0.9, "logprobs": 1}]


@pytest.fixture(scope="module")
def model():
    return tiny_decoder(vocab_size=VOCABULARY)


def answers(model, prompts=PROMPTS, n=1, rig: dict[str, Any] | None = None, **sampling: Any) -> list[list[list[int]]]:
    engine = Rig(model, grammars=GRAMMARS, **(rig or {}))
    try:
        return engine.generate(prompts, n=n, stop_token_ids=[EOS], **sampling)
    finally:
        engine.close()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        ({"regex": WORD}, WORD),
        ({"choice": ["ab", "true", "x12"]}, "ab|true|x12"),
        ({"json_schema": {"type": "object", "properties": {"ab": {"enum": [12, True]}}, "required": ["ab"],
          "additionalProperties": False}}, r'\{\s*"ab"\s*:\s*(12|true)\s*\}'),
    ],
    ids=["regex", "choice", "schema"],
)  # fmt: skip
def test_every_sample_of_every_prompt_fits(model, asked, fits, sampling) -> None:
    for samples in answers(model, n=3, **asked, **sampling):
        for output in samples:
            assert re.fullmatch(fits, text_of(output))


@pytest.mark.fault("F03")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_preemption_and_lanes_change_no_token(model, sampling) -> None:
    expected = answers(model, n=2, regex=LONG, **sampling)
    engine = Rig(model, grammars=GRAMMARS, pages=9 * 8)
    assert engine.generate(PROMPTS, n=2, stop_token_ids=[EOS], regex=LONG, **sampling) == expected
    assert engine.scheduler.counters.preempted > 0
    engine.close()
    lanes = {"shard": "heads", "weights": (1, 1), "lanes": 2}
    assert answers(model, n=2, rig=lanes, regex=LONG, **sampling) == expected


@pytest.mark.fault("F03")
def test_a_batch_that_fails_and_runs_again_advances_once(model) -> None:
    ports = FaultyPorts(range(17, 1000, 17), ProtocolError("cut off"), Exchange)
    sampling = SAMPLINGS[1]
    expected = answers(model, regex=WORD, **sampling)
    assert answers(model, rig={"port": ports}, regex=WORD, **sampling) == expected
    assert len(ports.struck) > 2


def reasons(model, **sampling: Any) -> list[tuple[str, Any]]:
    engine = Rig(model, grammars=GRAMMARS)
    params = SamplingParams(stop_token_ids=[EOS], **sampling).with_defaults({})
    _, inbox = engine.submit([1, 2, 3], params)
    outputs = []
    try:
        while not outputs or outputs[-1].finish_reason is None:
            outputs += inbox.get(timeout=60)
            for output in outputs:
                if output.error is not None:
                    raise output.error
    finally:
        engine.close()
    last = outputs[-1]
    if last.token is None:  # the end was known only after the token was sent
        outputs[-2:] = [replace(outputs[-2], finish_reason=last.finish_reason)]
    return [(text_of([output.token]), output.finish_reason) for output in outputs]


def test_a_text_that_can_only_end_ends_with_its_last_token(model) -> None:
    assert reasons(model, choice=["xyz"], max_tokens=9) == [("x", None), ("y", None), ("z", "stop")]
    assert reasons(model, choice=["xyz"], max_tokens=3)[-1] == ("z", "stop")
    assert reasons(model, choice=["xyz"], max_tokens=2)[-1] == ("y", "length")


def test_the_end_comes_before_min_tokens_only_where_nothing_else_is_left(model) -> None:
    assert len(reasons(model, choice=["xyz"], max_tokens=9, min_tokens=7)) == 3
    ends_early = {"regex": "x+", "logit_bias": {EOS: 100.0}, "max_tokens": 9}
    assert reasons(model, **ends_early) == [("x", None), ("", "stop")]
    assert len(reasons(model, min_tokens=7, **ends_early)) == 8
    assert reasons(model, min_tokens=9, **ends_early)[-1] == ("x", "length")
    assert reasons(model, ignore_eos=True, **ends_early)[-1] == ("x", "length")


def test_bias_and_penalties_lose(model) -> None:
    wanted, unwanted = tokens("q")[0], tokens("x")[0]
    bias = {wanted: 100.0, unwanted: -100.0}
    outputs = reasons(model, regex="x{5}", logit_bias=bias, frequency_penalty=2.0, repetition_penalty=9.0, max_tokens=9)
    assert "".join(text for text, _ in outputs) == "xxxxx"


def test_tokenizer_is_loaded_once() -> None:
    """The first request with a schema stopped all others for as long as the tokenizer took to load."""
    texts = iter([TOKENIZER.to_str()])
    grammars = Grammars(lambda: next(texts), [EOS], VOCABULARY)
    grammars.load()
    assert next(texts, None) is None
    assert len(grammars.constraints(SamplingParams(regex="a"), 2)) == 2


def test_who_keeps_an_error_of_a_grammar_keeps_nothing_that_was_compiled(monkeypatch) -> None:
    """Tracebacks of errors kept matchers of some 50 MB each until the next garbage collection."""

    def constraints() -> int:
        gc.collect()
        return sum(type(each) is Constraint for each in gc.get_objects())

    monkeypatch.setattr(structured_output, "_LIMITS", LLParserLimits(step_max_items=1))
    before = constraints()
    with pytest.raises(InvalidRequest, match=r"grammar cannot be used: .* Too many items") as caught:
        held(grammar=f"{HARD} | /[0-9]/")
    assert caught.value.__traceback__ is not None
    assert constraints() == before


def test_samples_with_slow_masks_go_the_same_way(monkeypatch) -> None:
    """What is slow consumes its tokens on another way, which leaves the interpreter to others."""
    monkeypatch.setattr(structured_output, "_SLOW", 0.0)
    constraint = held(choice=["ab", "axe"])
    for letter in "ax":
        constraint.advance(*tokens(letter))
        assert constraint.slow
    assert possible(constraint) == set(tokens("e"))
    with pytest.raises(InvalidRequest, match="any further"):
        constraint.advance(*tokens("x"))


def test_masks_that_take_too_much_time_in_all_end_the_sample(monkeypatch) -> None:
    """Each mask is bounded, so without this bound a sample could have a slow one for each of its tokens."""
    constraint = held(regex="[a-z]*")
    monkeypatch.setattr(structured_output, "MASK_SECONDS", 0.0)
    monkeypatch.setattr(structured_output, "MASK_SECONDS_A_TOKEN", 0.0)
    with pytest.raises(InvalidRequest, match=r"the masks of 1 tokens took .* allowed are 0 s and 0 s a token"):
        constraint.advance(tokens("x")[0])


def test_one_whose_grammar_grows_too_complex_fails_alone(model) -> None:
    engine = Rig(model, grammars=GRAMMARS)
    hard = SamplingParams(grammar=HARD, max_tokens=300, ignore_eos=True, n=2)
    easy = SamplingParams(regex="[a-z]+", max_tokens=60, stop_token_ids=[EOS])
    inboxes = [engine.submit([1, 2], params.with_defaults({}))[1] for params in (hard, easy)]
    with pytest.raises(InvalidRequest, match="any further"):
        collect(inboxes[0], 2)
    assert re.fullmatch("[a-z]+", text_of(collect(inboxes[1])[0]))
    assert engine.engine.alive
    engine.close()


def test_nothing_is_kept_of_what_has_ended(model) -> None:
    engine = Rig(model, grammars=GRAMMARS)
    engine.generate(PROMPTS, regex=WORD, n=2, max_tokens=9, frequency_penalty=1.0)
    ticket, inbox = engine.submit([1, 2], SamplingParams(regex="[a-z]+", max_tokens=900, n=2).with_defaults({}))
    inbox.get(timeout=60)
    engine.engine.abort(ticket)
    collect(inbox, 2)
    engine.close()
    assert not engine.engine._registry.constraints
    assert not engine.engine._registry.histories


def test_an_engine_without_a_tokenizer_says_so(model) -> None:
    engine = Rig(model)
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        engine.generate([[1]], regex="a")
    assert engine.generate([[1]], max_tokens=1)
    engine.close()


def test_what_is_asked_for_survives_the_way_to_an_engine_elsewhere(model) -> None:
    engine = Rig(model, grammars=GRAMMARS)
    for asked in ({"json_schema": JSON_OBJECT}, {"regex": "a"}, {"choice": ["a", "b"]}, {"grammar": "start: /a/"}):
        params = SamplingParams(max_tokens=3, **asked).with_defaults({})
        ticket, inbox = engine.submit([1], params)
        [submit] = unpack_commands(*pack_commands([Submit(ticket.request, ticket.params, ticket.seed)]))
        assert isinstance(submit, Submit)
        assert submit.params == params
        collect(inbox)
    engine.close()


def test_stopping_ends_held_requests_too(model) -> None:
    engine = Rig(model, grammars=GRAMMARS)
    _, inbox = engine.submit([1], SamplingParams(regex="a+", ignore_eos=True, max_tokens=2000).with_defaults({}))
    inbox.get(timeout=60)
    engine.engine.close()
    with pytest.raises(EngineError, match="stopped"):
        collect(inbox)
    assert isinstance(inbox, queue.SimpleQueue)


# With the real model.

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "flat": {"type": ["integer", "null"]}},
            "required": ["zip", "flat"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"$ref": "#/$defs/i"}, "minItems": 2, "maxItems": 4,
     "$defs": {"i": {"type": "object", "properties": {"x": {"type": "number", "minimum": -1.5, "maximum": 1.5},
     "ok": {"type": "boolean"}}, "required": ["x", "ok"], "additionalProperties": False}}},
    {"anyOf": [{"type": "object", "properties": {"kind": {"const": k}, "day": {"type": "string", "format": "date"}},
     "required": ["kind", "day"], "additionalProperties": False} for k in ("birth", "death")]},
]  # fmt: skip


@pytest.fixture(scope="module")
def llm():
    with LLM("smollm2-135m", threads=1, kv_memory=256 << 20) as llm:
        yield llm


@pytest.mark.data
@pytest.mark.real
@pytest.mark.parametrize("schema", SCHEMAS, ids=["person", "numbers", "days"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_real_model_fits_its_schema(llm, schema: dict[str, Any], temperature: float) -> None:
    question = [{"role": "user", "content": "Invent something and describe it in JSON."}]
    sampling = {"temperature": temperature, "top_p": 1.0, "max_tokens": 300}
    for seed in range(3):
        completion = llm.chat(question, json_schema=schema, seed=seed, n=2, **sampling)
        for sample in completion.samples:
            assert sample.finish_reason == "stop"
            jsonschema.validate(json.loads(sample.text), schema)


@pytest.mark.data
@pytest.mark.real
def test_the_real_model_with_all_that_goes_along(llm) -> None:
    completion = llm.generate("The answer is", choice=["yes", "no", "perhaps"], logprobs=2)
    assert completion.text in ("yes", "no", "perhaps")
    assert completion.logprobs[0].logprob < 0
    completion = llm.generate(
        "Numbers:", regex=r"[0-9]+(, [0-9]+)*", stop=[", "], max_tokens=40, temperature=1.0, seed=1
    )
    assert re.fullmatch(r"[0-9]*", completion.text)
    pieces = list(llm.stream("A", grammar='start: "x" /[0-9]{4}/', temperature=1.0))
    assert re.fullmatch("x[0-9]{4}", "".join(event.text for event in pieces))
    assert pieces[-1].finish_reason == "stop"
    with pytest.raises(InvalidRequest, match="look-around"):
        llm.generate("A", regex="(?=a)")
