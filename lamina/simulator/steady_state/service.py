"""One system under one demand: what a batch takes and passes, and what requests meet at some rate.

`closed_form` calls this with one rate after another.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np

from lamina.simulator.costs.offloaded import UNBOUNDED
from lamina.simulator.costs.systems import (
    PAGE_SIZE,
    Colocated,
    Disaggregated,
    Offloaded,
    System,
    before_first_token,
    instances,
    kept_window,
)
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.steady_state.replay import Batches, Floats, Integers, Limits, Requests, Served, replay
from lamina.simulator.traces.demand import Demand, Sample, left_of_outputs, streams

FloatT = TypeVar("FloatT", float, Floats)
FOREVER = 1e9
"""Seconds that no token takes, unless prefill can't keep up."""
_APART = 1e5
"""Seconds after which a request is alone."""
_LENGTHS = ("prompts", "outputs", "past", "read", "held")
"""Fields of `Requests` beside its times."""
_EDGE = 0.02
"""A time counts in part as kept from this share below its limit to as much above it, so that what is counted changes
smoothly with the limit."""


@dataclass(frozen=True, slots=True)
class Point:
    """One instance at some rate."""

    rate: float
    tpot: float
    ttft: float
    share: float
    """The share of the requests that is within the SLO."""
    batch: float = 0.0


def largest(most: int, passes: Callable[[int], bool]) -> int:
    """The largest batch up to `most` that passes, where all smaller ones do; 0: not even one sequence."""
    return bisect_right(range(1, most + 1), False, key=lambda batch: not passes(batch))


def bound(seconds: float | None) -> float:
    """What an SLO allows: no bound is infinite."""
    return math.inf if seconds is None else seconds


