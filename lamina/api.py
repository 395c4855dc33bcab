"""`generate`, `stream` and `close`: an `LLM` that is kept between calls."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamina.client.input_processor import Prompts
from lamina.completions import Completion, TokenEvent
from lamina.config import DEFAULT_MODEL
from lamina.llm import LLM
from lamina.sampling_params import SamplingParams

_lock = threading.Lock()
_kept: tuple[str, LLM] | None = None


def generate(
    prompts: Prompts, params: SamplingParams | None = None, *, model: str | Path = DEFAULT_MODEL, **sampling: Any
) -> Completion | list[Completion]:
    """Complete prompts with a model: `LLM.generate` with default settings. The model stays loaded until `close()` or a
    call with another model."""
    return _llm(model).generate(prompts, params, **sampling)


def stream(
    prompts: Prompts, params: SamplingParams | None = None, *, model: str | Path = DEFAULT_MODEL, **sampling: Any
) -> Iterator[TokenEvent]:
    """Like `generate`, token by token. Stopping the iteration ends the request."""
    return _llm(model).stream(prompts, params, **sampling)


def close() -> None:
    """Free the model that `generate` and `stream` keep."""
    global _kept
    with _lock:
        if _kept is not None:
            _kept[1].close()
            _kept = None


def _llm(model: str | Path) -> LLM:
    global _kept
    with _lock:
        if _kept is None or _kept[0] != str(model) or not _kept[1].alive:
            if _kept is not None:
                _kept[1].close()
                _kept = None
            _kept = (str(model), LLM(model))
        return _kept[1]


atexit.register(close)
