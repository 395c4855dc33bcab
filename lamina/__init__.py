"""Lamina: LLM decode on machines of different kinds, divided at attention.

Importing it loads neither torch nor ray: names that need them are loaded at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lamina.completions import Completion, Embedding, Interrupted, Sample, Timing, TokenEvent, TokenLogprob, Usage
from lamina.errors import EngineError, InvalidRequest, LaminaError, ModelFileError, UnsupportedModelError
from lamina.sampling_params import SamplingParams
from lamina.version import __version__ as __version__

if TYPE_CHECKING:
    from lamina.api import chat, close, configure, connect, embed, generate, stream
    from lamina.config import EngineConfig
    from lamina.llm import LLM

__all__ = [
    "LLM",
    "Completion",
    "Embedding",
    "EngineConfig",
    "EngineError",
    "Interrupted",
    "InvalidRequest",
    "LaminaError",
    "ModelFileError",
    "Sample",
    "SamplingParams",
    "Timing",
    "TokenEvent",
    "TokenLogprob",
    "UnsupportedModelError",
    "Usage",
    "chat",
    "close",
    "configure",
    "connect",
    "embed",
    "generate",
    "stream",
]

_LAZY = {
    "LLM": "lamina.llm",
    "EngineConfig": "lamina.config",
    **dict.fromkeys(("chat", "close", "configure", "connect", "embed", "generate", "stream"), "lamina.api"),
}


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lamina' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
