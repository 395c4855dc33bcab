"""A server's model in the place of one in this process (`Connection`), and how a server is asked (`ask`).

What comes back is not trusted: bytes, lines and seconds are bounded, and what cannot be read is an EngineError.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from http.client import HTTPException
from typing import Any

from lamina.client.input_processor import Conversations, Prepared, Prompts, listed_conversations, listed_prompts
from lamina.completions import Completion, FinishReason, Sample, Timing, TokenEvent, TokenLogprob, Usage
from lamina.errors import EngineError, InvalidRequest
from lamina.sampling_params import SamplingParams, chosen_params
from lamina.system.child_process import KEY_VARIABLE

_MOST, _MOST_LINE, _MOST_LINES = 1 << 26, 1 << 20, 1 << 24  # bytes, and lines of a stream
_STRUCTURES = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
_BROKEN = (OSError, HTTPException, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError)


def begin(url: str, path: str, api_key: str | None, body: Any, seconds: float) -> Any:
    """The response of a server, which begins well; `body` is sent as JSON, None: GET. `api_key`: by default that of
    the environment. Raises InvalidRequest for an URL that is none and for what the server does not allow, EngineError
    where it refuses or is not there."""
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(f"url is {url[:80]!r}; allowed is such as http://127.0.0.1:8000")
    keys = (api_key or os.environ.get(KEY_VARIABLE, "")).split()
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url.rstrip("/") + path, data, {"Content-Type": "application/json"})
        if keys:  # no other server gets it, where this one sends us
            request.add_unredirected_header("Authorization", f"Bearer {keys[0]}")
        return urllib.request.urlopen(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        why = f"status {error.code}"
        with error, suppress(*_BROKEN):
            why = str(json.loads(error.read(_MOST))["error"]["message"])
        kind = InvalidRequest if error.code in (400, 404, 413, 422) else EngineError
        raise kind(f"the server refuses: {why[:500]}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise EngineError(f"no server answers at {url}: {getattr(error, 'reason', error)}") from error


def ask(
    url: str, path: str, api_key: str | None, body: Any = None, read: Callable[[Any], Any] = dict, seconds: float = 10.0
) -> Any:
    """What `read` makes of the JSON that a server answers. Raises as `begin` does, EngineError where it fails."""
    with begin(url, path, api_key, body, seconds) as response:
        try:
            return read(json.loads(response.read(_MOST)))
        except _BROKEN as error:
            raise EngineError(f"what answers at {url}{path} is no Lamina server: {error!r:.200}") from error


class Connection:
    """A model of a Lamina server, with `generate`, `chat`, `stream` and `stream_chat` as `LLM` has them, but for
    `prompt_logprobs`. `model`: its name there; None: the first. `api_key`: by default that of $LAMINA_API_KEY.
    `timeout`: the most seconds until the next token. The prompts of a call are one request: when it was scheduled is
    not known and counts as 0, as do cached tokens where there are several. Without `max_tokens` all may be as long as
    the longest prompt leaves room for. Raises as `begin` does; what the server refuses, at the first token."""

    def __init__(
        self, url: str, model: str | None = None, *, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        self.url, self.key, self.timeout = url.rstrip("/").removesuffix("/v1"), api_key, timeout
        served: dict[str, int] = ask(self.url, "/v1/models", api_key, None, _lengths, timeout)
        if model not in (None, *served) or not served:
            raise InvalidRequest(f"model is {model!r:.80}; allowed at {self.url} are {', '.join(served)}")
        self.model = model or next(iter(served))
        self.max_model_len: int = served[self.model] or self._ask(  # which loads it
            "/tokenize", {"prompt": "a"}, lambda answer: int(answer["max_model_len"])
        )
        self.spelled = lru_cache(1 << 16)(
            lambda token: self._ask("/detokenize", {"tokens": [token]}, lambda answer: str(answer["prompt"]))
        )

    def generate(
        self, prompts: Prompts, params: SamplingParams | None = None, **request: Any
    ) -> Completion | list[Completion]:
        """Complete prompts: text or lists of token ids."""
        return self._complete(prompts, params, request).result()

    def chat(
        self, messages: Conversations, params: SamplingParams | None = None, **request: Any
    ) -> Completion | list[Completion]:
        """Answer a conversation, or each of a list of them."""
        return self._answer(messages, params, request).result()

    def stream(self, prompts: Prompts, params: SamplingParams | None = None, **request: Any) -> Iterator[TokenEvent]:
        """Like `generate`, token by token. Stopping the iteration ends the request."""
        return iter(self._complete(prompts, params, request))

    def stream_chat(
        self, messages: Conversations, params: SamplingParams | None = None, **request: Any
    ) -> Iterator[TokenEvent]:
        """Like `chat`, token by token."""
        return iter(self._answer(messages, params, request))

    def _ask(self, path: str, fields: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
        return ask(self.url, path, self.key, {"model": self.model, **fields}, read, self.timeout)

    def _complete(self, prompts: Any, params: SamplingParams | None, request: dict[str, Any]) -> _Call:
        return _Call(self, listed_prompts(prompts, lambda text: self._tokens({"prompt": text})), params, request)

    def _answer(self, messages: Any, params: SamplingParams | None, request: dict[str, Any]) -> _Call:
        template = {"chat_template_kwargs": request.pop("chat_template_kwargs", None)}
        prepared = listed_conversations(messages, lambda turns: self._tokens({"messages": turns, **template}))
        return _Call(self, prepared, params, request)

    def _tokens(self, fields: dict[str, Any]) -> list[int]:
        tokens: list[int] = self._ask("/tokenize", fields, lambda answer: list(map(int, answer["tokens"])))
        return tokens


def _lengths(answer: Any) -> dict[str, int]:
    """The contexts of models in tokens; 0: the model is not loaded."""
    return {str(entry["id"]): int(entry["max_model_len"] or 0) for entry in answer["data"]}


@dataclass(slots=True)
class _Growing:
    """A sample, as it grows."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None
    stop: str | None = None
    begun: float = 0.0  # seconds until its first token, and until its last one
    ended: float = 0.0


