"""Requests and outputs as plain data and back: numbers, text, tuples and dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lamina.errors import EngineError, InvalidRequest, LaminaError, PolicyError
from lamina.kv.request import Request
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina_workers.decoder.logprobs import PromptScores, RowLogprobs

Command: TypeAlias = tuple[Any, ...]
"""("submit", fields of the request, fields of the params, seed) | ("resume", these, and for each sample the tokens that
were received and whether it has ended) | ("abort", id, sample, reason) | ("snapshot", number) | ("close",)."""

_ERRORS: dict[str, type[LaminaError]] = {error.__name__: error for error in (InvalidRequest, PolicyError, EngineError)}


def encode_resumed(request: EngineRequest, received: Sequence[tuple[Sequence[int], bool]]) -> Command:
    """The command to go on with a request that another engine began."""
    return ("resume", *encode_request(request)[1:], tuple((tuple(tokens), over) for tokens, over in received))


def encode_request(request: EngineRequest) -> Command:
    """The command to submit a request."""
    fields = {field.name: getattr(request.request, field.name) for field in dataclasses.fields(Request)}
    params = {field.name: getattr(request.params, field.name) for field in dataclasses.fields(SamplingParams)}
    fields["stop_token_ids"] = tuple(fields["stop_token_ids"])
    params["logit_bias"] = dict(params["logit_bias"])
    return ("submit", fields, params, request.seed)


def decode_request(fields: Mapping[str, Any], params: Mapping[str, Any], seed: int) -> EngineRequest:
    """The request of `encode_request`'s fields, without a sink."""
    request = Request(**{**fields, "stop_token_ids": frozenset(fields["stop_token_ids"])})
    return EngineRequest(request, SamplingParams(**params), seed)


def encode_output(output: EngineOutput, start: float) -> tuple[Any, ...]:
    """An output as plain data, its time as seconds since `start`."""
    logprobs = None if output.logprobs is None else (output.logprobs.chosen, tuple(output.logprobs.top))
    error = None if output.error is None else (type(output.error).__name__, str(output.error))
    scores = None if output.scores is None else _encode_scores(output.scores)
    return (output.sample, output.token, output.finish_reason, logprobs, error, output.at - start, scores)


def decode_output(fields: tuple[Any, ...], start: float) -> EngineOutput:
    """The output of `encode_output`'s fields. `start` is when its request was submitted, on the receiver's clock."""
    sample, token, reason, logprobs, error, at, scores = fields
    return EngineOutput(
        sample=sample,
        token=token,
        finish_reason=reason,
        logprobs=None if logprobs is None else RowLogprobs(logprobs[0], logprobs[1]),
        error=None if error is None else _ERRORS.get(error[0], EngineError)(error[1]),
        at=start + at,
        scores=None if scores is None else _decode_scores(*scores),
    )


def _encode_scores(scores: PromptScores) -> tuple[Any, ...]:
    reports = tuple((report.chosen, tuple(report.top)) for report in scores.logprobs)
    return (scores.start, reports, scores.ranks, scores.hidden)


def _decode_scores(start: int, reports: Any, ranks: tuple[int, ...], hidden: tuple[float, ...]) -> PromptScores:
    return PromptScores(start, tuple(RowLogprobs(*report) for report in reports), ranks, hidden)
