"""`generate`, `chat`, `stream`, `embed` and `close`: an `LLM` that is kept between calls."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, overload

from lamina.client.input_processor import Conversation, Conversations, Prompts
from lamina.completions import Completion, Embedding, TokenEvent
from lamina.config import DEFAULT_MODEL
from lamina.llm import LLM
from lamina.sampling_params import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lamina.llm import ChatKeywords, RequestKeywords

Model: TypeAlias = str | Path
_lock = threading.Lock()
_kept: tuple[str, LLM] | None = None


@overload
def generate(
    prompts: str, params: SamplingParams | None = None, *, model: Model = ..., **request: Unpack[RequestKeywords]
) -> Completion: ...
@overload
def generate(
    prompts: list[str] | list[list[int]],
    params: SamplingParams | None = None,
    *,
    model: Model = ...,
    **request: Unpack[RequestKeywords],
) -> list[Completion]: ...
@overload
def generate(
    prompts: Prompts, params: SamplingParams | None = None, *, model: Model = ..., **request: Unpack[RequestKeywords]
) -> Completion | list[Completion]: ...
def generate(
    prompts: Prompts,
    params: SamplingParams | None = None,
    *,
    model: Model = DEFAULT_MODEL,
    **request: Unpack[RequestKeywords],
) -> Completion | list[Completion]:
    """Complete prompts with a model: `LLM.generate` with default settings. The model stays loaded until `close()` or a
    call with another model."""
    return _llm(model).generate(prompts, params, **request)


@overload
def chat(
    messages: Conversation, params: SamplingParams | None = None, *, model: Model = ..., **request: Unpack[ChatKeywords]
) -> Completion: ...
@overload
def chat(
    messages: Sequence[Conversation],
    params: SamplingParams | None = None,
    *,
    model: Model = ...,
    **request: Unpack[ChatKeywords],
) -> list[Completion]: ...
@overload
def chat(
    messages: Conversations,
    params: SamplingParams | None = None,
    *,
    model: Model = ...,
    **request: Unpack[ChatKeywords],
) -> Completion | list[Completion]: ...
def chat(
    messages: Conversations,
    params: SamplingParams | None = None,
    *,
    model: Model = DEFAULT_MODEL,
    **request: Unpack[ChatKeywords],
) -> Completion | list[Completion]:
    """Answer conversations, lists of {"role": ..., "content": ...}: `LLM.chat` of the model that `generate` keeps."""
    return _llm(model).chat(messages, params, **request)


def stream(
    prompts: Prompts,
    params: SamplingParams | None = None,
    *,
    model: Model = DEFAULT_MODEL,
    **request: Unpack[RequestKeywords],
) -> Iterator[TokenEvent]:
    """Like `generate`, token by token. Stopping the iteration ends the request."""
    return _llm(model).stream(prompts, params, **request)


def embed(
    inputs: Prompts,
    *,
    model: Model = DEFAULT_MODEL,
    pooling: str = "last",
    dimensions: int | None = None,
    normalize: bool = True,
) -> Embedding | list[Embedding]:
    """Embed inputs with a model: `LLM.embed` with default settings. The model stays loaded as `generate`'s does."""
    return _llm(model).embed(inputs, pooling=pooling, dimensions=dimensions, normalize=normalize)


def close() -> None:
    """Free the model that `generate`, `chat`, `stream` and `embed` keep."""
    global _kept
    with _lock:
        if _kept is not None:
            _kept[1].close()
            _kept = None


def _llm(model: Model) -> LLM:
    global _kept
    with _lock:
        if _kept is not None:
            _kept[1].check_process()
        if _kept is None or _kept[0] != str(model) or not _kept[1].alive:
            if _kept is not None:
                _kept[1].close()
                _kept = None
            _kept = (str(model), LLM(model))
        return _kept[1]


atexit.register(close)
