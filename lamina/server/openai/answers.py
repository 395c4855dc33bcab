"""What the responses of chats and completions share: names, usage, log probabilities, chunks of streams."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from typing import Any, TypeVar

from lamina.completions import Sample, TokenEvent, TokenLogprob
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import MAX_LOGPROBS, SamplingParams
from lamina.server.preparation import go_on

T = TypeVar("T")

LOGPROB = 96
"""About how many bytes one token's log probability takes in an answer."""

PIECE = 64  # tokens whose log probabilities are written at once
_LEAST = -9999.0  # in place of minus infinity, which JSON does not have


def dumps(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def named(kind: str, request_id: str, model: str) -> dict[str, Any]:
    """The first fields of every response, without `object`."""
    return {"id": f"{kind}-{request_id}", "created": int(time.time()), "model": model}


def usage(requests: Sequence[EngineRequest], completion_tokens: int, reasoning_tokens: int = 0) -> dict[str, Any]:
    """The `usage` object: the tokens of all prompts, and those generated."""
    prompt_tokens = sum(len(request.request.prompt) for request in requests)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in requests)},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def stop_reason(params: SamplingParams, ended: Sample | TokenEvent | None) -> str | int | None:
    """vLLM's field: the stop token or string that ended a sample; None for the model's own end of text. `ended` is the
    sample, or its last event, if there is one."""
    if ended is None or ended.finish_reason != "stop":
        return None
    if ended.stop_string is not None:
        return ended.stop_string
    last = ended.token_ids[-1:] if isinstance(ended, Sample) else (ended.token_id,)
    return next((token for token in last if token in params.stop_token_ids), None)


def chat_logprob(entry: TokenLogprob, as_ids: bool) -> dict[str, Any]:
    return _token(entry, as_ids) | {"top_logprobs": [_token(top, as_ids) for top in entry.top]}


def _token(entry: TokenLogprob, as_ids: bool) -> dict[str, Any]:
    part_of_character = "\ufffd" in entry.text
    return {
        "token": f"token_id:{entry.token_id}" if as_ids else entry.text,
        "logprob": max(entry.logprob, _LEAST),
        "bytes": None if part_of_character else list(entry.text.encode("utf-8", "replace")),
    }


def per_token(entries: Iterable[T], write: Callable[[T], Any]) -> Iterator[str]:
    """A list of what `write` makes of tokens' entries, as JSON in pieces: as objects it would take ten times the
    memory, and the interpreter stands still while a piece is written. For a `PreparationPool`."""
    iterator, separator = iter(entries), "["
    while piece := list(islice(iterator, PIECE)):
        go_on()
        yield separator + dumps([write(entry) for entry in piece])[1:-1]
        separator = ","
    yield "]" if separator == "," else "[]"


def prompt_logprobs(entries: Sequence[TokenLogprob | None]) -> Iterator[str]:
    """vLLM's field, as JSON in pieces: for each token of a prompt but the first, its own log probability and those of
    the likeliest, by token id."""
    return per_token(entries, lambda entry: None if entry is None else _by_id(entry))


def with_json(content: Mapping[str, Any], field: str, written: Iterable[str]) -> Iterator[str]:
    """An object as JSON, with one more field whose value is JSON already, in pieces."""
    yield f'{dumps(content)[:-1]},"{field}":'
    yield from written
    yield "}"


def _by_id(entry: TokenLogprob) -> dict[str, Any]:
    ranked = [(token, rank) for rank, token in enumerate(entry.top, 1) if token.token_id != entry.token_id]
    return {
        str(token.token_id): {"logprob": max(token.logprob, _LEAST), "rank": rank, "decoded_token": token.text}
        for token, rank in ((entry, entry.rank), *ranked)
    }


def separators() -> Iterator[str]:
    """What comes before each item of a JSON list that is not empty."""
    return chain("[", repeat(","))


def token_size(params: SamplingParams) -> int:
    """About how many bytes an answer has of the log probabilities of each token."""
    return 0 if params.logprobs is None else LOGPROB * (1 + params.logprobs)


class TextLogprobs:
    """A completion's `logprobs`: lists with one entry per token. `offset`: characters before the first token."""

    def __init__(self, as_ids: bool, offset: int = 0) -> None:
        self._as_ids = as_ids
        self._offset = offset
        self._likeliest = MAX_LOGPROBS

    def echoed(
        self, first: TokenLogprob, prompt: Sequence[TokenLogprob | None], generated: Sequence[TokenLogprob], most: int
    ) -> Iterator[str]:
        """The object for a whole prompt and what follows, as JSON in pieces: `first` is its first token, which has no
        probability. Of the likeliest tokens there are `most`."""
        self._likeliest = most
        begin = self.add([first])
        begin["token_logprobs"], begin["top_logprobs"] = [None], [None]
        return self.written(chain((entry for entry in prompt if entry is not None), generated), begin)

    def written(self, entries: Iterable[TokenLogprob], begin: Mapping[str, Any] | None = None) -> Iterator[str]:
        """The object of entries behind what it begins with, as JSON in pieces. For a `PreparationPool`."""
        columns = {name: [dumps(values)[1:-1]] for name, values in (begin or self.add([])).items()}
        iterator = iter(entries)
        while piece := list(islice(iterator, PIECE)):
            go_on()
            for name, values in self.add(piece).items():
                columns[name].append(dumps(values)[1:-1])
        separator = "{"
        for name, written in columns.items():
            yield f'{separator}"{name}":[{",".join(filter(None, written))}]'
            separator = ","
        yield "}"

    def add(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        names, offsets = [], []
        for entry in entries:
            names.append(self._name(entry))
            offsets.append(self._offset)
            self._offset += len(entry.text)
        return {
            "text_offset": offsets,
            "tokens": names,
            "token_logprobs": [max(entry.logprob, _LEAST) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token in (*entry.top[: self._likeliest], entry):
            top.setdefault(self._name(token), max(token.logprob, _LEAST))
        return top

    def _name(self, entry: TokenLogprob) -> str:
        return f"token_id:{entry.token_id}" if self._as_ids else entry.text


class Chunks:
    """Writes the chunks of a stream. The parts that all chunks share are made once.

    `usage` gives the tokens so far. `with_usage`: chunks have the field `usage`, which is null, or with `continuous`
    the usage so far.
    """

    def __init__(
        self, fields: Mapping[str, Any], usage: Callable[[], Mapping[str, Any]], with_usage: bool, continuous: bool
    ) -> None:
        self._head = f'data: {dumps(fields)[:-1]},"choices":['
        self._tail = ',"usage":null}\n\n' if with_usage else "}\n\n"
        self._usage = usage
        self._with_usage = with_usage
        self._continuous = continuous

    def chunk(self, choice: str) -> str:
        """A chunk with one choice, given as JSON."""
        if self._continuous:
            return f'{self._head}{choice}],"usage":{dumps(self._usage())}}}\n\n'
        return f"{self._head}{choice}]{self._tail}"

    def last(self) -> str:
        """The chunk with the usage; empty where none is wanted."""
        if not self._with_usage:
            return ""
        return f'{self._head}],"usage":{dumps(self._usage())}}}\n\n'