class Service:
    """One instance of a system. Without `prefill` prompts are computed elsewhere."""

    def __init__(self, system: System, demand: Demand, slo: Slo, prefill: bool) -> None:
        self._demand, self._slo = demand, slo
        self._wait = before_first_token(system, 0.0)  # beside all steps, and of each token of a prompt
        self._wait_a_token = before_first_token(system, 1.0) - self._wait
        self._apart = system if isinstance(system, Disaggregated) and prefill else None
        self._decode = instances(system)[-1]
        self._has_prompts = prefill and self._apart is None
        self._batches = _batches(_plain(self._decode), demand.context, self._has_prompts)
        self._budget = self._decode.max_batch_tokens if self._has_prompts else UNBOUNDED
        self._past = self._mean_past(self._batches, self._budget, True)
        self._prepared: dict[Sample, Requests] = {}
        self._presents: dict[tuple[float, int], Integers] = {}

    def pace(self, batch: int) -> float:
        """Seconds from token to token with that mean batch; infinite where prefill can't keep up."""
        alone = self._batches.know(batch)
        if not self._has_prompts:
            return alone
        prompt, output = self._demand.prompt, self._demand.output
        arriving = batch * prompt / output  # prompt tokens a batch, in the mean
        chunk = min(self._budget - batch, math.ceil(max(prompt, arriving)))
        if chunk < 1 or arriving > chunk:
            return math.inf
        added = self._batches.added(batch, chunk) * prompt / chunk + self._past
        return alone + batch / output * added

    def most(self, batch: int) -> float:
        """Requests a second that pass with up to so many sequences at a time."""
        decode = self._most_decoded(batch)
        if self._apart is None:
            return decode
        batches, link = self._beforehand(self._apart)
        limit = self._apart.prefill.max_batch_tokens
        chunk = min(limit, 8 * math.ceil(self._demand.prompt))
        prompt = batches.added(0, chunk) * self._demand.prompt / chunk + self._mean_past(batches, limit, False)
        sent = float(link(self._demand.sample.prompts).mean())
        return min(decode, 1 / prompt, 1 / sent if sent else math.inf)

    def _mean_past(self, batches: Batches, limit: int, beside: bool) -> float:
        """Seconds of a prompt's past, in the mean: see `Batches.past`."""
        lengths, counts = self._demand.sample.lengths
        return float(np.average(lengths * batches.past(lengths, limit, beside), weights=counts))

    def at(self, rate: float, places: int, replicas: int, requests: int) -> Point:
        """Of `replicas` that take requests in turn, one with `rate` requests a second and up to `places` sequences at a
        time: in the mean over about `requests` of the sample."""
        parts = streams(self._demand.sample, replicas, requests)
        points = [self._at(stream, stream.seconds(rate), rate, places) for stream in parts]
        count = len(points)
        names = ("tpot", "ttft", "share", "batch")
        return Point(rate, **{name: sum(getattr(point, name) for point in points) / count for name in names})

    def alone(self, requests: int) -> Point:
        """The instance with one request at a time."""
        stream = streams(self._demand.sample, 1, requests)[0]
        return replace(self._at(stream, np.linspace(0.0, _APART * len(stream), len(stream)), 0.0, 1), rate=0.0)

    def _at(self, stream: Sample, arrived: Floats, rate: float, places: int) -> Point:
        requests = replace(self._prepare(stream), at=arrived)
        if (rate, places) not in self._presents:
            self._presents[rate, places] = self._present(rate, places)
        present = self._presents[rate, places]
        policy, usual = self._decode.policy, held(self._decode, self._demand.context + PAGE_SIZE / 2)
        limits = Limits(places, self._decode.capacity.tokens * policy.held, self._budget, usual)
        if self._apart is None:
            served = replay(self._batches, requests, limits, present)
        else:
            served = self._through(self._apart, stream, requests, limits, present)
        return self._point(rate, places, stream, arrived, served)

    def _through(
        self, system: Disaggregated, stream: Sample, requests: Requests, limits: Limits, present: Integers
    ) -> Served:
        """Prompts on an instance of their own; then over the link, one after another; then decode, whose waiting is
        part of the pace."""
        batches, link = self._beforehand(system)
        before, number = system.prefill, len(stream)
        past = batches.pasts(stream.prompts, before.max_batch_tokens)
        alone = replace(
            requests, outputs=np.ones(number, np.int64), past=past, held=requests.prompts + np.float64(PAGE_SIZE / 2)
        )
        limit = Limits(before.max_sequences, before.capacity.tokens, before.max_batch_tokens, 0.0)
        prompts = replay(batches, alone, limit, present[:0])
        order = np.flatnonzero(stream.outputs > 1)
        if not len(order):
            return prompts
        sent, ready = link(stream.prompts)[order], prompts.first[order]
        # One after another: each begins when it is ready and all before it are over.
        total = np.cumsum(sent)
        arrival = np.maximum.accumulate(ready - total + sent) + total + system.link.round_trip
        decoding = Requests(arrival, *(getattr(requests, name)[..., order] for name in _LENGTHS))
        served = replay(self._batches, decoding, limits, present)
        pace = np.zeros(number)
        pace[order] = served.pace + (served.first - ready) / (decoding.outputs - 1)
        return Served(prompts.first, pace, prompts.entered)

    def _point(self, rate: float, places: int, stream: Sample, arrived: Floats, served: Served) -> Point:
        ttft = served.first - (arrived if self._slo.ttft is not None else served.entered)
        ttft += self._wait + stream.prompts * self._wait_a_token
        share = (_kept(ttft, bound(self._slo.ttft)) * _kept(served.pace, bound(self._slo.tpot))).mean()
        after = stream.outputs - 1
        many = after > 0
        tpot = served.pace[many].mean() if many.any() else self._batches.know(1)
        batch = rate * (served.pace * after).mean()
        return Point(rate, float(tpot), float(ttft.mean()), float(share), min(float(batch), places))

    def _present(self, rate: float, places: int) -> Integers:
        """Tokens that sequences have left which decode already: as many as there are in the mean, by Little's law."""
        lengths = left_of_outputs(self._demand.sample)
        count = largest(places, lambda batch: self._most_decoded(batch) <= rate)
        return np.resize(lengths, count if count < places and len(lengths) else 0)

    def _most_decoded(self, batch: int) -> float:
        """Requests a second that pass decode alone."""
        return batch / (self._demand.output * self.pace(batch))

    def _prepare(self, stream: Sample) -> Requests:
        if stream not in self._prepared:
            contexts = stream.prompts + stream.outputs / 2
            self._prepared[stream] = Requests(
                stream.at,
                stream.prompts,
                stream.outputs,
                self._batches.pasts(stream.prompts, self._budget),
                contexts,
                held(self._decode, contexts + PAGE_SIZE / 2),
            )
        return self._prepared[stream]

    def _beforehand(self, system: Disaggregated) -> tuple[Batches, Callable[[Integers], Floats]]:
        """The instance of prompts, and the seconds of a prompt's KV on the way to decode."""
        batches, wire = _batches(_plain(system.prefill), self._demand.context, True), system.wire
        a_token, first = system.transfer_bytes(2) - system.transfer_bytes(1), system.transfer_bytes(1)
        window = system.policy.window or math.inf
        return batches, lambda prompts: (first + (np.minimum(prompts, window) - 1) * a_token) / wire


def held(system: System, context: FloatT) -> FloatT:
    """Tokens of KV in all layers that a sequence of so many takes: those with a window keep no more than it."""
    policy, layers = system.policy, 0
    tokens = context * 0
    for group in system.model.groups:
        if group.attends:
            window = kept_window(system, group.window)
            tokens = tokens + group.layers * policy.held * np.minimum(context, math.inf if window is None else window)
            layers += group.layers
    return tokens / max(1, layers)


def _kept(seconds: Floats, limit: float) -> Floats:
    """1 for a time within its limit, 0 for one beyond, and some of both close to it."""
    return np.clip(0.5 + (1 - seconds / limit) / (2 * _EDGE), 0.0, 1.0)


@lru_cache(maxsize=2048)
def _batches(system: System, context: float, prefill: bool) -> Batches:
    """Shared by all rates, and by systems that differ in their limits alone."""
    return Batches(system, context, prefill)


def _plain(system: Colocated | Offloaded) -> Colocated | Offloaded:
    """Without what does not change the seconds of a batch."""
    plain = replace(system, batch_tokens=1, max_sequences=1, label="")
    return replace(plain, chunked_prefill=True) if isinstance(plain, Colocated) else plain
