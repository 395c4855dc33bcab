"""A call whose answers are embeddings."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from lamina.client.call import Call, Serving
from lamina.client.input_processor import InputProcessor, Prompts
from lamina.client.pooling import check_dimensions, embedding
from lamina.completions import Embedding


class EmbeddingCall:
    """The inputs of one call, checked. It is used once: `result()` blocks, `await` is the same for event loops. Both
    give one embedding if the call is for one input, else a list."""

    def __init__(
        self,
        serving: Serving,
        processor: InputProcessor,
        inputs: Prompts,
        pooling: str,
        dimensions: int | None,
        normalize: bool,
        priority: int,
        owner: object = None,
    ) -> None:
        self._size, self._normalize = check_dimensions(dimensions), normalize
        prepared = processor.prompts(inputs)
        self._one = prepared.one
        self._requests = processor.embeddings(prepared.prompts, pooling, priority)
        self._call = Call(serving, self._requests, prepared.one, owner)

    def result(self) -> Embedding | list[Embedding]:
        """Wait for the embeddings."""
        self._call.result()
        return self._result()

    def __await__(self) -> Generator[Any, None, Embedding | list[Embedding]]:
        yield from self._call.__await__()
        return self._result()

    def _result(self) -> Embedding | list[Embedding]:
        found = [
            Embedding(embedding(request, pooled, self._size, self._normalize), len(request.request.prompt))
            for request, pooled in zip(self._requests, self._call.pooled(), strict=True)
        ]
        return found[0] if self._one else found
