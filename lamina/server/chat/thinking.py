"""What a request asks of a model's reasoning, and the variables of its chat template that switch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lamina.errors import InvalidRequest, cut
from lamina.server.http.errors import refused
from lamina.text.messages import EFFORT, SWITCHES

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
MAX_BUDGET = 2**31 - 1  # tokens

_ITS_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high"}  # of gpt-oss, which knows low, medium and high
_BUDGETS = {"minimal": 512, "low": 2048}  # tokens, where the template has no word for the effort


def read_effort(name: str, given: object) -> str | None:
    """An unchecked value of a field that has an effort; "max" is the highest. Raises ApiError."""
    word = EFFORTS[-1] if given == "max" else given
    known_effort = next((effort for effort in EFFORTS if effort == word), None)
    if known_effort is None and given is not None:
        raise refused(name, given, f"one of {', '.join(EFFORTS)} and max")
    return known_effort


@dataclass(frozen=True, slots=True)
class Thinking:
    """What a request asks of the reasoning. A model without reasoning ignores it.

    `enabled`: whether the model reasons; None is as its template does by itself. `effort` is one of EFFORTS. `budget`
    is how many tokens of reasoning there may be; then it is closed, and the answer begins.
    """

    enabled: bool | None = None
    effort: str | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.effort is not None and self.effort not in EFFORTS:
            raise InvalidRequest(f"reasoning_effort is {cut(self.effort)}; allowed are {', '.join(EFFORTS)}")
        is_count = self.budget is None or (type(self.budget) is int and 0 <= self.budget <= MAX_BUDGET)
        if not is_count:
            raise InvalidRequest(f"the budget of thinking is {cut(self.budget)}; allowed are 0 to {MAX_BUDGET} tokens")

    @property
    def is_off(self) -> bool:
        """Whether the model is asked not to reason."""
        return self.enabled is False or (self.enabled is None and self.effort == "none")

    def variables(self, uses: Callable[[str], bool]) -> dict[str, Any]:
        """The variables that switch a template; `uses` tells whether it reads one."""
        variables: dict[str, Any] = {}
        if self.enabled is not None or self.effort is not None:
            variables |= {name: not self.is_off for name in SWITCHES if uses(name)}
        if uses(EFFORT) and (effort := "none" if self.is_off else self.effort) is not None:
            variables[EFFORT] = _ITS_EFFORTS.get(effort, effort)
        return variables

    def tokens(self, uses: Callable[[str], bool]) -> int | None:
        """How many tokens of reasoning there may be; None is any number."""
        if self.is_off:
            return None if any(map(uses, SWITCHES)) else 0
        budget = None if self.effort is None or uses(EFFORT) else _BUDGETS.get(self.effort)
        return min((limit for limit in (self.budget, budget) if limit is not None), default=None)
