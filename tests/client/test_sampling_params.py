"""The public values: what is refused and how, what a model's defaults fill, what a completion shows."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from lamina.completions import Completion, Sample, Timing, Usage
from lamina.errors import InvalidRequest, LaminaError, ModelFileError
from lamina.sampling_params import JSON_OBJECT, SamplingParams

REALS: dict[str, tuple[float, float]] = {"temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1)}
REALS |= {"repetition_penalty": (0.01, 100), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
INTEGERS = {"top_k": (-1, 2**31 - 1), "seed": (0, 2**64 - 1), "n": (1, 256)}
INTEGERS |= dict.fromkeys(("max_tokens", "min_tokens"), (0, 2**31 - 1))
INTEGERS |= dict.fromkeys(("logprobs", "prompt_logprobs"), (0, 20))


@pytest.mark.parametrize("name", [*REALS, *INTEGERS])
def test_a_number_has_bounds_and_no_other_type(name: str) -> None:
    low, high = (REALS | INTEGERS)[name]
    wrong: list[Any] = [low - 1, high + 1, "1", True, [1], math.nan, math.inf, -math.inf]
    wrong += [1.5, 10**5000] if name in INTEGERS else []
    for value in wrong:
        with pytest.raises(InvalidRequest, match=f"{name} is .*; allowed is .* {low} to {high}"):
            SamplingParams(**{name: value})
    for value in (1e-9 if name == "top_p" else low, high):
        SamplingParams(**{"max_tokens": None, name: value})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("logit_bias", [(1, 2.0)], "mapping"),
        ("logit_bias", dict.fromkeys(range(4097), 1.0), "logit_bias has 4097 tokens; allowed are 4096"),
        ("logit_bias", {"1": 2.0}, "integer"),
        ("logit_bias", {-1: 2.0}, "integer from 0"),
        ("logit_bias", {1: 101}, "-100 to 100"),
        ("logit_bias", {1: math.nan}, "-100 to 100"),
        ("stop", "", "1 to 1024 characters"),
        ("stop", ["a", ""], "1 to 1024 characters"),
        ("stop", "a" * 1025, "1 to 1024 characters"),
        ("stop", ["a"] * 65, "at most 64"),
        ("stop", [b"a"], "1 to 1024 characters"),
        ("stop", 5, "a string or a list"),
        ("stop_token_ids", [1, -1], "integer from 0"),
        ("stop_token_ids", [True], "integer from 0"),
        ("stop_token_ids", "12", "list of token ids"),
        ("min_tokens", 257, "at most max_tokens, which is 256"),
        ("ignore_eos", 1, "True or False"),
        ("json_schema", 5, "a mapping, or JSON"),
        ("json_schema", "{", "is no JSON"),
        ("json_schema", "[]", "a mapping, or JSON"),
        ("json_schema", '{"a": NaN}', "is no JSON"),
        ("json_schema", {"a": math.nan}, "is no JSON"),
        ("json_schema", {"a": object()}, "is no JSON"),
        ("json_schema", '{"a":' * 65 + "1" + "}" * 65, "64 levels"),
        ("json_schema", '{"a":' * 10_000 + "1" + "}" * 10_000, "64 levels"),
        ("json_schema", '{"a": "' + "x" * (1 << 18) + '"}', "262144 characters"),
        ("json_schema", {"a": "\ud800"}, "valid Unicode"),
        ("regex", "", "1 to 16384 characters"),
        ("regex", b"a", "text"),
        ("regex", "\ud800", "valid Unicode"),
        ("choice", "ab", "a list of 1 to 4096 strings"),
        ("choice", [], "1 to 4096"),
        ("choice", ["a", ""], "text of 1"),
        ("choice", ["a"] * 4097, "1 to 4096"),
        ("grammar", "a" * (1 << 20), "1 to 524288 characters"),
        ("policy", "", "1 to 200 characters"),
        ("policy", 5, "text of 1"),
        ("skip_special_tokens", "no", "True or False"),
        ("include_stop_str_in_output", None, "True or False"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_value_that_is_not_allowed_is_refused_by_name(name: str, value: object, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**{name: value})
    message = str(refusal.value)
    assert name in message
    assert allowed in message
    assert len(message) < 250
    assert isinstance(refusal.value, (ValueError, LaminaError))


def test_the_edges_of_lists_are_allowed() -> None:
    SamplingParams(logit_bias={0: -100, 7: 100}, stop=["a" * 1024] * 64, stop_token_ids=[0], max_tokens=1, min_tokens=1)
    with pytest.raises(InvalidRequest, match="top_p is 0; allowed is a number above 0 to 1"):
        SamplingParams(top_p=0)


def test_numbers_of_other_types_become_plain_ones() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(4), seed=np.uint64(2**64 - 1))
    assert (type(params.temperature), type(params.top_k), type(params.seed)) == (float, int, int)
    assert (params.temperature, params.top_k, params.seed) == (0.5, 4, 2**64 - 1)


def test_what_the_caller_changes_later_changes_nothing() -> None:
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("")
    bias[1] = math.nan
    assert params.stop == ("a",)
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_p = 5.0  # type: ignore[misc]


def test_params_are_values() -> None:
    params = SamplingParams(stop="a", logit_bias={1: 2})
    assert params.stop == ("a",)
    assert params == SamplingParams(stop=["a"], logit_bias={1: 2.0})
    assert hash(params) == hash(copy.deepcopy(params))
    assert dataclasses.replace(params, seed=3).stop == ("a",)
    with pytest.raises(InvalidRequest, match="seed"):
        dataclasses.replace(params, seed=-3)


def test_an_unknown_keyword_is_named_with_the_nearest_known() -> None:
    with pytest.raises(InvalidRequest, match=r"'temprature': did you mean temperature\?"):
        SamplingParams.from_keywords(temprature=0.5)
    with pytest.raises(InvalidRequest, match=r"'xyzzy': known are temperature, .*max_tokens"):
        SamplingParams.from_keywords(xyzzy=1)
    assert SamplingParams.from_keywords(top_k=3) == SamplingParams(top_k=3)


def test_the_model_fills_what_the_caller_left_open() -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": None, "eos_token_id": 2}
    params = SamplingParams(top_p=0.5, max_tokens=9).with_defaults(config)
    assert params == SamplingParams(temperature=0.6, top_p=0.5, top_k=0, min_p=0, repetition_penalty=1, max_tokens=9)


@pytest.mark.parametrize("config", [{}, {"temperature": 0.6}, {"temperature": 0.6, "do_sample": False}])
def test_a_model_that_does_not_ask_for_sampling_is_greedy(config: dict[str, object]) -> None:
    assert SamplingParams().with_defaults(config).temperature == 0
    assert SamplingParams(temperature=0.3).with_defaults(config).temperature == 0.3


def test_a_model_that_asks_for_sampling_alone_samples_at_one() -> None:
    assert SamplingParams().with_defaults({"do_sample": True}).temperature == 1


def test_a_default_that_is_not_allowed_is_the_model_s_fault() -> None:
    with pytest.raises(ModelFileError, match=r"generation_config.json: top_p is 'high'"):
        SamplingParams().with_defaults({"top_p": "high"})
    assert SamplingParams(top_p=0.5).with_defaults({"top_p": "high"}).top_p == 0.5


def test_a_completion_shows_its_first_sample() -> None:
    first, second = Sample(0, "one", (1, 2), "stop"), Sample(1, "two", (3,), "length")
    completion = Completion((first, second), Usage(4, 3), Timing(0.1, 0.5, 1.5, 3))
    assert str(completion) == completion.text == "one"
    assert (completion.token_ids, completion.finish_reason, completion.logprobs) == ((1, 2), "stop", None)
    assert dataclasses.asdict(completion)["samples"][1]["text"] == "two"


def test_tokens_per_second_is_the_rate_after_the_first() -> None:
    assert Timing(queued=0.1, first_token=0.5, total=1.5, tokens=3).tokens_per_second == 2.0
    assert Timing(queued=0.1, first_token=0.5, total=0.5, tokens=1).tokens_per_second == 0.0


def test_a_schema_is_kept_as_json_and_a_choice_as_a_tuple() -> None:
    params = SamplingParams(json_schema={"type": "string", "maxLength": 3})
    assert params.json_schema == '{"type": "string", "maxLength": 3}'
    assert params == SamplingParams(json_schema=params.json_schema)
    assert SamplingParams(choice=["a", "b"]).choice == ("a", "b")
    assert hash(params) != hash(SamplingParams())
    assert params.constrained
    assert not SamplingParams().constrained


def test_a_text_is_held_to_one_thing_at_most() -> None:
    with pytest.raises(InvalidRequest, match="json_schema and regex are given; allowed is at most one of"):
        SamplingParams(json_schema=JSON_OBJECT, regex="a")
