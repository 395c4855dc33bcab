"""Fields of requests by their schemas, without a server: what is beyond a bound or of another type is refused by name,
and no list is without end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from lamina.server.anthropic.schemas import CountTokensRequest, MessagesRequest
from lamina.server.chat import sampling
from lamina.server.http import limits
from lamina.server.http.errors import ApiError
from lamina.server.http.fields import Strict, read
from lamina.server.openai import schemas
from lamina.server.openai.responses.schemas import InputTokensRequest, ResponsesRequest

MESSAGES = [{"role": "user", "content": "hi"}]
REQUESTS: dict[type[Strict], dict[str, Any]] = {  # with the fields that each must have
    schemas.ChatRequest: {"messages": MESSAGES},
    schemas.CompletionRequest: {"prompt": "a"},
    schemas.TokenizeRequest: {},
    schemas.DetokenizeRequest: {"tokens": [1]},
    schemas.EmbeddingRequest: {"input": "a"},
    schemas.RerankRequest: {"query": "a", "documents": ["b"]},
    ResponsesRequest: {},
    InputTokensRequest: {},
    MessagesRequest: {"messages": MESSAGES, "max_tokens": 4},
    CountTokensRequest: {"messages": MESSAGES},
}
every_request = pytest.mark.parametrize("model", REQUESTS, ids=lambda model: model.__name__)


BOUNDS = ("ge", "le", "gt", "min_length", "max_length")
WRONG: dict[Any, tuple[Any, ...]] = {  # by the type that is wanted
    int: ("4", True, 1.5, 10**30, -(10**30), [1]),
    float: ("hot", float("nan"), float("inf"), 1e308, [1.0]),
    bool: ("yes", 1),
    str: (5, ["a"]),
    list: ("a", 5, {}, [{}]),
}


def wrong(field: FieldInfo) -> Iterator[Any]:
    """Values of other types than a field's own, and beyond its bounds."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    for kind in kinds:
        yield from ("magic", 5) if get_origin(kind) is Literal else WRONG.get(get_origin(kind) or kind, ())
    bounds = {
        name: value for limit in field.metadata for name in BOUNDS if (value := getattr(limit, name, None)) is not None
    }
    yield from (bounds[name] + step for name, step in (("ge", -1), ("le", 1), ("gt", 0)) if name in bounds)
    lengths = (("min_length", -1), ("max_length", 1)) if str in kinds else ()
    yield from ("x" * (bounds[name] + step) for name, step in lengths if name in bounds)


@every_request
def test_a_value_that_is_wrong_is_refused_by_name(model: type[Strict]) -> None:
    count = 0
    for name, field in model.model_fields.items():
        for value in wrong(field):
            with pytest.raises(ApiError) as refusal:
                read(model, REQUESTS[model] | {name: value})
            assert refusal.value.status == 400
            assert str(refusal.value.param).partition("[")[0] == name, value
            assert str(refusal.value).startswith(str(refusal.value.param)), value
            assert len(str(refusal.value)) < 500
            count += 1
    assert count > 1


@every_request
def test_a_field_that_is_missing_or_unknown_is_named(model: type[Strict]) -> None:
    for name in REQUESTS[model]:
        with pytest.raises(ApiError, match=f"{name} is missing; it is required"):
            read(model, {other: value for other, value in REQUESTS[model].items() if other != name})
    with pytest.raises(ApiError, match="unknown field 'magic'"):
        read(model, REQUESTS[model] | {"magic": 1})


@every_request
def test_every_list_that_is_checked_is_bounded(model: type[Strict]) -> None:
    """Lists had no greatest length."""
    for name, field in model.model_fields.items():
        if "list[" in str(field.annotation):
            bounds = {key for each in field.metadata for key in ("max_length", "fail_fast") if getattr(each, key, None)}
            assert bounds == {"max_length", "fail_fast"}, name


def test_ignored_fields_are_not_kept() -> None:
    """A request kept up to 16 MB of `metadata` that nobody reads for as long as its answer took."""
    fields = {"prompt": "x", "metadata": {"a": "b"}, "user": "c", "store": True}
    assert read(schemas.CompletionRequest, fields).model_dump(exclude_none=True) == {"prompt": "x"}


def test_values_in_errors_are_short() -> None:
    for value in ("x" * 10**6, list(range(10**5)), 10**4000, {"a": "x" * 10**6}):
        with pytest.raises(ApiError) as refusal:
            read(schemas.CompletionRequest, {"prompt": "x", "max_tokens": value})
        assert len(str(refusal.value)) < 200


def test_every_field_is_described() -> None:
    for model in (schemas.ChatRequest, schemas.CompletionRequest):
        for name, field in model.model_fields.items():
            assert field.description or name in ("presence_penalty", "frequency_penalty"), name


def test_brackets_within_strings_are_text() -> None:
    body = {"a": "[" * 1000 + '\\"[' * 1000, "b": [[], {}]}
    assert limits.parse_object(json.dumps(body).encode()) == body


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"a": [' + b"[]," * 1_000_000 + b"1]}", "1000000 values"),
        (b'{"a": [' + b"1," * 1_000_001 + b"1]}", "1000000 values"),
        (b'{"a": [' + b'"",' * 500_001 + b"[]" * 101 + b"1]}", "500000 strings"),
        (b'{"a": "' + b'\\"[' * 300_000, "no JSON"),  # escapes without end
    ],
    ids=["lists", "numbers", "strings", "escapes"],
)
def test_many_values_are_refused_before_they_are_made(body: bytes, says: str) -> None:
    with pytest.raises(ApiError, match=says):
        limits.parse_object(body)


def test_the_bounds_of_single_fields_can_be_reached() -> None:
    """The schema allowed 1,048,576 tokens where no body may have a million values, and ids of nine digits alone."""
    tokens = b"1," * (schemas.MAX_TOKENS - 1) + b"1"
    limits._check_structure(b'{"model":"m","tokens":[' + tokens + b"]}")
    pattern = schemas.ChatRequest.model_json_schema()["properties"]["logit_bias"]["anyOf"][0]["propertyNames"][
        "pattern"
    ]
    assert [bool(re.fullmatch(pattern, name)) for name in (str(2**31 - 1), "12345678901")] == [True, False]
    assert sampling._logit_bias({str(2**31 - 1): 1}) == {2**31 - 1: 1}
