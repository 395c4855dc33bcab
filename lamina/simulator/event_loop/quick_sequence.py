"""A request in a `QuickInstance`, and how many pages and tokens it takes."""

from __future__ import annotations

from lamina.simulator.costs.systems import PAGE_SIZE
from lamina.simulator.event_loop.lives import Life
from lamina.simulator.traces.arrivals import Arrival


class Sequence:
    """A request in the instance. `known` tokens are to be computed before it can sample; `computed` of them were when
    step `since` began, and one more in each step after it where it decodes."""

    __slots__ = ("computed", "ends", "known", "life", "number", "output", "preempted", "prompt", "since")

    def __init__(self, number: int, arrival: Arrival, life: Life) -> None:
        self.number, self.life = number, life
        self.prompt, self.output = arrival.prompt, arrival.output
        self.known = arrival.prompt
        self.computed = self.since = self.ends = 0
        self.preempted = False

    def at(self, step: int) -> int:
        """Tokens with KV when that step begins, if it decodes."""
        return self.computed + step - self.since


def pages_of(tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // PAGE_SIZE)


def limit_of(each: Sequence, left: int) -> int:
    """Tokens of its next row, where prompts have so many left of the batch."""
    ahead = each.known - each.computed
    return 1 if ahead == 1 else min(ahead, left)


def affordable(done: int, want: int, free: int) -> int:
    """How many of the next `want` tokens fit into the last page and the free ones."""
    return min(want, (pages_of(done) + free) * PAGE_SIZE - done)
