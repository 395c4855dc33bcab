"""Tickets and outputs as plain data and back: numbers, text, tuples and dicts. Knows no wire, and no engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lamina.errors import EngineError, InvalidRequest, LaminaError
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.scheduling.request import Request
from lamina_workers.decoder.logprobs import RowLogprobs

Command: TypeAlias = tuple[Any, ...]
"""("submit", fields of the request, fields of the params, seed) | ("resume", these, and per sample its tokens that were
received and whether it has ended) | ("abort", id, sample, reason) | ("snapshot", number) | ("close",)."""

_ERRORS: dict[str, type[LaminaError]] = {"InvalidRequest": InvalidRequest, "EngineError": EngineError}


def encode_resumed(ticket: EngineRequest, received: Sequence[tuple[Sequence[int], bool]]) -> Command:
    """A submission that another engine has begun, as plain data."""
    return ("resume", *encode_ticket(ticket)[1:], tuple((tuple(tokens), over) for tokens, over in received))


def encode_ticket(ticket: EngineRequest) -> Command:
    """A submission as plain data."""
    request = {field.name: getattr(ticket.request, field.name) for field in dataclasses.fields(Request)}
    params = {field.name: getattr(ticket.params, field.name) for field in dataclasses.fields(SamplingParams)}
    request["stop_token_ids"] = tuple(request["stop_token_ids"])
    params["logit_bias"] = dict(params["logit_bias"])
    return ("submit", request, params, ticket.seed)


def decode_ticket(request: Mapping[str, Any], params: Mapping[str, Any], seed: int) -> EngineRequest:
    """The ticket of `encode_ticket`'s fields, without a sink."""
    fields = dict(request) | {"stop_token_ids": frozenset(request["stop_token_ids"])}
    return EngineRequest(Request(**fields), SamplingParams(**params), seed)


def encode_output(output: EngineOutput, start: float) -> tuple[Any, ...]:
    """An output as plain data, its time as seconds since `start`."""
    logprobs = None if output.logprobs is None else (output.logprobs.chosen, tuple(output.logprobs.top))
    error = None if output.error is None else (type(output.error).__name__, str(output.error))
    return (output.sample, output.token, output.finish_reason, logprobs, error, output.at - start)


def decode_output(fields: tuple[Any, ...], start: float) -> EngineOutput:
    """The output of `encode_output`, on a clock on which its request was submitted at `start`."""
    sample, token, reason, logprobs, error, at = fields
    return EngineOutput(
        sample=sample,
        token=token,
        finish_reason=reason,
        logprobs=None if logprobs is None else RowLogprobs(logprobs[0], logprobs[1]),
        error=None if error is None else _ERRORS.get(error[0], EngineError)(error[1]),
        at=start + at,
    )
