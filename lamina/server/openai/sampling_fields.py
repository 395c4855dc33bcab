"""Fields that chats and completions share: what is refused, and the kinds of structured output."""

from __future__ import annotations

from typing import Any

from lamina.sampling_params import JSON_OBJECT
from lamina.server.chat.sampling import STRUCTURES
from lamina.server.http.errors import ApiError, refused
from lamina.server.openai.schemas import GenerationRequest


def check_prompt_logprobs(fields: GenerationRequest) -> None:
    """Raises ApiError where log probabilities of prompts are wanted in a stream."""
    if fields.prompt_logprobs is not None and fields.stream:
        raise ApiError(400, "prompt_logprobs is given, which is allowed only where stream is false", "prompt_logprobs")


def check_stream_options(fields: GenerationRequest) -> None:
    """Raises ApiError where there are stream options without a stream."""
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "stream_options is given, which is allowed only where stream is true", "stream_options")


def structured(outputs: Any) -> dict[str, Any]:
    """vLLM's `structured_outputs` as keywords of `SamplingParams`."""
    if outputs is None:
        return {}
    allowed = f"an object with exactly one of {', '.join(STRUCTURES)} and json_object"
    if not isinstance(outputs, dict):
        raise refused("structured_outputs", outputs, allowed)
    given = {name: value for name, value in outputs.items() if value is not None}
    for name in given:
        if name not in STRUCTURES and name != "json_object":
            raise ApiError(
                400, f"unknown field structured_outputs.{name[:80]}; allowed is {allowed}", "structured_outputs"
            )
    if len(given) != 1:
        raise ApiError(
            400, f"structured_outputs has {len(given)} of its fields; allowed is {allowed}", "structured_outputs"
        )
    ((name, value),) = given.items()
    if name == "json_object":
        if value is not True:
            raise refused("structured_outputs.json_object", value, "true")
        return {"json_schema": JSON_OBJECT}
    return {STRUCTURES[name]: value}


def response_format(wanted: Any) -> dict[str, Any]:
    """OpenAI's `response_format` as keywords of `SamplingParams`."""
    if wanted is None:
        return {}
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise refused("response_format", wanted, 'an object whose "type" is "text", "json_object" or "json_schema"')
    unknown = wanted.keys() - {"type", *(["json_schema"] if kind == "json_schema" else [])}
    if unknown:
        raise ApiError(400, f"unknown field response_format.{min(unknown)[:80]}", "response_format")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": JSON_OBJECT}
    described = wanted.get("json_schema")
    if not isinstance(described, dict) or not described.keys() <= {"name", "description", "schema", "strict"}:
        allowed = 'an object with "name" and "schema", perhaps "description" and "strict"'
        raise refused("response_format.json_schema", described, allowed)
    schema = described.get("schema", {})
    if not isinstance(schema, dict):
        raise refused("response_format.json_schema.schema", schema, "an object")
    return {"json_schema": schema}
