"""`generate`, `chat`, `stream`, `embed` and `close`: an `LLM` that is kept between calls, which `configure` chooses the
settings of; `connect`: a server in its place."""

from __future__ import annotations

import atexit
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast, overload

from lamina.client.connection import Connection
from lamina.client.input_processor import Conversation, Conversations, Prompts
from lamina.completions import Completion, Embedding, TokenEvent
from lamina.config import DEFAULT_MODEL, EngineConfig, EngineKeywords
from lamina.llm import LLM
from lamina.sampling_params import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lamina.llm import ChatKeywords, RequestKeywords

Model: TypeAlias = str | Path
_lock = threading.Lock()
_kept: tuple[str, LLM] | None = None
_settings: EngineKeywords = {}
_LISTS = {"autoscale": ":", "attention_workers": ",", "device": ",", "attention_device": ","}  # what separates them
_PLAIN = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d{1,18})?|true|false", re.ASCII)


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


def configure(**settings: Unpack[EngineKeywords]) -> None:
    """How the functions of this module load models from now on: fields of `EngineConfig`, such as `attention_workers=4`
    or `cluster="auto"`. What is not named is as the environment says, LAMINA_ATTENTION_WORKERS and so on, else by
    default. A model that is kept is closed where that changes something. Raises InvalidRequest."""
    global _settings
    EngineConfig(**_from_environment() | settings)
    before, _settings = _settings, settings
    if settings != before:
        close()


def connect(url: str, model: str | None = None, *, api_key: str | None = None, timeout: float = 600.0) -> Connection:
    """A model of a Lamina server, to be used as an `LLM`: see `Connection`."""
    return Connection(url, model, api_key=api_key, timeout=timeout)


def _from_environment() -> EngineKeywords:
    """Fields of `EngineConfig` that the environment names: numbers and true or false as JSON has them, several values
    with commas, MIN:MAX for `autoscale`."""
    settings: dict[str, Any] = {}
    for name in EngineConfig.__dataclass_fields__:
        if (text := os.environ.get(f"LAMINA_{name.upper()}")) is not None:
            parts = text.split(_LISTS[name]) if name in _LISTS else [text]
            values = [json.loads(part) if _PLAIN.fullmatch(part) else part for part in map(str.strip, parts)]
            is_list = len(values) > 1 or (name == "attention_workers" and isinstance(values[0], str))
            settings[name] = values if is_list else values[0]
    return cast("EngineKeywords", settings)


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
            _kept = (str(model), LLM(model, **_from_environment() | _settings))
        return _kept[1]


atexit.register(close)
