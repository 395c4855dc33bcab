"""Best against best: each way to serve a model, optimised alone under the same budget and inventory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System
from lamina.simulator.planning.planner import Ranked
from lamina.simulator.planning.ties import RATIO_ERROR, advantage

TOGETHER, PREFILL, SPLIT, BOTH = "co-located", "disaggregated prefill", "attention offloaded", "both"
KINDS = (TOGETHER, PREFILL, SPLIT, BOTH)
"""Everything on the same devices; prompts on others; attention on others; prompts and attention on others."""


def kind(system: System) -> str:
    """Which of `KINDS` a system is."""
    if isinstance(system, Disaggregated):
        return PREFILL if isinstance(system.decode, Colocated) else BOTH
    return SPLIT if isinstance(system, Offloaded) else TOGETHER


def best_of_kinds(
    ranked: Sequence[Ranked], verified: Callable[[Sequence[Ranked]], Sequence[Ranked]]
) -> dict[str, Ranked]:
    """The best of each kind that gets a request through, in the order of `KINDS`. `verified` runs the best of some
    candidates, which come in their order by formula, and returns what it ran, the best first."""
    found: dict[str, Ranked] = {}
    for name in KINDS:
        if mine := [each for each in ranked if kind(each.candidate.system) == name and each.estimate.goodput]:
            found[name] = (verified(mine) or mine)[0]
    return found


def split_pays(best: Mapping[str, Ranked]) -> str:
    """The sentence that says whether moving attention to other devices pays, and by how much."""
    whole = [best[name] for name in (TOGETHER, PREFILL) if name in best]
    split = [best[name] for name in (SPLIT, BOTH) if name in best]
    if not split:
        return "The split does not pay: nothing that offloads attention gets a request through within the SLO."
    if not whole:
        return f"The split pays: only what offloads attention gets requests through, such as {split[0].name}."
    mine, theirs = _first(split), _first(whole)
    gain = advantage(mine, theirs)
    said = f"the best split, {mine.name}, gives {_times(gain)} of the best without, {theirs.name}"
    if mine.serves != theirs.serves:
        able = "the best split serves all that is asked for, and nothing without does"
        unable = "nothing that offloads attention serves all that is asked for, and the best without does"
        return f"The split pays: {able}." if mine.serves else f"The split does not pay: {unable}."
    if gain > 1 + RATIO_ERROR:
        return f"The split pays: {said}."
    if gain >= 1 / (1 + RATIO_ERROR):
        return f"The split does not pay: {said}, a tie within the error of such a comparison ({RATIO_ERROR:.0%})."
    return f"The split does not pay: {said}."


def _first(some: Sequence[Ranked]) -> Ranked:
    """What serves all before what does not, then by what it gives."""
    first = some[0]
    for each in some[1:]:
        if (each.serves, advantage(each, first)) > (first.serves, 1.0):
            first = each
    return first


def _times(gain: float) -> str:
    return "requests for nothing, instead" if math.isinf(gain) else f"{gain:.2f} times the requests for a dollar"
