"""Which candidates are equally good, within the error of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lamina.simulator.planning.planner import Ranked, mixes

RATIO_ERROR = 0.10
"""How far a ratio of two systems' throughput is off. Of 252 pairs of measured cells on H100 and H200 (the public sample
of ai-dynamo/aiconfigurator, commit 095f58a51) that differ in their tensor parallel size alone, half are within 9.7 %,
and of 11 that differ in the device alone 90 % within 8.5 %. AFD-Ledger (arXiv 2608.04502) states 6.6 to 9.6 %."""


def lossless(ranked: Ranked) -> bool:
    """Whether attention sees all KV: no policy leaves any out."""
    policy = ranked.candidate.system.policy
    return policy.read == policy.held == 1 and policy.window is None


def handicap(ranked: Ranked) -> float:
    """How many times better than others a candidate has to be: one that loses something, by what errors are."""
    return 1.0 if lossless(ranked) else 1 + RATIO_ERROR


def advantage(one: Ranked, other: Ranked) -> float:
    """How many times the requests for a dollar that `one` gives, of those of `other`. Where both are free: of the
    requests a second that they could take. 0 where only the other is free."""
    if one.estimate.price and other.estimate.price:
        mine, theirs = one.goodput_per_dollar, other.goodput_per_dollar
    elif one.estimate.price or other.estimate.price:
        return 0.0 if one.estimate.price else math.inf
    else:
        mine, theirs = one.estimate.capacity, other.estimate.capacity
    return mine / theirs if theirs else math.inf


def tied(one: Ranked, other: Ranked) -> bool:
    """Whether the two differ by no more than the error of such a comparison: both serve all, or neither does."""
    if one.serves != other.serves:
        return False
    return 1 / (1 + RATIO_ERROR) <= advantage(one, other) <= 1 + RATIO_ERROR


def near_ties(ranked: Sequence[Ranked]) -> tuple[Ranked, ...]:
    """The mixes that are tied with the first: those that lose nothing before those with a lossy policy, each by what
    they give for a dollar. Where the first was checked by the event loop they are, too."""
    first = ranked[0]
    found = [
        each
        for each in mixes(ranked)
        if each is not first and tied(each, first) and (first.result is None or each.result is not None)
    ]
    return tuple(sorted(found, key=lambda each: not lossless(each)))  # sorting keeps the order among equals
