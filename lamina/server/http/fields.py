"""The base of the models of requests' bodies, and how a body is read by one. Each dialect has its own models."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, WithJsonSchema

from lamina.server.http.errors import ApiError, refused, shown


def described(*schemas: Mapping[str, Any]) -> Any:
    """A type with these schemas in the document. It validates nothing: the code that uses the value does."""
    return WithJsonSchema({"anyOf": [*schemas, {"type": "null"}]} if len(schemas) > 1 else dict(schemas[0]))


_NOTHING = described({})
Ignored = Annotated[Any, _NOTHING]
"""The type of a field that is accepted and changes nothing."""
Null = Annotated[Any, described({"type": "null"})]
"""The type of a field that is only known: its route refuses every value, and says what to use instead."""


class Strict(BaseModel):
    """The base of requests: types are not converted, and unknown fields are errors. Each list has a `max_length`, and
    is checked up to its first wrong item (`fail_fast`): pydantic would make an error for each of a million."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


M = TypeVar("M", bound=BaseModel)


def read(model: type[M], fields: Mapping[str, Any]) -> M:
    """A request from its fields, without the ignored ones and the unknown ones that are null. Raises ApiError, which
    names the field, its value and what is allowed."""
    declared = model.model_fields
    fields = {name: value for name, value in fields.items() if value is not None or name in declared}
    for name in fields:
        if name not in declared:
            near = difflib.get_close_matches(name[:80], declared, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "/openapi.json lists those that are known"
            raise ApiError(400, f"unknown field {shown(name)}: {hint}", name[:80], "unknown_field")
    try:
        return model.model_validate(
            {name: value for name, value in fields.items() if _NOTHING not in declared[name].metadata}
        )
    except ValidationError as error:
        raise _refused(model, fields, error.errors(include_url=False)) from None


def read_text(name: str, value: object) -> str:
    """An unchecked value of a field that is text. Raises ApiError."""
    if not isinstance(value, str):
        raise refused(name, value, "text")
    return value


def _refused(model: type[BaseModel], fields: Mapping[str, Any], errors: Sequence[Any]) -> ApiError:
    """The first error; where a value may be of several types, the messages of all of them."""
    first = errors[0]
    path, value = _place(fields, first["loc"])
    if first["type"] == "missing":
        return ApiError(400, f"{path} is missing; it is required", path, "missing_field")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {path}", path, "unknown_field")
    if first["type"] == "too_long":
        return ApiError(400, f"{path} is {shown(value)}; allowed are at most {first['ctx']['max_length']}", path)
    messages = (error["msg"].replace("Input should be ", "") for error in errors if error["loc"][0] == first["loc"][0])
    allowed = _range(model, path) or " or ".join(dict.fromkeys(messages))
    return ApiError(400, f"{path} is {shown(value)}; allowed is {allowed}", path)


def _range(model: type[BaseModel], path: str) -> str | None:
    """The allowed range of a number."""
    field = model.model_fields.get(path)
    limits = {name: value for limit in (field.metadata if field else ()) for name, value in _limits(limit)}
    if "le" not in limits:
        return None
    low = f"above {limits['gt']}" if "gt" in limits else f"from {limits['ge']}"
    types = () if field is None else (field.annotation, *get_args(field.annotation))
    kind = "an integer" if int in types else "a number"
    return f"{kind} {low} to {limits['le']}"


def _limits(limit: object) -> list[tuple[str, Any]]:
    """The limits in one annotation of a field."""
    return [(name, getattr(limit, name)) for name in ("gt", "ge", "le") if getattr(limit, name, None) is not None]


def _place(fields: Mapping[str, Any], location: Sequence[int | str]) -> tuple[str, Any]:
    """The path of the field with an error, and its value."""
    path = ""
    value: Any = fields
    for part in location:
        if isinstance(value, list) and isinstance(part, int):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and isinstance(part, str):
            path, value = f"{path}.{part}" if path else part, value.get(part)
    return path, value