class _Call:
    """One request, for these prompts. It is sent once it is iterated, or `result` waits for it."""

    def __init__(
        self, server: Connection, prepared: Prepared, params: SamplingParams | None, request: dict[str, Any]
    ) -> None:
        priority, (prompts, one) = request.pop("priority", 0), prepared
        self._params = params = chosen_params(params, request)
        if params.prompt_logprobs is not None:
            raise InvalidRequest(f"prompt_logprobs is {params.prompt_logprobs}; allowed over a connection is None")
        fields = {name: value for name, value in asdict(params).items() if value not in (None, (), {})}
        structure = {_STRUCTURES[name]: fields.pop(name) for name in _STRUCTURES if name in fields}
        room = max(1, server.max_model_len - max(map(len, prompts)))
        self._body = {"model": server.model, "max_tokens": room, **fields, "priority": priority, "prompt": prompts}
        self._body |= {"structured_outputs": structure or None, "logprobs": params.logprobs or 0}
        self._body |= {"return_tokens_as_token_ids": True, "stream": True, "stream_options": {"include_usage": True}}
        self._server, self._prompts, self._one, self._cached = server, prompts, one, 0
        self._samples = [_Growing() for _ in range(len(prompts) * params.n)]

    def __iter__(self) -> Iterator[TokenEvent]:
        start, server = time.monotonic(), self._server
        with begin(server.url, "/v1/completions", server.key, self._body, server.timeout) as response:
            try:
                for _ in range(_MOST_LINES):
                    if not (line := response.readline(_MOST_LINE)) or line.startswith(b"data: [DONE]"):
                        break
                    if line.startswith(b"data: "):
                        yield from self._read(json.loads(line[6:]), start)
            except _BROKEN as error:
                raise EngineError(f"what {server.url} streams cannot be read: {error!r:.200}") from error
        if not all(sample.reason for sample in self._samples):
            raise EngineError(f"{server.url} ended the stream before the answers had ended")

    def _read(self, chunk: dict[str, Any], start: float) -> Iterator[TokenEvent]:
        """The events of a chunk."""
        if "error" in chunk:
            raise EngineError(f"{self._server.url}: {chunk['error']['message']!s:.500}")
        self._cached = ((chunk.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        for choice in chunk["choices"]:
            index, text, reason = choice["index"], choice["text"], choice["finish_reason"]
            sample, scored = self._samples[index], choice["logprobs"] or {"tokens": []}
            sample.text, sample.reason = sample.text + text, reason
            sample.stop = stop if isinstance(stop := choice.get("stop_reason"), str) else None
            for place, name in enumerate(scored["tokens"]):  # a server of ours sends one at a time
                sample.tokens.append(token := _token_id(name))
                sample.ended = time.monotonic() - start
                sample.begun = sample.begun or sample.ended
                entry = None
                if self._params.logprobs is not None:
                    entry = self._logprob(token, scored["token_logprobs"][place], scored["top_logprobs"][place])
                    sample.logprobs.append(entry)
                prompt, number = divmod(index, self._params.n)
                yield TokenEvent(text, token, prompt, number, reason, entry, sample.stop)

    def _logprob(self, token: int, value: float, tops: dict[str, float]) -> TokenLogprob:
        likeliest = sorted(((top, _token_id(name)) for name, top in tops.items()), reverse=True)
        spelled = self._server.spelled
        top = tuple(TokenLogprob(i, spelled(i), x) for x, i in likeliest[: self._params.logprobs])
        return TokenLogprob(token, spelled(token), value, top)

    def result(self) -> Completion | list[Completion]:
        for _ in self:
            pass
        n = self._params.n
        groups = [self._samples[place * n : (place + 1) * n] for place in range(len(self._prompts))]
        completions = list(map(self._completion, self._prompts, groups))
        return completions[0] if self._one else completions

    def _completion(self, prompt: Sequence[int], samples: Sequence[_Growing]) -> Completion:
        count, cached = sum(len(sample.tokens) for sample in samples), self._cached if self._one else 0
        ended = tuple(
            Sample(i, s.text, tuple(s.tokens), s.reason or "abort", s.logprobs or None, s.stop)
            for i, s in enumerate(samples)
        )
        times = min(sample.begun for sample in samples), max(sample.ended for sample in samples)
        return Completion(
            ended, Usage(len(prompt), count, cached), Timing(0.0, *times, count), {"cached_tokens": cached}
        )


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))
