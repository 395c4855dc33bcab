"""Requests and outputs as plain data and back: numbers, text, tuples and dicts.

Requests are dicts by the names of their fields, in the journal too. Outputs, one for each token, are packed by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from lamina.errors import EngineError, InvalidRequest, LaminaError, PolicyError
from lamina.kv.request import Request
from lamina.messages.engine_request import EngineOutput
from lamina.sampling_params import SamplingParams
from lamina_workers.decoder.logprobs import PromptScores, RowLogprobs

_ERRORS: dict[str, type[LaminaError]] = {error.__name__: error for error in (InvalidRequest, PolicyError, EngineError)}

PackedOutput: TypeAlias = tuple[Any, ...]
"""The fields of an `EngineOutput`: sample, token, finish reason, and seconds since its request was submitted. Log
probabilities, error and scores follow where it has one of them."""


def encode_request(request: Request) -> dict[str, Any]:
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(Request)}
    fields["stop_token_ids"] = tuple(fields["stop_token_ids"])
    return fields


def decode_request(fields: Mapping[str, Any]) -> Request:
    return Request(**{**fields, "stop_token_ids": frozenset(fields["stop_token_ids"])})


def encode_params(params: SamplingParams) -> dict[str, Any]:
    """The fields by name, as `SamplingParams` takes them."""
    fields = {field.name: getattr(params, field.name) for field in dataclasses.fields(SamplingParams)}
    fields["logit_bias"] = dict(fields["logit_bias"])
    return fields


def encode_output(output: EngineOutput, start: float) -> PackedOutput:
    """An output of a request that was submitted at `start`."""
    plain = (output.sample, output.token, output.finish_reason, output.at - start)
    if output.logprobs is None and output.error is None and output.scores is None:
        return plain
    logprobs = None if output.logprobs is None else (output.logprobs.chosen, tuple(output.logprobs.top))
    error = None if output.error is None else (type(output.error).__name__, str(output.error))
    scores = None if output.scores is None else _encode_scores(output.scores)
    return (*plain, logprobs, error, scores)


def decode_output(packed: PackedOutput, start: float) -> EngineOutput:
    """The output. `start` is when its request was submitted, on the receiver's clock."""
    if len(packed) == 4:
        sample, token, reason, seconds = packed
        return EngineOutput(sample, token, reason, at=start + seconds)
    sample, token, reason, seconds, logprobs, error, scores = packed
    return EngineOutput(
        sample=sample,
        token=token,
        finish_reason=reason,
        logprobs=None if logprobs is None else RowLogprobs(logprobs[0], logprobs[1]),
        error=None if error is None else _ERRORS.get(error[0], EngineError)(error[1]),
        at=start + seconds,
        scores=None if scores is None else _decode_scores(*scores),
    )


def _encode_scores(scores: PromptScores) -> tuple[Any, ...]:
    reports = tuple((report.chosen, tuple(report.top)) for report in scores.logprobs)
    return (scores.start, reports, scores.ranks, scores.hidden)


def _decode_scores(start: int, reports: Any, ranks: tuple[int, ...], hidden: tuple[float, ...]) -> PromptScores:
    return PromptScores(start, tuple(RowLogprobs(*report) for report in reports), ranks, hidden)
