"""What a serving benchmark is told. Light to import: the command line reads names, types and defaults here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamina.errors import InvalidRequest

ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
DATASETS = ("random", "shared-prefix", "trace")
MAX_REQUESTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `lamina bench serve` takes, whose options have these names and defaults. Lengths are tokens; `request_rate`
    None: as the trace has it, else all at once. `seed` None: the same lengths and times in each run, other words."""

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    endpoint: str = "chat"
    dataset: str = "random"
    num_prompts: int = 100
    request_rate: float | None = None
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 1
    input_len: int = 256
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 256
    num_prefixes: int = 4
    trace: str = "azure-conv"
    trace_dir: Path | None = None
    speed: float = 1.0
    max_model_len: int | None = None
    tokenizer: str | None = None
    slo: Mapping[str, float] = field(default_factory=dict)
    percentiles: Sequence[float] = (90.0, 99.0)
    seed: int | None = None
    ignore_eos: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name, value, allowed in (("endpoint", self.endpoint, ENDPOINTS), ("dataset", self.dataset, DATASETS)):
            if value not in allowed:
                raise InvalidRequest(f"{name} is {value!r:.80}; allowed are {', '.join(allowed)}")
        for name, number, least, most in (
            ("num-prompts", self.num_prompts, 1, MAX_REQUESTS),
            ("num-warmups", self.num_warmups, 0, 10000),
            ("max-concurrency", self.max_concurrency, 1, MAX_REQUESTS),
            ("max-model-len", self.max_model_len, 2, 1 << 24),
            ("seed", self.seed, 0, (1 << 63) - 1),
        ):
            if number is not None and not least <= number <= most:
                raise InvalidRequest(f"{name} is {number!r:.80}; allowed are {least} to {most}")
        if not 1e-6 <= self.speed <= 1e6:
            raise InvalidRequest(f"speed is {self.speed!r}; allowed is 1e-6 to 1e6")
        if self.speed != 1 and (self.dataset != "trace" or self.request_rate is not None):
            raise InvalidRequest("speed was given; allowed is that with a trace and without a request rate")
