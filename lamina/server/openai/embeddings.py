"""POST /v1/embeddings and /v1/rerank: embeddings of texts, and documents in the order of their likeness to a query.

Inputs are texts or token ids, one or a list, as completions take them too (`listed`, `token_ids`). The model computes
them, and embeddings are made of their hidden states.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from sys import byteorder
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from lamina.client.input_processor import InputProcessor, embedding, is_one
from lamina.errors import ContextTooLong, InvalidRequest
from lamina.messages.engine_request import EngineRequest
from lamina.server.chat.preparing import check_characters, encoded, truncated
from lamina.server.frontend import Served
from lamina.server.http.errors import ApiError, json_pieces, json_response, refused
from lamina.server.http.sse import while_connected
from lamina.server.openai import answers
from lamina.server.openai.schemas import MAX_INPUTS, EmbeddingRequest, PoolingRequest, RerankRequest
from lamina.server.preparation import go_on
from lamina.server.service import GRACE, RequestContext, Service

MAX_NUMBERS = 1 << 22  # of all embeddings of a request together
_NUMBER = 8  # bytes of one while an answer is made, about: float32, then text
_TOGETHER = 64  # inputs that are submitted at a time: enough to fill batches

Vector: TypeAlias = "array[float]"
"""An embedding, float32."""


async def embeddings(service: Service, request: Request) -> Response:
    """Embed texts or token ids."""
    context = service.context(request)
    fields = await service.read(request, EmbeddingRequest, context)
    work = _embedded(service, fields, context)
    return await while_connected(request.receive, work, context.timeout + GRACE)


async def rerank(service: Service, request: Request) -> Response:
    """Order documents by the cosine of their embeddings with the query's."""
    context = service.context(request)
    fields = await service.read(request, RerankRequest, context)
    work = _reranked(service, fields, context)
    return await while_connected(request.receive, work, context.timeout + GRACE)


async def _embedded(service: Service, fields: EmbeddingRequest, context: RequestContext) -> Response:
    inputs, fields.input = fields.input, None
    requests = await _requests(service, fields, {"input": inputs}, context)
    named = _named("embd", fields, context) | {"object": "list", "usage": _usage(requests)}
    with service.growing(context.tenant) as grow:
        vectors = await _vectors(service, requests, context, fields.dimensions, fields.normalize is not False, grow)
        return await service.answer(context, _written, named, vectors, fields.encoding_format == "base64")


async def _reranked(service: Service, fields: RerankRequest, context: RequestContext) -> Response:
    texts = [_text(index, document) for index, document in enumerate(_documents(fields.documents))]
    requests = await _requests(service, fields, {"query": fields.query, "documents": texts}, context)
    named = _named("rerank", fields, context) | {"usage": _usage(requests)}
    repeated = None if fields.return_documents is False else texts
    with service.growing(context.tenant) as grow:
        query, *documents = await _vectors(service, requests, context, None, True, grow)
        return await service.answer(context, _ranked, named, query, documents, fields.top_n, repeated)


async def _requests(
    service: Service, fields: PoolingRequest, given: Mapping[str, Any], context: RequestContext
) -> list[EngineRequest]:
    """The requests for the inputs in each of the fields `given`, in order."""
    service.check_priority(context, fields.priority)
    for name, inputs in given.items():
        if len(listed(inputs)) > MAX_INPUTS:
            raise refused(name, inputs, f"at most {MAX_INPUTS} of them")
    served = service.served(context, 1, 1)
    return await service.prepare(context, _checked, fields, given, served, service.salt(context, fields.cache_salt))


def _checked(
    fields: PoolingRequest, given: Mapping[str, Any], served: Served, salt: tuple[str, str]
) -> list[EngineRequest]:
    keep, inputs = fields.truncate_prompt_tokens, served.inputs
    requests: list[EngineRequest] = []
    for field, several in given.items():
        prompts = token_ids(field, several, fields.add_special_tokens, keep, inputs, None)
        try:
            requests += inputs.embeddings(prompts, fields.pooling or "last", fields.priority or 0, salt)
        except InvalidRequest as error:  # of the prompts, which this request calls otherwise
            code = "context_length_exceeded" if isinstance(error, ContextTooLong) else None
            name = "pooling" if str(error).startswith("pooling") else field
            raise ApiError(400, str(error).replace("the prompt", field), name, code) from None
    return requests


