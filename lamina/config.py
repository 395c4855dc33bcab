"""How an engine is set up: frozen, checked once, every error naming the value and what is allowed.

Knows the choices; knows nothing of the machine (`runtime` fills in what is left to it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.errors import InvalidRequest
from lamina.layouts import SHARDS

DEFAULT_MODEL = "smollm2-135m"
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
DEVICES = ("auto", "cpu", "cuda")
PAGE_SIZES = (16, 32, 64, 128, 256)
DATA_CHANNELS = ("grpc", "tcp")
MAX_WORKERS = 1024
MAX_LANES = 8
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
    """What K and V are stored in; auto: as `dtype`. int8 and float8_e4m3fn keep a scale for each token and head;
    the CPU kernels have no float8."""
    page_size: int = 32
    """Tokens a KV page."""
    max_batch_tokens: int | None = None
    """Tokens a batch, prefill chunks and decode steps together; None: 1024."""
    threads: int | None = None
    """CPU threads of one step; None: one a core."""
    prefix_cache: bool = True
    """Keep the KV of prompts and answers, so that shared prefixes are computed once."""
    policy: str | Path | None = None
    """What each KV head reads and keeps: None or "full" for everything, "auto" for what matters, another policy for
    all heads such as "streaming(sink=64, recent=256)", or the path of a policy file, which ends in .toml."""
    rope_scaling: Mapping[str, Any] | None = None
    """Overrides the RoPE scaling of the model's config, for contexts longer than it allows."""
    attention_workers: int | Sequence[str] = 0
    """How many attention workers to start, or the "host:port" of each that was started elsewhere. 0: attention is
    computed in the engine's process."""
    shard: str = "heads"
    """How attention workers share a sequence: "heads", "sequence" (ranges of positions) or "heads+sequence"."""
    cluster: str | None = None
    """The address of a Ray cluster, or "auto", where engine and attention workers are placed; None: this machine."""
    lanes: int | str = "auto"
    """Batches under way at a time, so that one computes while another waits for attention; auto: as measured."""
    worker_timeout: float = 10.0
    """Seconds without a sign of life, or beyond what its work should take, after which an attention worker is lost."""
    recovery_timeout: float = 60.0
    """Seconds that requests wait for an attention worker to join where none is left."""
    local_channel: bool = True
    """Use a Unix socket to an attention worker on the same host."""
    data_channel: str = "grpc"
    """How batches travel to an attention worker on another host: grpc or tcp."""
    tls_dir: str | Path | None = None
    """A folder with ca.pem, and cert.pem and key.pem where attention workers ask for a certificate."""
    token_file: str | Path | None = None
    """A file with the token that attention workers ask for."""
    insecure: bool = False
    """Allow attention workers on other hosts without TLS and token."""

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, DTYPES)
        _choice("device", self.device, DEVICES)
        _choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        _choice("page_size", self.page_size, PAGE_SIZES)
        _choice("shard", self.shard, SHARDS)
        _choice("data_channel", self.data_channel, DATA_CHANNELS)
        for name in ("worker_timeout", "recovery_timeout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0.1 <= value <= 86400:
                raise InvalidRequest(f"{name} is {value!r:.80}; allowed are 0.1 to 86400 seconds")
        self._check_workers()
        if self.policy is not None and not (isinstance(self.policy, (str, Path)) and str(self.policy).strip()):
            raise InvalidRequest(
                f'policy is {self.policy!r:.80}; allowed is "auto", a policy, or a file ending in .toml'
            )
        for name, high in (("max_model_len", 2**24), ("max_batch_tokens", 2**20), ("threads", 1024)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= high):
                raise InvalidRequest(f"{name} is {value!r:.80}; allowed is an integer from 1 to {high}, or None")
        for name in ("prefix_cache", "local_channel", "insecure"):
            if type(getattr(self, name)) is not bool:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r:.80}; allowed is True or False")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, Mapping):
            raise InvalidRequest(f"rope_scaling is {self.rope_scaling!r:.80}; allowed is a mapping as in config.json")
        if self.kv_memory is not None:
            object.__setattr__(self, "kv_memory", parse_size("kv_memory", self.kv_memory))

    @property
    def holders_here(self) -> int:
        """How many holders of KV this machine has: the local one, and attention workers that are started here."""
        return 1 + (self.attention_workers if isinstance(self.attention_workers, int) and not self.cluster else 0)

    def _check_workers(self) -> None:
        workers = self.attention_workers
        if isinstance(workers, Sequence) and not isinstance(workers, str):
            for address in workers:
                if not isinstance(address, str) or not re.fullmatch(r"\S+:\d{1,5}", address):
                    raise InvalidRequest(f'attention_workers names {address!r:.80}; allowed is "host:port"')
            if len(set(workers)) != len(workers) or not 1 <= len(workers) <= MAX_WORKERS:
                raise InvalidRequest(
                    f"attention_workers names {len(workers)} addresses; allowed are 1 to {MAX_WORKERS}, different"
                )
            object.__setattr__(self, "attention_workers", tuple(workers))
            if self.cluster is not None:
                raise InvalidRequest("cluster and addresses of attention_workers were given; allowed is one of the two")
        elif type(workers) is not int or not 0 <= workers <= MAX_WORKERS:
            raise InvalidRequest(
                f'attention_workers is {workers!r:.80}; allowed are 0 to {MAX_WORKERS}, or a list of "host:port"'
            )
        if self.lanes != "auto" and (type(self.lanes) is not int or not 1 <= self.lanes <= MAX_LANES):
            raise InvalidRequest(f'lanes is {self.lanes!r:.80}; allowed are 1 to {MAX_LANES}, or "auto"')
        if self.cluster is not None and (not isinstance(self.cluster, str) or not self.cluster):
            raise InvalidRequest(f'cluster is {self.cluster!r:.80}; allowed is "auto", "host:port" or None')


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
