"""The methods of calibration: which evidence each one needs, and which policies it tries, by what they keep
(`method_of`).

    windows    a window of its own for each head, by all evidence
    streaming  one size of window or full, by DuoAttention's gates alone
    razor      echo and induction heads stay full, the others have a window and a mean (RazorAttention)
    moa        a window that grows with the context, by a rule for each head (MoA)

`windows` searches greedily: it widens the window that gives most for the tokens it costs. Steps along each head's
convex hull are optimal for every budget that they end at, and nearly so between. There is one length and one budget, so
it needs no integer program.

`moa` follows MoA (arXiv 2406.14909, section 4). A rule (alpha, beta) gives a window of alpha + beta * N tokens at
length N. One plan has to be good at several lengths, and keep no more than a share of the KV at any of them: an integer
program with one choice for each head. Lengths are objectives that contend, so there is a front of plans none of which
is better at all lengths (`front`). As in the paper it is found by optimising for one length while the others are
bounded. HiGHS solves the programs, through scipy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lamina.errors import InvalidRequest, PolicyError
from lamina.measure.calibration.evidence import Evidence
from lamina.measure.calibration.scores import Rung, Scores
from lamina.policy_file import Heads, kept
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import Policy
from lamina_workers.policies.razor import Razor
from lamina_workers.policies.span import BLOCK, Span
from lamina_workers.policies.streaming import Streaming

GRID = 40  # candidates, at most, between nothing and everything
_FRACTIONS = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of the context
_UNIT = 32  # tokens that windows are multiples of: a page

Choices = npt.NDArray[np.int64]


ECHO = 0.01  # of the KV heads, those with the most echo stay full (RazorAttention, arXiv 2407.15891, section 3.3)
INDUCTION = 0.14  # and those with the most induction
_DENSITIES = 24  # of MoA's programs, between the least and everything
_PLANS = 3  # of a front that are measured, until one is good enough


@dataclass(frozen=True, slots=True)
class Method(ABC):
    """One method at a context in tokens. `sink` and `recent` are the sizes of windows, where they are fixed."""

    needs: ClassVar[frozenset[str]]  # fields of Evidence
    in_decode: ClassVar[bool] = False  # whether its policies let go in decode alone, where they must be measured

    context: int
    sink: int
    recent: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Where influence and quality are measured, ascending."""
        return (self.context,)

    @property
    @abstractmethod
    def options(self) -> list[Policy]:
        """What a head may be, whose influence is measured; or what it may be instead of full."""

    @abstractmethod
    def rungs(self, evidence: Evidence) -> list[Rung]:
        """Candidates in order of what they keep; the last is full everywhere."""


class Windows(Method):
    """Windows are widened where that gives most for what it costs."""

    needs = frozenset({"echo", "induction", "mean_attention", "alpha", "influence"})

    @property
    def options(self) -> list[Policy]:
        return window_options(self.context, self.sink)

    def rungs(self, evidence: Evidence) -> list[Rung]:
        candidates = window_candidates(self.options, evidence.influence[0], evidence.combined(), self.context)
        return _one_each(candidates)


class Gated(Method):
    """The heads with the least alpha are streaming, the others full: from all of them to none."""

    needs = frozenset({"alpha"})

    @property
    def options(self) -> list[Policy]:
        return [Streaming(self.sink, self.recent)]

    def rungs(self, evidence: Evidence) -> list[Rung]:
        order = np.argsort(evidence.alpha, axis=None, kind="stable")
        counts = sorted({round(len(order) * step / GRID) for step in range(GRID + 1)}, reverse=True)
        every = [*self.options, Full()]
        return _one_each([_with_full(evidence.alpha.shape, order[count:], every) for count in counts])


