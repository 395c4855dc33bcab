"""Replies that tests write themselves, token by token: no model, no engine, and a parser that only reads marks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from lamina.completions import Completion, Sample, Timing, TokenEvent, TokenLogprob, Usage
from lamina.kv.request import Request
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.server.chat.formats.reply_parser import Delta, ReplyParser
from lamina.server.chat.preparing import PreparedChat


class MarkedParser(ReplyParser):
    """Each token says what it is: ">thought", "text", "!name" begins a call, "+arguments" go on with it."""

    def push(self, text: str, tokens: int = 1) -> list[Delta]:
        deltas = []
        for piece in text.split("|"):
            mark, rest = piece[:1], piece[1:]
            if mark == ">":
                self.reasoning_tokens += 1
                deltas.append(Delta(reasoning=rest))
            elif mark == "!":
                deltas.append(Delta(index=self.calls, id=f"call_{self.calls}", name=rest))
                self.calls += 1
            elif mark == "+":
                deltas.append(Delta(index=self.calls - 1, arguments=rest))
            elif piece:
                deltas.append(Delta(content=piece))
        return deltas

    def finish(self) -> list[Delta]:
        return []


class MarkedPlan:
    """A plan whose replies say what they are."""

    def parser(self) -> MarkedParser:
        return MarkedParser()


def prepared(**params: Any) -> PreparedChat:
    """A chat with a prompt of three tokens, one of them from the cache."""
    sampling = SamplingParams(**({"max_tokens": 100} | params))
    request = EngineRequest(
        request=Request(id="r", prompt=(1, 2, 3), max_tokens=100, min_tokens=0, stop_token_ids=frozenset({0}), n=1),
        params=sampling,
        seed=0,
        cached_tokens=1,
    )
    return PreparedChat(request, MarkedPlan())  # type: ignore[arg-type]  # all that replies need


def ticket(**sampling: Any) -> EngineRequest:
    """A request that was submitted now."""
    params = SamplingParams(**sampling).with_defaults({})
    return EngineRequest(Request("7", (1, 2, 3), params.max_tokens, n=params.n), params, 0, submitted=time.monotonic())


def events(pieces: Sequence[str], reason: Any = "stop", logprobs: bool = False) -> list[TokenEvent]:
    """A token for each piece; the last one ends the sample."""
    last = len(pieces) - 1
    return [
        TokenEvent(
            prompt_index=0,
            sample_index=0,
            token_id=97 + at,
            text=piece if at == last else f"{piece}|",
            finish_reason=reason if at == last else None,
            logprob=TokenLogprob(97 + at, piece, -0.5) if logprobs else None,
        )
        for at, piece in enumerate(pieces)
    ]


def completion(pieces: Sequence[str], reason: Any = "stop", stop: str | None = None) -> Completion:
    """The same sample, whole; `stop` is the stop string that ended it."""
    tokens = tuple(97 + at for at in range(len(pieces)))
    sample = Sample(0, "|".join(pieces), tokens, reason, stop_string=stop)
    return Completion((sample,), Usage(3, len(pieces), 1), Timing(0.0, 0.0, 0.0, len(pieces)))


def frames(written: bytes) -> list[dict[str, Any]]:
    """The data of events, whose names are their types."""
    data = []
    for frame in written.decode().split("\n\n")[:-1]:
        name, line = frame.split("\n")
        data.append(json.loads(line.removeprefix("data: ")))
        assert name == f"event: {data[-1]['type']}"
    return data
