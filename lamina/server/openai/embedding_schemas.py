"""The fields of requests for embeddings, as OpenAI, vLLM and Jina name them, and of their answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from lamina.client.input_processor import Pooling
from lamina.server.http.fields import Ignored, Strict, described
from lamina.server.openai.schemas import Prompts

MAX_INPUTS = 2048  # OpenAI's
MAX_DIMENSIONS = 1 << 16


class PoolingRequest(Strict):
    """What requests for embeddings have in common."""

    model: str | None = Field(None, description="The name of the served model; none means that one.")
    pooling: Pooling | None = Field(
        None,
        description="Of which hidden states: of the last token (default), the mean of all, or of the end-of-text token,"
        " which is appended where it is missing.",
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="Keep only so many tokens of each input's end; -1 what fits."
    )
    add_special_tokens: bool | None = Field(None, description="Add the tokenizer's special tokens to texts (default).")
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1, description="A lower one is served first.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=512, description="Share prefixes only with requests of the same salt."
    )
    request_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._:\-]{1,128}$", description="The end of the answer's id. Default: X-Request-Id."
    )
    user: Ignored = Field(None, description="Ignored: tenants differ by their API keys.")


class EmbeddingRequest(PoolingRequest):
    """POST /v1/embeddings."""

    input: Prompts = Field(description="Text, texts, token ids, or lists of token ids. Instructions are part of it.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Numbers (default), or base64 of float32, little-endian."
    )
    dimensions: int | None = Field(None, ge=1, le=MAX_DIMENSIONS, description="Keep only the first ones.")
    normalize: bool | None = Field(None, description="Make the length 1 (default).")


class RerankRequest(PoolingRequest):
    """POST /v1/rerank."""

    query: str = Field(min_length=1, description="What the documents are compared with.")
    documents: Annotated[
        Any,
        described(
            {
                "type": "array",
                "items": {
                    "anyOf": [
                        {"type": "string", "minLength": 1},
                        {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
                    ]
                },
                "minItems": 1,
                "maxItems": MAX_INPUTS - 1,
            }
        ),
    ] = Field(description="Texts, or objects with `text`.")
    top_n: int | None = Field(None, ge=1, le=2**31 - 1, description="Give only the best. Default: all.")
    return_documents: bool | None = Field(None, description="Repeat the documents' texts in the answer (default).")


class EmbeddingUsage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(BaseModel):
    """The embedding of one input: numbers, or base64 of float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """The response of /v1/embeddings."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[EmbeddingItem]
    usage: EmbeddingUsage


class RerankDocument(BaseModel):
    """A document of the request."""

    text: str


class RerankResult(BaseModel):
    """A document's cosine with the query, from -1 to 1."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankList(BaseModel):
    """The response of /v1/rerank: the best first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage
