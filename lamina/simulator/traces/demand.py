"""What a trace asks for, as the few moments that a closed form needs. Pure arithmetic over the trace's requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lamina.errors import InvalidRequest
from lamina.simulator.traces.arrivals import Arrival, Trace

QUANTILES = 16
"""Equally likely prompt lengths that stand for all of them."""
PARTS = 6
"""Of a trace, one after another, with as many requests each."""
_MOMENT = 1e-6
"""Seconds in which all requests come at once."""
_FEWEST = 50
"""Requests of a part at least: fewer are chance."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Means over a trace's requests. Lengths are tokens, `rate` is requests a second (infinite: as many as are served).

    `context` is the mean number of tokens of KV that a sequence has while it decodes, over all that decode at a time:
    E[o (p + o / 2)] / E[o] for prompts p and outputs o, because a request is there for o steps and has p + o / 2 tokens
    in their mean. Where p and o are independent of each other and o is constant it is E[p] + E[o] / 2.
    Variations are variances over squared means; `gap_variation` that of the times between arrivals (1: Poisson).
    """

    name: str
    requests: int
    rate: float
    prompt: float
    output: float
    context: float
    prompt_variation: float
    output_variation: float
    gap_variation: float
    prompts: tuple[float, ...]
    """`QUANTILES` prompt lengths, by size."""
    longest: int
    """Prompt and output of the longest request."""
    parts: tuple[Demand, ...] = ()
    """The trace in pieces, one after another, since its load and lengths change; none where that would be chance."""
    relative: float = 1.0
    """Of a part: its rate over the whole's."""

    @property
    def prompt_pairs(self) -> float:
        """Query-key pairs of a prompt's prefill, in the mean: each token meets those before it, E[p^2] / 2."""
        return self.prompt**2 * (1 + self.prompt_variation) / 2

    def at_rate(self, rate: float) -> Demand:
        """The same lengths, so many requests a second. Raises InvalidRequest."""
        if not rate > 0:
            raise InvalidRequest(f"rate is {rate}; allowed is above 0 requests a second")
        return replace(self, rate=rate, parts=tuple(part.at_rate(rate * part.relative) for part in self.parts))

    def with_context(self, factor: float) -> Demand:
        """Prompts `factor` times as long, outputs as they are; the context grows by what the prompts do."""
        return replace(
            self,
            prompt=self.prompt * factor,
            context=self.context + self.prompt * (factor - 1) * self._prompt_weight,
            prompts=tuple(length * factor for length in self.prompts),
            longest=math.ceil(self.longest * max(1.0, factor)),
            parts=tuple(part.with_context(factor) for part in self.parts),
        )

    @property
    def _prompt_weight(self) -> float:
        """What `context` has of prompts, over the mean prompt: above 1 where long prompts have long outputs."""
        outputs = self.output * (1 + self.output_variation) / 2
        return max(0.0, self.context - outputs) / self.prompt


def demand(trace: Trace) -> Demand:
    """The moments of a trace, and of its parts. Raises InvalidRequest where it has no requests."""
    whole = _demand(trace.name, trace.arrivals)
    length = len(trace.arrivals) // PARTS
    if length < _FEWEST or math.isinf(whole.rate):
        return whole
    cut = [_demand(trace.name, trace.arrivals[part * length : (part + 1) * length]) for part in range(PARTS)]
    if any(math.isinf(part.rate) for part in cut):
        return whole
    mean = PARTS / sum(1 / part.rate for part in cut)  # equally many requests each
    relative = [part.rate / mean for part in cut]
    return replace(
        whole,
        parts=tuple(
            replace(part, rate=whole.rate * share, relative=share) for part, share in zip(cut, relative, strict=True)
        ),
    )


def _demand(name: str, arrivals: Sequence[Arrival]) -> Demand:
    if not arrivals:
        raise InvalidRequest(f"trace {name!r} has no requests; allowed is at least one")
    prompts = [float(each.prompt) for each in arrivals]
    outputs = [float(each.output) for each in arrivals]
    gaps = [later.at - earlier.at for earlier, later in pairwise(arrivals)]
    span = arrivals[-1].at - arrivals[0].at
    prompt, prompt_variation = mean_and_variation(prompts)
    output, output_variation = mean_and_variation(outputs)
    held = sum(o * (p + o / 2) for p, o in zip(prompts, outputs, strict=True))
    return Demand(
        name=name,
        requests=len(arrivals),
        rate=len(gaps) / span if span > _MOMENT else math.inf,
        prompt=prompt,
        output=output,
        context=held / sum(outputs),
        prompt_variation=prompt_variation,
        output_variation=output_variation,
        gap_variation=mean_and_variation(gaps)[1] if span > _MOMENT else 1.0,
        prompts=_quantiles(prompts),
        longest=max(each.prompt + each.output for each in arrivals),
    )


def _quantiles(lengths: Sequence[float]) -> tuple[float, ...]:
    """The middles of `QUANTILES` equal parts of the lengths by size."""
    ordered = sorted(lengths)
    return tuple(ordered[int((part + 0.5) / QUANTILES * len(ordered))] for part in range(QUANTILES))


def mean_and_variation(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the variance over its square (0 where that is 0)."""
    mean = sum(values) / len(values)
    return mean, sum((value / mean - 1) ** 2 for value in values) / len(values) if mean else 0.0
