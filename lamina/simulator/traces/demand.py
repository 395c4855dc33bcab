"""What a trace asks for: a few means, and its requests. Pure arithmetic over the trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from lamina.errors import InvalidRequest
from lamina.simulator.traces.arrivals import Arrival, Trace
from lamina.simulator.traces.catalogue import windows

MOST = 20_000
"""Requests that are replayed: all of a trace, or windows that lie evenly over a longer one."""
LEVELS = 64
"""Equally likely lengths that are left of an output, of sequences that decode."""
_WINDOW = 64
"""Requests of each window of an excerpt from a sample: a burst is longer than a few."""
_MOMENT = 1e-6
"""Seconds in which all requests come at once."""
_GOLDEN = (math.sqrt(5) - 1) / 2
_STRIDE = 27
"""Levels from one to the next: odd, and about the golden part of all."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Requests by time of arrival, one after another: times in mean gaps between two of them, so that any rate can be
    asked for, and tokens of prompts and outputs. Equal to itself alone."""

    at: NDArray[np.float64]
    prompts: NDArray[np.int64]
    outputs: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.at)

    @cached_property
    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The lengths that prompts have, and how many have each."""
        return np.unique(self.prompts, return_counts=True)

    def seconds(self, rate: float) -> NDArray[np.float64]:
        """The times at so many requests a second."""
        times: NDArray[np.float64] = self.at / rate
        return times

    @lru_cache(maxsize=64)  # noqa: B019 - one object for each factor, so that what is computed of it is found again
    def with_prompts(self, factor: float) -> Sample:
        """Prompts `factor` times as long."""
        return replace(self, prompts=np.maximum(1, np.rint(self.prompts * factor)).astype(np.int64))

    def taken(self, places: range, most: int) -> Sample:
        """The requests at these places; `most` of them, in windows of low rates and high ones, as all have."""
        count = max(1, most // _WINDOW)
        chosen = np.asarray(places)
        if len(places) > most and count < len(places) // _WINDOW:
            windows = chosen[: len(places) // _WINDOW * _WINDOW].reshape(-1, _WINDOW)
            by_rate = np.argsort(self.at[windows[:, -1]] - self.at[windows[:, 0]], kind="stable")
            middles = (2 * np.arange(count) + 1) * len(windows) // (2 * count)
            chosen = windows[np.sort(by_rate[middles])].ravel()
        gaps = np.diff(self.at[chosen])
        # Between windows that were not neighbours a mean gap stands for what is left out.
        gaps[_WINDOW - 1 :: _WINDOW][np.diff(chosen)[_WINDOW - 1 :: _WINDOW] > places.step] = places.step
        return _sample(np.concatenate(([0.0], np.cumsum(gaps))), self.prompts[chosen], self.outputs[chosen])


@dataclass(frozen=True, slots=True)
class Demand:
    """Means over a trace's requests. Lengths are tokens, `rate` is requests a second (infinite: as many as are served).

    `context` is the mean number of tokens of KV that a sequence has while it decodes, over all that decode at a time:
    E[o (p + o / 2)] / E[o] for prompts p and outputs o, because a request is there for o steps and has p + o / 2 tokens
    in their mean. Where p and o are independent of each other and o is constant it is E[p] + E[o] / 2.
    """

    name: str
    requests: int
    rate: float
    prompt: float
    output: float
    context: float
    longest: int
    """Prompt and output of the longest request."""
    sample: Sample = field(repr=False)

    def at_rate(self, rate: float) -> Demand:
        """The same requests, so many a second. Raises InvalidRequest."""
        if not rate > 0:
            raise InvalidRequest(f"rate is {rate}; allowed is above 0 requests a second")
        return replace(self, rate=rate)

    def with_prompts(self, factor: float) -> Demand:
        """Prompts `factor` times as long, outputs as they are; the context grows by what the prompts do."""
        sample = self.sample
        weighted = float((sample.prompts * sample.outputs).sum() / sample.outputs.sum())
        return replace(
            self,
            prompt=self.prompt * factor,
            context=self.context + weighted * (factor - 1),
            longest=math.ceil(self.longest * max(1.0, factor)),
            sample=sample.with_prompts(factor),
        )


def demand(trace: Trace) -> Demand:
    """The means of a trace, and a sample of it. Requests that all come at once are taken to come by chance."""
    arrivals = trace.arrivals
    outputs = [arrival.output for arrival in arrivals]
    part = windows(trace, MOST).arrivals
    span = trace.seconds
    times = np.array([arrival.at for arrival in part]) if span > _MOMENT else _by_chance(len(part))
    return Demand(
        name=trace.name,
        requests=len(arrivals),
        rate=(len(arrivals) - 1) / span if span > _MOMENT else math.inf,
        prompt=sum(arrival.prompt for arrival in arrivals) / len(arrivals),
        output=sum(outputs) / len(arrivals),
        context=mean_context(arrivals),
        longest=max(arrival.prompt + arrival.output for arrival in arrivals),
        sample=_sample(
            times, np.array([arrival.prompt for arrival in part]), np.array([arrival.output for arrival in part])
        ),
    )


def mean_context(arrivals: Sequence[Arrival]) -> float:
    """Tokens of KV of a sequence that decodes, over all that do at a time."""
    token_steps = sum(arrival.output * (arrival.prompt + arrival.output / 2) for arrival in arrivals)
    return token_steps / sum(arrival.output for arrival in arrivals)


def _sample(at: NDArray[np.float64], prompts: NDArray[np.int64], outputs: NDArray[np.int64]) -> Sample:
    """A sample of requests at these times, which become multiples of their mean gap."""
    gap = (at[-1] - at[0]) / max(1, len(at) - 1) or 1.0
    return Sample((at - at[0]) / gap, prompts, outputs)


def _by_chance(count: int) -> NDArray[np.float64]:
    """Times of a Poisson process, whose gaps have exactly the distribution that they should have, in a fixed order."""
    return np.cumsum(-np.log(1 - (0.5 + np.arange(count) * _GOLDEN) % 1))


@lru_cache(maxsize=64)
def streams(sample: Sample, replicas: int, requests: int) -> tuple[Sample, ...]:
    """What instances get of a sample that take requests in turn: every `replicas`th request. About `requests` in all,
    of one instance or, where one gets fewer, of several."""
    count = min(replicas, len(sample), max(1, round(requests * replicas / len(sample))))
    return tuple(
        sample.taken(range(first * min(replicas, len(sample)) // count, len(sample), replicas), requests // count)
        for first in range(count)
    )


@lru_cache(maxsize=256)
def left_of_outputs(sample: Sample) -> NDArray[np.int64]:
    """Tokens that sequences in decode have left, `LEVELS` of them in no order: long outputs are met more often, and
    each anywhere in it. None where every output is one token."""
    after = np.sort(sample.outputs) - 1
    longer = len(after) - np.arange(len(after))  # as many outputs have the tokens between one length and the next
    tokens = np.concatenate(([0], np.cumsum(np.diff(after, prepend=0) * longer)))
    ranks = (np.arange(LEVELS) + 0.5) / LEVELS * tokens[-1]
    lengths = 1 + np.interp(ranks, tokens, np.concatenate(([0], after))).astype(np.int64)
    spread: NDArray[np.int64] = lengths[np.arange(LEVELS) * _STRIDE % LEVELS] if tokens[-1] else lengths[:0]
    return spread
