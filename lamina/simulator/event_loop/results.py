"""The results of a run of the simulator: `RunResult`, with percentiles of its latencies (`Distribution`) and a fair
sample of its steps (`Samples`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil

ATTAINMENT = 0.9
"""The share of requests within the SLO that counts as keeping it: as DistServe (OSDI 2024) has it."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """One latency over all requests, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step: when it began, how long it took, and what ran. Shares are of the step's seconds, 0 to 1."""

    at: float
    seconds: float
    decode: int
    prefill_tokens: int
    running: int
    waiting: int
    model_share: float
    attention_share: float
    network_share: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """One system on one trace. Rates are over `seconds`, from the first arrival to the last token."""

    system: str
    model: str
    trace: str
    policy: str
    requests: int
    finished: int
    prompt_tokens: int
    output_tokens: int
    reused_tokens: int
    preemptions: int
    steps: int
    seconds: float
    price: float
    """Dollars an hour of all its devices."""
    power: float
    """Mean watts, by utilisation; 0 where a device's power is not published."""
    mean_batch: float
    """Sequences in decode, over the time that there were any."""
    peak_batch: int
    ttft: Distribution
    tpot: Distribution
    tbt: Distribution
    goodput: float
    """Requests a second that met the SLO; all of them without one."""
    slo_share: float
    model_utilisation: float
    attention_utilisation: float
    network_utilisation: float
    link_bytes: float
    """Bytes that crossed between model and attention workers, or from prefill to decode."""
    seed: int
    rejected: int = 0
    """Requests that could never have fitted."""
    losses: int = 0
    """Workers that were lost."""
    recomputed_tokens: int = 0
    """Tokens of contexts whose KV was lost with a worker, counted as often as it was."""
    saturated_seconds: float = 0.0
    """While a request waited for room: the steady state of a full system, without its beginning and its end."""
    saturated_tokens: int = 0
    saturated_batch: float = 0.0
    kv_bytes_per_token: float = 0.0
    state_bytes: int = 0
    """What is held of a sequence's recurrent states."""
    kv_tokens: int = 0
    """Tokens whose KV there is room for in each instance; 0: the model has none."""
    state_sequences: int = 0
    """Sequences whose states there is room for in each instance; 0: the model has none."""
    assumptions: dict[str, str] = field(default_factory=dict)
    """Each number that was assumed or fitted, in words."""
    samples: tuple[Sampled, ...] = ()
    """At most a few thousand steps, evenly over the run, for plots."""

    @property
    def keeps_slo(self) -> bool:
        """Whether enough of its requests are within the SLO; without one, whether enough finished."""
        return self.slo_share >= ATTAINMENT

    @property
    def mostly_full(self) -> bool:
        """Whether requests waited for most of the run: less is a short queue, not a steady state."""
        return self.saturated_seconds > self.seconds / 2

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def saturated_tokens_per_second(self) -> float:
        """Output tokens a second while requests waited for room; 0 where none ever did."""
        return self.saturated_tokens / self.saturated_seconds if self.saturated_seconds else 0.0

    @property
    def tokens_per_dollar(self) -> float:
        return self.tokens_per_second * 3600 / self.price if self.price else 0.0

    @property
    def dollars_per_million(self) -> float:
        return 1e6 / self.tokens_per_dollar if self.tokens_per_dollar else 0.0

    @property
    def tokens_per_joule(self) -> float:
        return self.tokens_per_second / self.power if self.power else 0.0


MOST_SAMPLES = 2000


def distribution(values: Iterable[float]) -> Distribution:
    """Mean and percentiles (nearest rank) of values that count once each; zeros where there are none."""
    return weighted_distribution(Counter(values))


def weighted_distribution(counts: Mapping[float, int]) -> Distribution:
    """Mean and percentiles of values, by how often each came."""
    total = sum(counts.values())
    if not total:
        return Distribution(0.0, 0.0, 0.0, 0.0)
    ordered = sorted(counts)
    passed = list(accumulate(counts[value] for value in ordered))
    p50, p90, p99 = (ordered[bisect_left(passed, ceil(share * total))] for share in (0.5, 0.9, 0.99))
    return Distribution(sum(value * counts[value] for value in ordered) / total, p50, p90, p99)


class Samples:
    """A sample of at most MOST_SAMPLES of any number of steps: every nth of them, with n doubled when it is full."""

    def __init__(self) -> None:
        self._steps: list[Sampled] = []
        self._every = 1
        self._count = 0

    def due(self) -> bool:
        """Whether the next step is wanted. Every step is asked about once."""
        self._count += 1
        return (self._count - 1) % self._every == 0

    @property
    def unwanted(self) -> int:
        """How many of the next steps are not."""
        return -self._count % self._every

    def skip(self, steps: int) -> None:
        """Go past so many unwanted steps."""
        self._count += steps

    def add(self, sample: Sampled) -> None:
        self._steps.append(sample)
        if len(self._steps) >= MOST_SAMPLES:
            del self._steps[1::2]
            self._every *= 2

    def kept(self) -> tuple[Sampled, ...]:
        return tuple(self._steps)