async def _vectors(
    service: Service,
    requests: list[EngineRequest],
    context: RequestContext,
    dimensions: int | None,
    normalize: bool,
    grow: Callable[[int], None],
) -> list[Vector]:
    """The embeddings, computed a few at a time: neither all requests nor all sums of float64 stand at once. Their
    bytes are counted by `grow`. Empties the list: a request keeps its sums for as long as it is kept."""
    vectors: list[Vector] = []
    total, together = len(requests), min(_TOGETHER, service.samples.most)
    while part := requests[:together]:
        del requests[:together]
        pooled = await service.pooled(part, context)
        vectors += await service.answer(context, _made, part, pooled, dimensions, normalize)
        grow(_NUMBER * len(part) * len(vectors[0]))
        if (numbers := total * len(vectors[0])) > MAX_NUMBERS:
            raise ApiError(
                400,
                f"input has {total} inputs, whose embeddings have {numbers} numbers; allowed are {MAX_NUMBERS}",
                "input",
            )
    return vectors


def _made(
    requests: Sequence[EngineRequest], pooled: Sequence[Sequence[float]], dimensions: int | None, normalize: bool
) -> list[Vector]:
    return [
        array("f", embedding(request, of_input, dimensions, normalize))
        for request, of_input in zip(requests, pooled, strict=True)
    ]


def _written(named: Mapping[str, Any], vectors: list[Vector], as_bytes: bool) -> Response:
    """Empties the list: a vector is not kept beside its text."""
    vectors.reverse()

    def written() -> Iterator[str]:
        for separator, index in zip(answers.separators(), range(len(vectors)), strict=False):
            go_on()
            vector = vectors.pop()
            numbers = _base64(vector) if as_bytes else _numbers(vector)
            yield f'{separator}{{"object":"embedding","index":{index},"embedding":{numbers}}}'
        yield "]"

    return json_pieces(answers.with_json(named, "data", written()))


def _ranked(
    named: Mapping[str, Any], query: Vector, documents: Sequence[Vector], most: int | None, texts: Sequence[str] | None
) -> Response:
    scores = _cosines(query, documents)
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:most]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if texts is not None:
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    return json_response({**named, "results": results})


def _numbers(vector: Vector) -> str:
    return f"[{','.join(f'{value:.9g}' for value in vector)}]"  # nine digits tell float32 apart


def _base64(vector: Vector) -> str:
    if byteorder == "big":
        vector.byteswap()
    return f'"{base64.b64encode(vector.tobytes()).decode()}"'


def _cosines(query: Vector, documents: Sequence[Vector]) -> list[float]:
    return [sum(map(float.__mul__, query, document)) for document in documents]


def _documents(given: Any) -> list[Any]:
    if not isinstance(given, list) or not given:
        raise refused("documents", given, "a list of texts or of objects with text, at least one")
    if len(given) >= MAX_INPUTS:
        raise refused("documents", given, f"at most {MAX_INPUTS - 1} documents")
    return given


def _text(index: int, document: Any) -> str:
    text = document.get("text") if isinstance(document, dict) else document
    if not isinstance(text, str) or not text:
        raise refused(f"documents[{index}]", document, "text, or an object with text, of at least one character")
    return text


def _named(kind: str, fields: PoolingRequest, context: RequestContext) -> dict[str, Any]:
    return answers.named(kind, fields.request_id or context.id, context.model.name)


def _usage(requests: Sequence[EngineRequest]) -> dict[str, int]:
    tokens = sum(len(request.request.prompt) for request in requests)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def listed(given: Any) -> list[Any]:
    return [given] if is_one(given) or not isinstance(given, list) else given


def token_ids(
    param: str, given: Any, special: bool | None, keep: int | None, inputs: InputProcessor, max_tokens: int | None
) -> list[list[int]]:
    """The token ids of each input of the field `param`. `special`: whether special tokens are added, which None means
    too; `keep` as in `truncated`. For a `PreparationPool`. Raises InvalidRequest, ApiError."""
    several = listed(given)
    names = [param] if several is not given else [f"{param}[{index}]" for index in range(len(several))]
    check_characters(dict(zip(names, several, strict=True)), inputs)
    return [
        truncated(keep, _tokens(name, prompt, special is not False, keep is None, inputs), inputs, max_tokens)
        for name, prompt in zip(names, several, strict=True)
    ]


def _tokens(name: str, given: Any, special: bool, whole: bool, inputs: InputProcessor) -> list[int]:
    if isinstance(given, str):
        if not given:
            raise refused(name, given, "text of at least one character")
        return encoded(given, special, inputs, name, whole)
    if not isinstance(given, list) or not given or not all(type(token) is int for token in given):
        raise refused(name, given, "text or token ids, at least one, or a list of these")
    return given
