"""POST /v1/completions: from prompts to a generation, and from its events to a response."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lamina.completions import Completion, Sample, TokenEvent, TokenLogprob
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.server.chat.preparing import check_echo
from lamina.server.chat.sampling import blaming, sampling
from lamina.server.frontend import Served
from lamina.server.http.errors import ApiError, json_pieces, refused
from lamina.server.http.sse import EventStream, while_connected
from lamina.server.openai import answers
from lamina.server.openai.answers import Chunks, TextLogprobs, dumps
from lamina.server.openai.embeddings import listed, token_ids
from lamina.server.openai.schemas import CompletionRequest, check_stream, structured
from lamina.server.preparation import go_on
from lamina.server.service import GRACE, RequestContext, Service
from lamina.text.infill import infill_prompt
from lamina.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class Texts:
    """Completions that can be submitted: one request, and the prefix of its texts, per prompt."""

    fields: CompletionRequest
    requests: Sequence[EngineRequest]
    tokenizer: Tokenizer
    prefixes: Sequence[str]

    @property
    def params(self) -> SamplingParams:
        return self.requests[0].params

    @property
    def repeated(self) -> int:
        """About how many bytes the answer has of log probabilities of prompts: each choice repeats them."""
        fields, tokens = self.fields, sum(len(request.request.prompt) for request in self.requests)
        tops = (fields.logprobs if fields.echo else None, fields.prompt_logprobs)
        entries = sum(1 + top for top in tops if top is not None)
        return answers.LOGPROB * entries * tokens * self.params.n

    def logprobs(self, prompt: int) -> TextLogprobs:
        """Writes the log probabilities of one sample of a prompt."""
        return TextLogprobs(bool(self.fields.return_tokens_as_token_ids), len(self.prefixes[prompt]))


async def completions(service: Service, request: Request) -> Response:
    """Answer one request."""
    context = service.context(request)
    fields = await service.read(request, CompletionRequest, context)
    service.check_priority(context, fields.priority)
    served = service.served(context, len(listed(fields.prompt)), fields.n or 1)
    work = _prepared(service, fields, served, context)
    prepared = await while_connected(request.receive, work, context.timeout + GRACE)
    named = answers.named("cmpl", fields.request_id or context.id, context.model.name)
    named |= {"object": "text_completion", "system_fingerprint": served.fingerprint}
    if fields.stream:
        frames = service.frames(prepared.requests, context, _Writer(prepared, named))
        return EventStream(frames, context.timeout + GRACE, service.translate)
    return await while_connected(request.receive, _whole(service, prepared, context, named), context.timeout + GRACE)


async def _prepared(service: Service, fields: CompletionRequest, served: Served, context: RequestContext) -> Texts:
    """The requests with all checks done, before anything is submitted."""
    texts = await service.prepare(context, texts_of, fields, served, service.salt(context, fields.cache_salt))
    with blaming("structured_outputs"):
        await service.compile(context, served, texts.params)
    return texts


def texts_of(fields: CompletionRequest, served: Served, salt: tuple[str, str]) -> Texts:
    _check(fields)
    tokenizer, inputs = served.tokenizer, served.inputs
    listed_prompts = listed(fields.prompt)
    filled = fields.prompt
    if fields.suffix:
        if not all(isinstance(prompt, str) for prompt in listed_prompts):
            raise refused("suffix", fields.suffix, "null or empty, where prompt is no text")
        filled = [infill_prompt(tokenizer, prompt, fields.suffix) for prompt in listed_prompts]
    prompts = token_ids(
        "prompt", filled, fields.add_special_tokens, fields.truncate_prompt_tokens, inputs, fields.max_tokens
    )
    with blaming("structured_outputs"):
        params = sampling(
            fields.sampling | _scored(fields),
            inputs,
            max_tokens=DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens,
            logprobs=fields.logprobs,
            structure=structured(fields.structured_outputs),
        )
        requests = inputs.requests(prompts, params, fields.priority or 0, salt)
    prefixes = [""] * len(prompts)
    if fields.echo:
        is_whole = fields.truncate_prompt_tokens is None
        prefixes = [
            prompt if isinstance(prompt, str) and is_whole else tokenizer.decode(ids)
            for prompt, ids in zip(listed_prompts, prompts, strict=True)
        ]
        check_echo(prefixes, params.n, inputs)
    fields.prompt = None  # not kept as long as the answer takes: it may have megabytes
    return Texts(fields, requests, tokenizer, prefixes)


def _check(fields: CompletionRequest) -> None:
    check_stream(fields)
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise refused("best_of", fields.best_of, f"n, which is {fields.n or 1}: every sample is given")
    if fields.echo and fields.logprobs is not None and fields.stream:
        raise ApiError(400, "echo is true beside logprobs, which is allowed only where stream is false", "echo")


def _scored(fields: CompletionRequest) -> dict[str, int]:
    """What is to be reported of prompts because they are echoed."""
    if not fields.echo or fields.logprobs is None:
        return {}
    return {"prompt_logprobs": max(fields.logprobs, fields.prompt_logprobs or 0)}


async def _whole(service: Service, texts: Texts, context: RequestContext, named: Mapping[str, Any]) -> Response:
    def work(ended: Sequence[Completion]) -> Response:
        return json_pieces(_written(texts, ended, named))

    return await service.whole(texts.requests, context, work, texts.repeated, answers.token_size(texts.params))


def _written(texts: Texts, ended: Sequence[Completion], named: Mapping[str, Any]) -> Iterator[str]:
    """The response as JSON, in pieces."""
    yield f'{dumps(named)[:-1]},"choices":'
    separators = answers.separators()
    for prompt, completion in enumerate(ended):
        reported: list[str] | None = None  # which each choice repeats
        if completion.prompt_logprobs is not None and texts.fields.prompt_logprobs is not None:
            reported = [*answers.prompt_logprobs(completion.prompt_logprobs)]
        for sample in completion.samples:
            go_on()
            yield next(separators)
            yield from _choice(texts, prompt, completion, sample, reported)
    used = answers.usage(texts.requests, sum(completion.usage.completion_tokens for completion in ended))
    yield f'],"usage":{dumps(used)}}}'


def _choice(
    texts: Texts, prompt: int, completion: Completion, sample: Sample, reported: Sequence[str] | None
) -> Iterator[str]:
    """A choice as JSON, in pieces."""
    scored, fields = completion.prompt_logprobs, texts.fields
    logprobs: Iterable[str] = ["null"]
    if sample.logprobs is not None and fields.echo and scored is not None:
        token = texts.requests[prompt].request.prompt[0]
        first = TokenLogprob(token, texts.tokenizer.decode([token], skip_special_tokens=False), 0.0)
        written = TextLogprobs(bool(fields.return_tokens_as_token_ids))
        logprobs = written.echoed(first, scored, sample.logprobs, fields.logprobs or 0)
    elif sample.logprobs is not None:
        logprobs = texts.logprobs(prompt).written(sample.logprobs)
    choice = {
        "index": prompt * texts.params.n + sample.index,
        "text": texts.prefixes[prompt] + sample.text,
        "finish_reason": sample.finish_reason,
        "stop_reason": answers.stop_reason(texts.params, sample),
    }
    if reported is not None:
        logprobs = chain(logprobs, [',"prompt_logprobs":'], reported)
    yield from answers.with_json(choice, "logprobs", logprobs)


class _Writer:
    """Writes completions' chunks. What is done for each token is done here, so it is little."""

    def __init__(self, texts: Texts, named: Mapping[str, Any]) -> None:
        fields = texts.fields
        self._texts = texts
        self._tokens = 0
        self._chunks = Chunks(named, self._usage, fields.include_usage, fields.continuous_usage)
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
            self._tokens += 1
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

    def _usage(self) -> dict[str, Any]:
        return answers.usage(self._texts.requests, self._tokens)

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
            choice["stop_reason"] = answers.stop_reason(self._texts.params, event)
        frames.append(self._chunks.chunk(dumps(choice)))