class Retrieving(Method):
    """Full are 1 % of the KV heads by echo and 14 % by induction, as published; then more by induction."""

    needs = frozenset({"echo", "induction"})
    in_decode = True

    @property
    def options(self) -> list[Policy]:
        return [Razor(self.sink, self.recent)]

    def rungs(self, evidence: Evidence) -> list[Rung]:
        by_echo, by_induction = (
            np.argsort(-scores, axis=None, kind="stable") for scores in (evidence.echo, evidence.induction)
        )
        total = len(by_echo)
        least, echoing = max(1, round(INDUCTION * total)), by_echo[: max(1, round(ECHO * total))]
        counts = sorted({*(round(total * step / GRID) for step in range(GRID + 1)), least, total})
        every = [*self.options, Full()]
        return _one_each(
            [
                _with_full(evidence.echo.shape, np.union1d(echoing, by_induction[:count]), every)
                for count in counts
                if count >= least
            ]
        )


class Growing(Method):
    """Plans of rules, of the integer programs at one density after the other."""

    needs = frozenset({"influence"})

    @property
    def lengths(self) -> tuple[int, ...]:
        return moa_lengths(self.context)

    @property
    def options(self) -> list[Policy]:
        return moa_rules(self.lengths)

    def rungs(self, evidence: Evidence) -> list[Rung]:
        every = self.options
        shares = kept_shares(every, self.lengths)
        least = float(shares.max(0).min())

        def plans(density: float) -> list[Heads]:
            return [policies(plan, every) for plan in front(evidence.influence, shares, density)[:_PLANS]]

        full: Heads = ((str(Full()),) * evidence.influence.shape[3],) * evidence.influence.shape[2]
        densities = np.linspace(least, 1, _DENSITIES + 1)[1:-1]
        return [*(partial(plans, float(density)) for density in densities), lambda: [full]]


METHODS: dict[str, type[Method]] = {"windows": Windows, "streaming": Gated, "razor": Retrieving, "moa": Growing}


def method_of(name: str) -> type[Method]:
    """The method of that name. Raises InvalidRequest, and PolicyError where its solver is missing."""
    if name not in METHODS:
        raise InvalidRequest(f"method is {name!r:.40}; allowed are {', '.join(METHODS)}")
    if METHODS[name] is Growing:
        check_solver()
    return METHODS[name]


def _with_full(shape: tuple[int, ...], full: npt.NDArray[np.int64], every: Sequence[Policy]) -> Heads:
    """The second of `every` for the heads of these numbers, the first for the others."""
    choices = np.zeros(math.prod(shape), np.int64)
    choices[full] = 1
    return policies(choices.reshape(shape), every)


def _one_each(candidates: Sequence[Heads]) -> list[Rung]:
    def rung(heads: Heads) -> list[Heads]:
        return [heads]

    return [partial(rung, heads) for heads in candidates]


def window_options(context: int, sink: int) -> list[Policy]:
    """What a head may be instead of full, cheapest first: `sink` tokens and the last ones, a part of `context`."""
    sizes = sorted({max(_UNIT, round(context * fraction / _UNIT) * _UNIT) for fraction in _FRACTIONS})
    return [Streaming(sink, size) for size in sizes]


def window_candidates(allowed: Sequence[Policy], influence: Scores, combined: Scores, context: int) -> list[Heads]:
    """Policies for all heads, in order of what they keep at `context` tokens; the last is full everywhere.

    `influence` `[len(allowed), layers, kv_heads]` is what each option would change; `combined` `[layers, kv_heads]`,
    from 0 to 1, says what else speaks for seeing everything. It tilts the influence by a factor of 0.5 to 1.5:
    influence is measured at a few hundred tokens, and says little of heads that those did not need.
    """
    every = [*allowed, Full()]
    tilted = np.concatenate([influence * (0.5 + combined), np.zeros((1, *combined.shape))])
    all_plans = plans(tilted, [kept(str(policy), context) for policy in every])
    chosen: list[Heads] = []
    share = -1.0
    for plan in all_plans:
        if plan.share >= share + 1 / GRID or plan is all_plans[-1]:
            share = plan.share
            chosen.append(policies(plan.choices, every))
    return chosen


@dataclass(frozen=True, slots=True)
class Plan:
    """Which of the options each head takes, int64 `[layers, kv_heads]`, and the share of the KV that this keeps."""

    choices: Choices
    share: float


