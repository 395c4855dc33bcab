"""From the times of requests to latencies, rates and goodput. Pure arithmetic on seconds.

TTFT: from sending a request to its first text. TPOT: (E2EL - TTFT) / (output tokens - 1), of answers with two tokens or
more. ITL: between two chunks with text. E2EL: from sending to the last event. As in vLLM's benchmark.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import floor

from lamina.errors import InvalidRequest

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
SLO_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times are seconds after the start of the run: when it was `due`, `sent`, and `ended`, and when each
    of its chunks with text came. `error` names the kind of a failure, "" for none; `detail` has its words.

    Counts are tokens: `prompt`, `output` and `cached` as the server reports them, else None; `planned` and `asked` are
    the lengths of prompt and output that the workload has."""

    due: float
    sent: float
    ended: float
    chunks: Sequence[float] = ()
    planned: int = 0
    asked: int = 0
    prompt: int | None = None
    output: int | None = None
    cached: int | None = None
    finish: str = ""
    error: str = ""
    detail: str = ""

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.sent if self.chunks else self.e2el

    @property
    def e2el(self) -> float:
        return self.ended - self.sent

    @property
    def output_tokens(self) -> int:
        """As the server reports it, else one for each chunk."""
        return len(self.chunks) if self.output is None else self.output

    @property
    def prompt_tokens(self) -> int:
        """As the server reports it, else as planned."""
        return self.planned if self.prompt is None else self.prompt

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Spread:
    """Of many values: mean, median, standard deviation, and percentiles by number; all in milliseconds."""

    count: int
    mean: float
    median: float
    std: float
    percentiles: Mapping[float, float] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run gave, by the names of its JSON, which are vLLM's where it has the same figure. Rates are a second,
    over `duration`: seconds from the start of the run until the last request ended."""

    duration: float
    completed: int
    failures: Mapping[str, int]
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    max_output_tokens_per_s: float
    total_token_throughput: float
    max_concurrent_requests: int
    mean_concurrent_requests: float
    chunks: int
    answers_without_usage: int
    """Without a token count of the server: their chunks were counted."""
    answers_with_cached_tokens: int
    """With the server's count of them."""
    cached_tokens: int
    answers_shorter_than_asked: int
    spreads: Mapping[str, Spread]


def summary(
    outcomes: Iterable[Outcome],
    seconds: float,
    percentiles: Sequence[float] = (90, 99),
    slo: Mapping[str, float] | None = None,
) -> Summary:
    """The figures of a run of `seconds` with these outcomes. `slo`: milliseconds at most by metric, of
    `SLO_METRICS`."""
    every = list(outcomes)
    good = [outcome for outcome in every if not outcome.error]
    seconds = max(seconds, 1e-9)
    read, written = sum(answer.prompt_tokens for answer in good), sum(answer.output_tokens for answer in good)
    return Summary(
        duration=seconds,
        completed=len(good),
        failures=dict(Counter(answer.error for answer in every if answer.error).most_common()),
        total_input_tokens=read,
        total_output_tokens=written,
        request_throughput=len(good) / seconds,
        request_goodput=sum(meets(answer, slo) for answer in good) / seconds if slo else None,
        output_throughput=written / seconds,
        max_output_tokens_per_s=max(over_time(good), default=0.0),
        total_token_throughput=(read + written) / seconds,
        max_concurrent_requests=peak_concurrency(every),
        mean_concurrent_requests=sum(answer.e2el for answer in every) / seconds,
        chunks=sum(len(answer.chunks) for answer in good),
        answers_without_usage=sum(answer.output is None for answer in good),
        answers_with_cached_tokens=sum(answer.cached is not None for answer in good),
        cached_tokens=sum(answer.cached or 0 for answer in good),
        answers_shorter_than_asked=sum(answer.output_tokens < answer.asked for answer in good),
        spreads={name: spread(seconds_of_metric, percentiles) for name, seconds_of_metric in latencies(good).items()},
    )


