"""POST /infill: what stands between two texts, in the form of llama-server, which plugins of editors speak."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lamina.completions import Completion
from lamina.server.frontend import Served
from lamina.server.http.errors import refused
from lamina.server.http.sse import while_connected
from lamina.server.openai import answers
from lamina.server.openai.completions import Texts, texts_of
from lamina.server.openai.schemas import CompletionRequest, InfillRequest
from lamina.server.service import GRACE, Service
from lamina.text.infill import infill_prompt

DEFAULT_TOKENS = 128
_TYPES = {"length": "limit", "stop": "eos"}


async def infill(service: Service, request: Request) -> Response:
    """Answer one request."""
    context = service.context(request)
    fields = await service.read(request, InfillRequest, context)
    service.check_priority(context, fields.priority)
    if fields.stream:
        raise refused("stream", fields.stream, "null or false: an infill is answered whole")
    served = service.served(context, 1, 1)
    work = service.prepare(context, _texts, fields, served, service.salt(context, fields.cache_salt))
    texts = await while_connected(request.receive, work, context.timeout + GRACE)

    def answer(ended: Sequence[Completion]) -> Response:
        (sample,), usage = ended[0].samples, answers.usage(texts.requests, ended[0].usage.completion_tokens)
        stopped = "word" if sample.stop_string is not None else _TYPES.get(sample.finish_reason, "none")
        return JSONResponse(
            {"content": sample.text, "stop": True, "stop_type": stopped, "stopping_word": sample.stop_string or ""}
            | {"model": context.model.name, "truncated": False, "tokens_predicted": usage["completion_tokens"]}
            | {"tokens_evaluated": usage["prompt_tokens"], "tokens_cached": texts.requests[0].cached_tokens}
        )

    answering = service.whole(texts.requests, context, answer, 0, answers.token_size(texts.params))
    return await while_connected(request.receive, answering, context.timeout + GRACE)


def _texts(fields: InfillRequest, served: Served, salt: tuple[str, str]) -> Texts:
    files = [(file.filename or "other", file.text) for file in fields.input_extra or ()]
    prompt = infill_prompt(served.tokenizer, fields.input_prefix or "", fields.input_suffix or "", files)
    limit = DEFAULT_TOKENS if fields.n_predict is None else fields.n_predict
    prompt += fields.prompt or ""
    completion = CompletionRequest(prompt=prompt, max_tokens=limit, priority=fields.priority, **fields.sampling)
    return texts_of(completion, served, salt)
