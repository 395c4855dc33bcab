"""How an engine is set up: frozen, checked once, every error naming the value and what is allowed.

Knows the choices; knows nothing of the machine (`runtime` fills in what is left to it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lamina.errors import InvalidRequest

DEFAULT_MODEL = "smollm2-135m"
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
PAGE_SIZES = (16, 32, 64, 128, 256)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What `LLM(...)` takes. None and "auto" leave a choice to the machine or the model."""

    dtype: str = "auto"
    """Of weights and computing: bfloat16 where the device has it, else float32."""
    device: str = "auto"
    """Of the dense layers: cuda where there is one, else cpu."""
    max_model_len: int | None = None
    """The longest sequence in tokens; None: the model's context, or what `kv_memory` holds if that is less."""
    kv_memory: int | str | None = None
    """Bytes of KV for each holder, or text such as "2GiB"; None: a quarter of the memory that is available."""
    kv_dtype: str = "auto"
    """What K and V are stored in; auto: as `dtype`."""
    page_size: int = 32
    """Tokens a KV page."""
    max_batch_tokens: int | None = None
    """Tokens a batch, prefill chunks and decode steps together; None: 1024."""
    threads: int | None = None
    """CPU threads of one step; None: one a core."""
    prefix_cache: bool = True
    """Keep the KV of prompts and answers, so that shared prefixes are computed once."""
    rope_scaling: Mapping[str, Any] | None = None
    """Overrides the RoPE scaling of the model's config, for contexts longer than it allows."""

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, DTYPES)
        _choice("device", self.device, DEVICES)
        _choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        _choice("page_size", self.page_size, PAGE_SIZES)
        for name, high in (("max_model_len", 2**24), ("max_batch_tokens", 2**20), ("threads", 1024)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= high):
                raise InvalidRequest(f"{name} is {value!r:.80}; allowed is an integer from 1 to {high}, or None")
        if type(self.prefix_cache) is not bool:
            raise InvalidRequest(f"prefix_cache is {self.prefix_cache!r:.80}; allowed is True or False")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, Mapping):
            raise InvalidRequest(f"rope_scaling is {self.rope_scaling!r:.80}; allowed is a mapping as in config.json")
        if self.kv_memory is not None:
            object.__setattr__(self, "kv_memory", parse_size("kv_memory", self.kv_memory))


def parse_size(name: str, value: object) -> int:
    """Bytes of `value`, an integer or text such as "2GiB" or "500 MB". Raises InvalidRequest."""
    size: float | None = None
    if type(value) is int:
        size = value
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})\s*", value)):
        unit = _UNITS.get(match[2].upper())
        size = float(match[1]) * unit if unit else None
    if size is None or not 1 <= size <= 2**50:
        raise InvalidRequest(f'{name} is {value!r:.80}; allowed are 1 byte to 1 PiB, as an integer or text like "2GiB"')
    return int(size)


def _choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!r:.80}; allowed are {', '.join(map(str, allowed))}")