def plans(influence: Scores, costs: Sequence[int]) -> list[Plan]:
    """Every plan on the way from the cheapest option for all heads to the dearest, in that order.

    `influence` `[options, layers, kv_heads]`, least for the last option; `costs` ascending, in tokens kept.
    """
    options, layers, heads = influence.shape
    if len(costs) != options or any(low >= high for low, high in pairwise(costs)):
        raise ValueError(f"costs are {list(costs)}; allowed are {options}, ascending")
    flat = influence.reshape(options, -1)
    steps = []  # (how much a token is worth, head, from, to)
    for head in range(layers * heads):
        hull = _hull(flat[:, head], costs)
        for low, high in pairwise(hull):
            worth = (flat[low, head] - flat[high, head]) / (costs[high] - costs[low])
            steps.append((worth, head, high))
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    choices = np.zeros(layers * heads, np.int64)
    path = [_plan(choices, costs, (layers, heads))]
    for _, head, high in steps:
        choices[head] = high
        path.append(_plan(choices, costs, (layers, heads)))
    return path


def _hull(influence: Scores, costs: Sequence[int]) -> list[int]:
    """The options on the lower convex hull of influence over cost, the first and the last with them: each step along it
    is worth less a token than the one before."""
    hull: list[int] = []
    for option in range(len(costs)):
        while len(hull) > 1 and _worth(influence, costs, *hull[-2:]) <= _worth(influence, costs, hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _worth(influence: Scores, costs: Sequence[int], low: int, high: int) -> float:
    return float((influence[low] - influence[high]) / (costs[high] - costs[low]))


def _plan(choices: Choices, costs: Sequence[int], shape: tuple[int, int]) -> Plan:
    tokens = np.array(costs)[choices].sum()
    return Plan(choices.reshape(shape).copy(), float(tokens / (costs[-1] * len(choices))))


def policies(choices: Choices, options: Sequence[Policy]) -> Heads:
    """What the choices mean, as a policy file has it."""
    return tuple(tuple(str(options[choice]) for choice in layer) for layer in choices)


NO_SOLVER = "the integer program of MoA needs scipy; install it with: pip install scipy"
LEAST_LENGTH = 1536  # tokens: shorter ones have no room for passkeys and their questions
_BETAS = (0.0, 1 / 32, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
_BOUNDS = 2  # on the objective of each length but the longest, evenly from the best possible
_GAP = 0.01  # from the optimum, where HiGHS may stop: the numbers are estimates
_SECONDS = 5.0  # that HiGHS may take for one program

Shares = npt.NDArray[np.float64]


def check_solver() -> None:
    """Raise PolicyError without scipy: found out before minutes of measuring."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise PolicyError(NO_SOLVER) from error


def moa_lengths(context: int) -> tuple[int, ...]:
    """The lengths that a plan is made for, ascending: a quarter of the context, half of it, and all."""
    return tuple(sorted({min(context, max(LEAST_LENGTH, context // part)) for part in (4, 2, 1)}))


def moa_rules(lengths: Sequence[int]) -> list[Policy]:
    """What a head may be at lengths that ascend: rules whose windows are a block or more at the shortest length, and
    within the longest. The last is full. Of rules that say the same at all lengths there is one."""
    shortest, longest = lengths[0], lengths[-1]
    alphas = [-shortest // 2, 0, *sorted({BLOCK, *(shortest // part for part in (16, 8, 4, 2, 1)), longest // 2})]
    rules: dict[tuple[int, ...], Policy] = {}
    for alpha, beta in product(alphas, _BETAS):
        windows = [int(alpha + beta * length) for length in lengths]
        if windows[0] >= BLOCK and windows[-1] < longest:
            tokens = tuple(map(min, lengths, (BLOCK + window for window in windows)))
            rules.setdefault(tokens, Span(alpha, beta))
    return [*rules.values(), Full()]


def kept_shares(rules: Sequence[Policy], lengths: Sequence[int]) -> Shares:
    """The share of the KV that each rule keeps, `[lengths, rules]`."""
    return np.array([[kept(str(rule), length) / length for rule in rules] for length in lengths])


def front(influence: Scores, shares: Shares, density: float) -> list[Choices]:
    """Plans that keep at most `density` of the KV at each length, none of them worse than another at all lengths: int64
    `[layers, kv_heads]`, by the largest of their objectives, each counted from 0, the best possible, to 1.

    `influence` `[lengths, rules, layers, kv_heads]`, `shares` `[lengths, rules]`. Empty where no plan keeps so little.
    """
    lengths, rules, *shape = influence.shape
    program = _Program(influence.reshape(lengths, rules, -1), shares, density)
    alone = [program.solve(length, {}) for length in range(lengths)]
    ends = np.array([program.objectives(plan) for plan in alone if plan is not None])
    if len(ends) < lengths:
        return []
    low, high = ends.min(0), ends.max(0)
    by_content = {plan.tobytes(): plan for plan in alone if plan is not None}
    for bounds in product(*np.linspace(low, high, _BOUNDS + 2)[1:-1, :-1].T):
        plan = program.solve(lengths - 1, dict(enumerate(bounds)))
        if plan is not None:
            by_content[plan.tobytes()] = plan
    plans = list(by_content.values())
    values = np.array([program.objectives(plan) for plan in plans])
    worse = (values[:, None] <= values[None]).all(2) & (values[:, None] < values[None]).any(2)  # the first, than this
    scaled = ((values - low) / np.maximum(high - low, 1e-12)).max(1)
    best = sorted(np.flatnonzero(~worse.any(0)), key=lambda number: (scaled[number], number))
    return [plans[number].reshape(shape) for number in best]


class _Program:
    """x[h, r] is 1 where head h takes rule r: each head takes one, all together keep no more than `density`.

    `influence` `[lengths, rules, heads]`. Objectives are scaled, as influence lies anywhere from 1e-6 nats on. Rules
    that another beats for a head at all lengths, in influence and in what it keeps, have no variable there.
    """

    def __init__(self, influence: Scores, shares: Shares, density: float) -> None:
        from scipy import optimize, sparse

        self._milp: Any = optimize.milp
        self._constraint: Any = optimize.LinearConstraint
        self._influence = influence / np.maximum(influence.max(1).sum(1), 1e-30)[:, None, None]
        self._heads, self._rules = np.nonzero(_undominated(influence, shares))
        self._costs = self._influence[:, self._rules, self._heads]
        count = influence.shape[2]
        one_each = sparse.csr_array((np.ones(len(self._heads)), (self._heads, np.arange(len(self._heads)))))
        kv_share = shares[:, self._rules] / count
        self._always = [self._constraint(one_each, 1, 1), self._constraint(kv_share, -np.inf, density)]

    def objectives(self, plan: Choices) -> Scores:
        """What a plan changes at each length, scaled, `[lengths]`."""
        chosen: Scores = self._influence[:, plan, np.arange(len(plan))].sum(1)
        return chosen

    def solve(self, length: int, bounds: dict[int, float]) -> Choices | None:
        """The plan, int64 `[heads]`, that changes least at one length, where what it changes at others is within
        `bounds`; None where there is none."""
        constraints = [self._constraint(self._costs[[other]], -np.inf, limit) for other, limit in bounds.items()]
        solution = self._milp(
            self._costs[length],
            integrality=np.ones(len(self._heads)),
            bounds=(0, 1),
            constraints=[*self._always, *constraints],
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
        if solution.x is None:
            return None
        plan: Choices = self._rules[solution.x > 0.5]  # by head, as the variables are
        return plan


def _undominated(influence: Scores, shares: Shares) -> npt.NDArray[np.bool_]:
    """Of each head, `[heads, rules]`, the rules for which no other is as good and keeps as little at all lengths; of
    equal ones the first."""
    rules, heads = influence.shape[1:]
    measures = np.concatenate([influence, np.broadcast_to(shares[:, :, None], influence.shape)])
    alive = np.ones((heads, rules), bool)
    for rule in range(rules):
        no_worse = (measures <= measures[:, [rule]]).all(0)
        equal = (measures == measures[:, [rule]]).all(0)
        equal[:rule] = False  # an earlier one that is equal beats this one
        alive[:, rule] = ~(no_worse & ~equal).any(0)
    return alive
