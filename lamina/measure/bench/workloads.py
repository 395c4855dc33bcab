"""The requests of a run: when they are sent, and how many tokens of prompt and output they have. Pure: drawn from a
seed.

A prompt is a list of parts, each a name and a number of tokens: parts of one name begin with the same tokens, all
others differ. `prompts.py` makes the tokens.

`Settings` is what a serving benchmark is told. This file is light to import, as the command line reads the names, types
and defaults of the settings here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

from lamina.errors import InvalidRequest
from lamina.simulator.traces.arrivals import BLOCK, Trace

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
        for name, number, lowest, highest in (
            ("num-prompts", self.num_prompts, 1, MAX_REQUESTS),
            ("num-warmups", self.num_warmups, 0, 10000),
            ("max-concurrency", self.max_concurrency, 1, MAX_REQUESTS),
            ("max-model-len", self.max_model_len, 2, 1 << 24),
            ("seed", self.seed, 0, (1 << 63) - 1),
        ):
            if number is not None and not lowest <= number <= highest:
                raise InvalidRequest(f"{name} is {number!r:.80}; allowed are {lowest} to {highest}")
        if not 1e-6 <= self.speed <= 1e6:
            raise InvalidRequest(f"speed is {self.speed!r}; allowed is 1e-6 to 1e6")
        if self.speed != 1 and (self.dataset != "trace" or self.request_rate is not None):
            raise InvalidRequest("speed was given; allowed is that with a trace and without a request rate")


MAX_TOKENS = 1 << 26
"""Of all prompts together: they are made before the run, and lie in memory as text."""
MAX_LENGTH = 1 << 24
_RATES = (1e-3, 1e6)

Part = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Item:
    """One request: seconds after the start, the parts of its prompt, and the tokens it asks for."""

    at: float
    parts: tuple[Part, ...]
    output: int

    @property
    def prompt(self) -> int:
        """Tokens."""
        return sum(tokens for _, tokens in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of random prompts: each length is drawn from (1 - ratio) to (1 + ratio) times what is given. With `prefixes`,
    each prompt begins with one of so many, `prefix` tokens long."""

    prompt: int
    output: int
    ratio: float = 0.0
    prefix: int = 0
    prefixes: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("input-len", self.prompt, 1),
            ("output-len", self.output, 1),
            ("prefix-len", self.prefix, 0),
            ("num-prefixes", self.prefixes, 0),
        ):
            if type(value) is not int or not least <= value <= MAX_LENGTH:
                raise InvalidRequest(f"{name} is {value!r:.80}; allowed are {least} to {MAX_LENGTH}")
        if not 0 <= self.ratio < 1:
            raise InvalidRequest(f"range-ratio is {self.ratio!r}; allowed is 0 to below 1")
        if (self.prefix > 0) != (self.prefixes > 0):
            raise InvalidRequest(
                f"prefix-len is {self.prefix} and num-prefixes is {self.prefixes}; allowed are both above 0, or both 0"
            )


def drawn(
    count: int, lengths: Lengths, *, rate: float = math.inf, burstiness: float = 1.0, seed: int = 0
) -> list[Item]:
    """`count` requests of these lengths, `rate` a second. Raises InvalidRequest."""
    if type(count) is not int or not 0 <= count <= MAX_REQUESTS:
        raise InvalidRequest(f"num-prompts is {count!r:.80}; allowed are 1 to {MAX_REQUESTS}")
    rng = random.Random(f"{seed} r")
    items = []
    for number, time in enumerate(arrivals(count, rate, burstiness, seed)):
        prompt, output = (_between(rng, length, lengths.ratio) for length in (lengths.prompt, lengths.output))
        last_part: Part = (f"r{number}", prompt)
        shared: Part = (f"p{rng.randrange(lengths.prefixes)}", lengths.prefix) if lengths.prefixes else ("", 0)
        items.append(Item(time, (shared, last_part) if lengths.prefixes else (last_part,), output))
    return _bounded(items)


def arrivals(count: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """When each of `count` requests comes, in seconds from 0 on: `rate` a second exactly, all at 0 if it is infinite.

    Gaps are gamma distributed with the shape `burstiness`: 1 is a Poisson process, less comes in bursts, more comes
    regularly. Raises InvalidRequest.
    """
    low, high = _RATES
    if not (rate == math.inf or low <= rate <= high):
        raise InvalidRequest(f"request-rate is {rate!r}; allowed are inf, or {low:g} to {high:g} requests a second")
    if not 0.01 <= burstiness <= 1000:
        raise InvalidRequest(f"burstiness is {burstiness!r}; allowed is 0.01 to 1000")
    if rate == math.inf or count < 2:
        return [0.0] * count
    rng = random.Random(f"{seed} arrivals")
    gaps = [rng.gammavariate(burstiness, 1 / burstiness) for _ in range(count - 1)]
    scale = (count - 1) / rate / max(sum(gaps), 1e-300)
    return [0.0, *accumulate(gap * scale for gap in gaps)]


def of_trace(trace: Trace) -> list[Item]:
    """A trace's requests: its times, lengths, and shared blocks where it names them. Raises InvalidRequest."""
    items = []
    for number, arrival in enumerate(trace.arrivals):
        parts, remaining = [], arrival.prompt
        for block in arrival.blocks:
            parts.append((f"b{block}", min(BLOCK, remaining)))
            remaining -= BLOCK
        if remaining > 0:
            parts.append((f"t{number}", remaining))
        items.append(Item(arrival.at - trace.arrivals[0].at, tuple(parts), arrival.output))
    return _bounded(items)


def capped(items: Sequence[Item], context: int, margin: int) -> tuple[list[Item], int]:
    """The requests cut to what a context of so many tokens holds besides `margin`, and how many were cut.

    The output gets half of the context at most; the prompt, what is left. Raises InvalidRequest where nothing is left.
    """
    room = context - margin
    if room < 2:
        raise InvalidRequest(f"the server's context is {context} tokens; allowed are more than {margin + 2}")
    fitting, cut = [], 0
    for item in items:
        output = min(item.output, room // 2)
        parts, remaining = [], room - output
        for name, tokens in item.parts:
            if remaining > 0:
                parts.append((name, min(tokens, remaining)))
            remaining -= tokens
        fits = replace(item, parts=tuple(parts), output=output)
        cut += fits != item
        fitting.append(fits)
    return fitting, cut


def fresh(items: Sequence[Item], name: str) -> list[Item]:
    """Requests of the same lengths, all at once, whose prompts share nothing with these: to warm up with."""
    return [Item(0.0, ((f"{name}{number}", item.prompt),), item.output) for number, item in enumerate(items)]


def _between(rng: random.Random, length: int, ratio: float) -> int:
    return rng.randint(max(1, math.ceil(length * (1 - ratio))), max(1, math.floor(length * (1 + ratio))))


def _bounded(items: list[Item]) -> list[Item]:
    if (total := sum(item.prompt for item in items)) > MAX_TOKENS:
        raise InvalidRequest(f"the prompts have {total} tokens together; allowed are {MAX_TOKENS}")
    return items
