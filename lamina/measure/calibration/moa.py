"""`moa`: windows that grow with the context, by a rule for each head (MoA, arXiv 2406.14909, section 4).

A rule (alpha, beta) gives a window of alpha + beta * N tokens at length N. One plan has to be good at several lengths,
and keep no more than a share of the KV at any of them: an integer program with one choice for each head. Lengths are
objectives that contend, so there is a front of plans none of which is better at all lengths. As in the paper it is
found by optimising for one length while the others are bounded; HiGHS solves the programs, through scipy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from lamina.errors import PolicyError
from lamina.measure.calibration.scores import Scores
from lamina.measure.calibration.windows import Choices
from lamina.policy_file import kept as kept_tokens
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import Policy
from lamina_workers.policies.span import BLOCK, Span

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
    found: dict[tuple[int, ...], Policy] = {}
    for alpha, beta in product(alphas, _BETAS):
        windows = [int(alpha + beta * length) for length in lengths]
        if windows[0] >= BLOCK and windows[-1] < longest:
            kept = tuple(map(min, lengths, (BLOCK + window for window in windows)))
            found.setdefault(kept, Span(alpha, beta))
    return [*found.values(), Full()]


def kept_shares(rules: Sequence[Policy], lengths: Sequence[int]) -> Shares:
    """The share of the KV that each rule keeps, `[lengths, rules]`."""
    return np.array([[kept_tokens(str(rule), length) / length for rule in rules] for length in lengths])


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
    found = {plan.tobytes(): plan for plan in alone if plan is not None}
    for bounds in product(*np.linspace(low, high, _BOUNDS + 2)[1:-1, :-1].T):
        plan = program.solve(lengths - 1, dict(enumerate(bounds)))
        if plan is not None:
            found[plan.tobytes()] = plan
    plans = list(found.values())
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
        kept = shares[:, self._rules] / count
        self._always = [self._constraint(one_each, 1, 1), self._constraint(kept, -np.inf, density)]

    def objectives(self, plan: Choices) -> Scores:
        """What a plan changes at each length, scaled, `[lengths]`."""
        chosen: Scores = self._influence[:, plan, np.arange(len(plan))].sum(1)
        return chosen

    def solve(self, length: int, bounds: dict[int, float]) -> Choices | None:
        """The plan, int64 `[heads]`, that changes least at one length, where what it changes at others is within
        `bounds`; None where there is none."""
        held = [self._constraint(self._costs[[other]], -np.inf, most) for other, most in bounds.items()]
        found = self._milp(
            self._costs[length],
            integrality=np.ones(len(self._heads)),
            bounds=(0, 1),
            constraints=[*self._always, *held],
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
        if found.x is None:
            return None
        plan: Choices = self._rules[found.x > 0.5]  # by head, as the variables are
        return plan


def _undominated(influence: Scores, shares: Shares) -> npt.NDArray[np.bool_]:
    """Of each head, `[heads, rules]`, the rules for which no other is as good and keeps as little at all lengths; of
    equal ones the first."""
    rules, heads = influence.shape[1:]
    both = np.concatenate([influence, np.broadcast_to(shares[:, :, None], influence.shape)])
    alive = np.ones((heads, rules), bool)
    for rule in range(rules):
        no_worse = (both <= both[:, [rule]]).all(0)
        equal = (both == both[:, [rule]]).all(0)
        equal[:rule] = False  # an earlier one that is equal beats this one
        alive[:, rule] = ~(no_worse & ~equal).any(0)
    return alive