def latencies(good: Sequence[Outcome]) -> dict[str, list[float]]:
    """The seconds of requests that did not fail, by the names of `METRICS`."""
    return {
        "ttft": [outcome.ttft for outcome in good],
        "tpot": [tpot for outcome in good if (tpot := outcome.tpot) is not None],
        "itl": [after - before for outcome in good for before, after in pairwise(outcome.chunks)],
        "e2el": [outcome.e2el for outcome in good],
    }


def meets(outcome: Outcome, slo: Mapping[str, float]) -> bool:
    """Whether a request kept within every limit, in milliseconds. An answer of one token has a TPOT of 0."""
    reached = {"ttft": outcome.ttft, "tpot": outcome.tpot or 0.0, "e2el": outcome.e2el}
    return not outcome.error and all(reached[name] * 1e3 <= limit for name, limit in slo.items())


def spread(seconds: Sequence[float], percentiles: Sequence[float]) -> Spread:
    """In milliseconds; zeros where there are no values."""
    ordered = sorted(seconds)
    if not ordered:
        return Spread(0, 0.0, 0.0, 0.0, dict.fromkeys(percentiles, 0.0))
    mean = statistics.fmean(ordered)
    deviation = (sum((value - mean) ** 2 for value in ordered) / len(ordered)) ** 0.5
    values = {number: percentile(ordered, number) * 1e3 for number in percentiles}
    return Spread(len(ordered), mean * 1e3, percentile(ordered, 50) * 1e3, deviation * 1e3, values)


def percentile(ordered: Sequence[float], number: float) -> float:
    """Of rising values, with straight lines between them, as numpy's default is."""
    place = (len(ordered) - 1) * number / 100
    low = floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def peak_concurrency(outcomes: Iterable[Outcome]) -> int:
    """The most requests that were under way at one time. One that ends as another is sent makes room for it."""
    changes = sorted(change for outcome in outcomes for change in ((outcome.sent, 1), (outcome.ended, -1)))
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def over_time(outcomes: Iterable[Outcome], width: float = 1.0) -> list[float]:
    """Output tokens a second, for each `width` seconds of the run. A chunk counts as its answer's mean."""
    totals: dict[int, float] = {}
    for outcome in outcomes:
        if outcome.chunks:
            tokens_per_chunk = outcome.output_tokens / len(outcome.chunks)
            for slot, count in Counter(int(second / width) for second in outcome.chunks).items():
                totals[slot] = totals.get(slot, 0.0) + count * tokens_per_chunk
    return [totals.get(slot, 0.0) / width for slot in range(max(totals, default=-1) + 1)]


def parse_slo(words: Iterable[str]) -> dict[str, float]:
    """Milliseconds by metric of words such as "ttft:500". Raises InvalidRequest."""
    limits: dict[str, float] = {}
    for word in (part for text in words for part in text.replace(",", " ").split()):
        name, _, limit = word.partition(":")
        try:
            value = float(limit)
        except ValueError:
            value = -1.0
        if name not in SLO_METRICS or name in limits or not 0 < value < 1e12:  # NaN compares false
            raise InvalidRequest(
                f"goodput is {word!r:.80}; allowed are {', '.join(SLO_METRICS)}, once each, with milliseconds above 0, "
                "such as ttft:500"
            )
        limits[name] = value
    return limits


def parse_percentiles(words: str) -> tuple[float, ...]:
    """Numbers above 0 and below 100 with commas between them. Raises InvalidRequest."""
    try:
        numbers = sorted({float(word) for word in words.split(",")})
    except ValueError:
        numbers = []
    if not numbers or len(numbers) > 20 or not all(0 < number < 100 for number in numbers):
        raise InvalidRequest(
            f"percentile is {words!r:.80}; allowed are 1 to 20 numbers between 0 and 100, such as 90,99"
        )
    return tuple(numbers)
