"""A server's model in the place of one in this process (`Connection`), and how a server is asked (`ask`).

What comes back is not trusted: bytes, lines and seconds are bounded, and what cannot be read is an EngineError.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from lamina.client.input_processor import Conversations, Prompts, is_one
from lamina.completions import Completion, FinishReason, Sample, Timing, TokenEvent, TokenLogprob, Usage
from lamina.errors import EngineError, InvalidRequest
from lamina.sampling_params import SamplingParams
from lamina.system.child_process import KEY_VARIABLE

_MOST, _MOST_LINE, _MOST_LINES = 1 << 26, 1 << 20, 1 << 24  # bytes, and lines of a stream
_STRUCTURES = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)


def begin(url: str, path: str, api_key: str | None, body: Any, seconds: float) -> Any:
    """The response of a server, which begins well; `body` is sent as JSON, None: GET. `api_key`: by default that of
    the environment. Raises InvalidRequest for an URL that is none and for what the server does not allow, EngineError
    where it refuses or is not there."""
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(f"url is {url[:80]!r}; allowed is such as http://127.0.0.1:8000")
    keys = (api_key or os.environ.get(KEY_VARIABLE, "")).split()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {keys[0]}"} if keys else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        return urllib.request.urlopen(urllib.request.Request(url.rstrip("/") + path, data, headers), timeout=seconds)
    except urllib.error.HTTPError as error:
        why = f"status {error.code}"
        with error, suppress(*_UNREADABLE):
            why = str(json.loads(error.read(_MOST))["error"]["message"])
        kind = InvalidRequest if error.code in (400, 404, 413, 422) else EngineError
        raise kind(f"the server refuses: {why[:500]}") from error
    except (OSError, ValueError) as error:
        raise EngineError(f"no server answers at {url}: {getattr(error, 'reason', error)}") from error


def ask(url: str, path: str, api_key: str | None = None, body: Any = None, seconds: float = 10.0) -> dict[str, Any]:
    """The object that a server answers. Raises as `begin` does."""
    with begin(url, path, api_key, body, seconds) as response:
        try:
            answer = json.loads(response.read(_MOST))
        except (OSError, ValueError) as error:
            raise EngineError(f"what answers at {url}{path} cannot be read: {error}") from error
    if not isinstance(answer, dict):
        raise EngineError(f"what answers at {url} is no Lamina server")
    return answer


class Connection:
    """A model of a Lamina server, with `generate`, `chat`, `stream` and `stream_chat` as `LLM` has them, but for
    `prompt_logprobs`. `model`: its name there; None: the first. `api_key`: by default that of $LAMINA_API_KEY.
    `timeout`: the most seconds until the next token. The prompts of a call are one request: when it was scheduled is
    not known and counts as 0, as do cached tokens where there are several. Without `max_tokens` all may be as long as
    the longest prompt leaves room for. Raises as `begin` does; what the server refuses, at the first token."""

    def __init__(
        self, url: str, model: str | None = None, *, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        self.url, self._key, self.timeout = url.rstrip("/").removesuffix("/v1"), api_key, timeout
        answer = ask(self.url, "/v1/models", api_key, seconds=timeout)
        try:
            served = {entry["id"]: int(entry["max_model_len"] or 0) for entry in answer["data"]}
        except _UNREADABLE as error:
            raise EngineError(f"what answers at {self.url} is no Lamina server") from error
        if model not in (None, *served) or not served:
            raise InvalidRequest(f"model is {model!r:.80}; allowed at {self.url} are {', '.join(served)}")
        self.model = model or next(iter(served))
        self.max_model_len = served[self.model]
        self.spelled = cache(lambda token: str(self.ask("/detokenize", {"tokens": [token]})["prompt"]))

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

    def begin(self, path: str, fields: Mapping[str, Any] | None = None) -> Any:
        return begin(self.url, path, self._key, fields and {"model": self.model, **fields}, self.timeout)

    def ask(self, path: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return ask(self.url, path, self._key, fields and {"model": self.model, **fields}, self.timeout)

    def _complete(self, prompts: Any, params: SamplingParams | None, request: dict[str, Any]) -> _Call:
        sources = [prompts] if (one := is_one(prompts)) else prompts
        tokens = [self._tokens({"prompt": text}) if isinstance(text, str) else list(text) for text in sources]
        return _Call(self, tokens, one, params, request)

    def _answer(self, messages: Any, params: SamplingParams | None, request: dict[str, Any]) -> _Call:
        variables = request.pop("chat_template_kwargs", None)
        one = not messages or not isinstance(messages[0], list | tuple)
        fields = [
            {"messages": conversation, "chat_template_kwargs": variables}
            for conversation in ([messages] if one else messages)
        ]
        return _Call(self, list(map(self._tokens, fields)), one, params, request)

    def _tokens(self, fields: dict[str, Any]) -> list[int]:
        tokens: list[int] = self.ask("/tokenize", fields)["tokens"]
        return tokens


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
        self,
        server: Connection,
        prompts: list[list[int]],
        one: bool,
        params: SamplingParams | None,
        request: dict[str, Any],
    ) -> None:
        priority = request.pop("priority", 0)
        if params is not None and request:
            raise InvalidRequest(f"both params and {', '.join(request)} were given; allowed is one of the two")
        self._params = params = params or SamplingParams.from_keywords(**request)
        if params.prompt_logprobs is not None:
            raise InvalidRequest(f"prompt_logprobs is {params.prompt_logprobs}; allowed over a connection is None")
        fields = {name: value for name, value in asdict(params).items() if value not in (None, (), {})}
        structure = {_STRUCTURES[name]: fields.pop(name) for name in _STRUCTURES if name in fields}
        room = max(1, server.max_model_len - max(map(len, prompts), default=0))
        self._body = {"max_tokens": room, **fields, "structured_outputs": structure or None, "priority": priority}
        self._body |= {"prompt": prompts, "logprobs": params.logprobs or 0, "return_tokens_as_token_ids": True}
        self._body |= {"stream": True, "stream_options": {"include_usage": True}}
        self._server, self._prompts, self._one, self._cached = server, prompts, one, 0
        self._samples = [_Growing() for _ in range(len(prompts) * params.n)]

    def __iter__(self) -> Iterator[TokenEvent]:
        if not self._prompts:
            return
        start = time.monotonic()
        with self._server.begin("/v1/completions", self._body) as response:
            try:
                for _ in range(_MOST_LINES):
                    if not (line := response.readline(_MOST_LINE)) or line.startswith(b"data: [DONE]"):
                        break
                    if line.startswith(b"data: "):
                        yield from self._read(json.loads(line[6:]), start)
            except _UNREADABLE as error:
                raise EngineError(f"what {self._server.url} streams cannot be read: {error!r:.200}") from error
        if not all(sample.reason for sample in self._samples):
            raise EngineError(f"{self._server.url} ended the stream before the answers had ended")

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
