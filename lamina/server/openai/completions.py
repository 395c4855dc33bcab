"""POST /v1/completions: from prompts to a generation, and from its events to a response.

What chats and completions share is in `sampling_fields` and `answers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lamina.client.input_processor import is_one
from lamina.completions import Completion, Sample, TokenEvent
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.server.frontend import Served
from lamina.server.http.errors import ApiError, refused
from lamina.server.http.sse import EventStream, while_connected
from lamina.server.openai import answers
from lamina.server.openai.answers import Chunks, TextLogprobs, dumps
from lamina.server.openai.sampling_fields import (
    blaming,
    check_characters,
    check_echo,
    check_prompt_logprobs,
    check_stream_options,
    encoded,
    sampling,
    structured,
    truncated,
)
from lamina.server.openai.schemas import CompletionRequest
from lamina.server.openai.service import GRACE, RequestContext, Service

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class Texts:
    """Completions that can be submitted: one request, and the prefix of its texts, per prompt."""

    fields: CompletionRequest
    requests: Sequence[EngineRequest]
    eos_ids: tuple[int, ...]
    prefixes: Sequence[str]

    @property
    def params(self) -> SamplingParams:
        return self.requests[0].params

    def logprobs(self, prompt: int) -> TextLogprobs:
        """Writes the log probabilities of one sample of a prompt."""
        return TextLogprobs(bool(self.fields.return_tokens_as_token_ids), len(self.prefixes[prompt]))


async def completions(service: Service, request: Request) -> Response:
    """Answer one request."""
    context = service.context(request)
    fields = await service.read(request, CompletionRequest, context)
    one = is_one(fields.prompt) or not isinstance(fields.prompt, list)
    service.check_priority(context, fields.priority)
    served = service.served(context, 1 if one else len(fields.prompt), fields.n or 1)
    work = _prepared(service, fields, served, context)
    prepared = await while_connected(request.receive, work, context.timeout + GRACE)
    named = answers.named("cmpl", fields.request_id or context.id, service.settings.model) | {
        "object": "text_completion"
    }
    if fields.stream:
        frames = service.frames(prepared.requests, context, _Writer(prepared, named))
        return EventStream(frames, context.timeout + GRACE, service.translate)
    return await while_connected(request.receive, _whole(service, prepared, context, named), context.timeout + GRACE)


async def _prepared(service: Service, fields: CompletionRequest, served: Served, context: RequestContext) -> Texts:
    """The requests with all checks done, before anything is submitted."""
    texts = await service.prepare(context, _texts, fields, served, service.salt(context, fields.cache_salt))
    with blaming("structured_outputs"):
        await service.compile(context, served, texts.params)
    return texts


def _texts(fields: CompletionRequest, served: Served, salt: tuple[str, str]) -> Texts:
    _check(fields)
    tokenizer, inputs = served.tokenizer, served.inputs
    given = [fields.prompt] if is_one(fields.prompt) or not isinstance(fields.prompt, list) else fields.prompt
    names = ["prompt"] if given is not fields.prompt else [f"prompt[{index}]" for index in range(len(given))]
    check_characters(dict(zip(names, given, strict=True)), inputs)
    prompts = [
        truncated(fields, _tokens(name, prompt, fields, served), inputs, fields.max_tokens)
        for name, prompt in zip(names, given, strict=True)
    ]
    with blaming("structured_outputs"):
        params = sampling(
            fields,
            inputs,
            max_tokens=fields.max_tokens or DEFAULT_MAX_TOKENS,
            logprobs=fields.logprobs,
            structure=structured(fields.structured_outputs),
        )
        requests = inputs.requests(prompts, params, fields.priority or 0, salt)
    prefixes = [""] * len(prompts)
    if fields.echo:
        whole = fields.truncate_prompt_tokens is None
        prefixes = [
            prompt if isinstance(prompt, str) and whole else tokenizer.decode(ids)
            for prompt, ids in zip(given, prompts, strict=True)
        ]
        check_echo(prefixes, params.n)
    fields.prompt = None  # not kept as long as the answer takes: it may have megabytes
    return Texts(fields, requests, tokenizer.eos_ids, prefixes)


def _check(fields: CompletionRequest) -> None:
    check_prompt_logprobs(fields)
    check_stream_options(fields)
    if fields.suffix:
        raise refused("suffix", fields.suffix, "null or empty: nothing is inserted before a text")
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise refused("best_of", fields.best_of, f"n, which is {fields.n or 1}: every sample is given")
    if fields.echo and fields.logprobs is not None:
        raise ApiError(
            400, "echo is true beside logprobs; allowed is one of them: no log probabilities of prompts are computed",
            "echo",
        )  # fmt: skip


def _tokens(name: str, prompt: Any, fields: CompletionRequest, served: Served) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise refused(name, prompt, "text of at least one character")
        special = True if fields.add_special_tokens is None else fields.add_special_tokens
        return encoded(prompt, special, served.inputs, name, whole=fields.truncate_prompt_tokens is None)
    if not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
        raise refused(name, prompt, "text or token ids, at least one, or a list of these")
    return prompt


async def _whole(service: Service, texts: Texts, context: RequestContext, named: Mapping[str, Any]) -> Response:
    ended = await service.whole(texts.requests, context)
    choices = [
        _choice(texts, prompt, sample) for prompt, completion in enumerate(ended) for sample in completion.samples
    ]
    used = answers.usage(texts.requests, sum(completion.usage.completion_tokens for completion in ended))
    return Response(dumps({**named, "choices": choices, "usage": used}).encode(), media_type="application/json")


def _choice(texts: Texts, prompt: int, sample: Sample) -> dict[str, Any]:
    logprobs = None if sample.logprobs is None else texts.logprobs(prompt).add(sample.logprobs)
    last = sample.token_ids[-1] if sample.token_ids else None
    return {
        "index": prompt * texts.params.n + sample.index,
        "text": texts.prefixes[prompt] + sample.text,
        "logprobs": logprobs,
        "finish_reason": sample.finish_reason,
        "stop_reason": answers.stop_reason(texts.params, texts.eos_ids, last, sample.finish_reason),
    }


class _Writer:
    """Writes completions' chunks. What is done for each token is done here, so it is little."""

    def __init__(self, texts: Texts, named: Mapping[str, Any]) -> None:
        fields = texts.fields
        self._texts = texts
        self._chunks = Chunks(named, texts.requests, fields.include_usage, fields.continuous_usage)
        self._n = texts.params.n
        count = self._n * len(texts.requests)
        self._logprobs = [texts.logprobs(index // self._n) for index in range(count)]
        self._prefixes = [texts.prefixes[index // self._n] for index in range(count)]  # empty once sent
        self._ended = [False] * count
        self._sent = [0] * count  # characters of a sample's text

    def events(self, events: Sequence[TokenEvent]) -> bytes:
        frames: list[str] = []
        for event in events:
            index = event.prompt_index * self._n + event.sample_index
            self._chunks.tokens += 1
            self._sent[index] += len(event.text)
            if event.finish_reason is None and event.logprob is None:
                if event.text:
                    text = self._prefixes[index] + event.text
                    self._prefixes[index] = ""
                    frames.append(
                        self._chunks.chunk(
                            f'{{"index":{index},"text":{quoted(text)},"logprobs":null,"finish_reason":null}}'
                        )
                    )
                continue
            self._add(index, event.text, event, event.finish_reason, frames)
        return "".join(frames).encode()

    def end(self, completions: Sequence[Completion]) -> bytes:
        frames: list[str] = []
        for index, ended in enumerate(self._ended):
            if not ended:
                sample = completions[index // self._n].samples[index % self._n]
                self._add(index, sample.text[self._sent[index] :], None, sample.finish_reason, frames)
        frames.append(self._chunks.last())
        return "".join(frames).encode()

    def _add(self, index: int, text: str, event: TokenEvent | None, reason: Any, frames: list[str]) -> None:
        logprobs = None
        if event is not None and event.logprob is not None:
            logprobs = self._logprobs[index].add([event.logprob])
        choice: dict[str, Any] = {
            "index": index,
            "text": self._prefixes[index] + text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        self._prefixes[index] = ""
        if reason is not None:
            self._ended[index] = True
            token = None if event is None else event.token_id
            choice["stop_reason"] = answers.stop_reason(self._texts.params, self._texts.eos_ids, token, reason)
        frames.append(self._chunks.chunk(dumps(choice)))
