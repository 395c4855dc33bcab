"""Seconds of a system's batches, from few calls of its cost model: those between are interpolated.

A batch of n sequences in decode, which have c tokens of KV in all, and of q prompt tokens takes

    a(n) + b(n) (c - n C) + d(n + q) - d(n) + sum of e(p) over its prompt tokens

seconds, where C is the mean context: a is decode alone, b what a token of KV more takes, d the dense layers by tokens,
and e what a token of a prompt of p takes beside, to attend to those before it. a and d are exact at 1, 2, 3, 4, 6, 8,
12, ... sequences or tokens, and straight between. Tables are filled where they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lamina.simulator.costs.cost_model import Load
from lamina.simulator.costs.systems import Offloaded, System

LEVELS = 8
"""Ranges of sequences in decode: none, from 1, from 4, from 64, from 1024, ... b differs by range; so does d where
attention is elsewhere, as each may hide part of the other."""
_PLACES = 80
"""Places of a table with two values for each power of 2."""
_LENGTHS = 3
"""Prompts, from the shortest to the longest, whose attention is computed."""
_SOME = 16
"""Sequences in decode beside which it is computed too, where attention is elsewhere."""


class Batches:
    """The batches of one system, whose sequences have so much `context` in the mean. Without `prefill` prompts take no
    time.

    `steps` has a at 1, 1.5, 2, 3, 4, 6, ... sequences; `slopes` b by level; `dense` d by level at as many tokens (level
    0 alone unless it `hides` part of it; none without prefill). What is negative is not known yet.
    """

    def __init__(self, system: System, context: float, prefill: bool) -> None:
        self.system, self.context, self.prefill = system, context, prefill
        self.hides = isinstance(system, Offloaded)
        self._rotates = isinstance(system, Offloaded) and system.lanes > 1
        self._bare: dict[tuple[int, int], float] = {}
        self.steps = np.full(_PLACES, -1.0)
        self.slopes = np.full(LEVELS, -1.0)
        self.dense = np.full(((LEVELS if self.hides else 1) if prefill else 0, _PLACES), -1.0)

    def know(self, count: int) -> float:
        """a(n), of one sequence or more; b is known then, too."""
        alone = _known(self.steps, count, self._alone)
        level = level_of(count)
        if self.slopes[level] < 0:
            near = _first(level)
            longer = self.system.step(Load(near, 2 * self.context)).seconds
            self.slopes[level] = max(0.0, longer - self._alone(near)) / (near * self.context)
        return alone

    def reach(self, count: int, tokens: int) -> float:
        """d of so many tokens, `count` of them in decode."""
        level = level_of(count) if self.hides else 0
        near = _first(level)
        return _known(self.dense[level], tokens, lambda tokens: self._computed(near, tokens)) if tokens else 0.0

    def added(self, count: int, tokens: int) -> float:
        """d(n + q) - d(n): seconds that so many tokens of prompts add, without their past."""
        return max(0.0, self.reach(count, count + tokens) - self.reach(count, count)) if self.prefill else 0.0

    def past(self, lengths: NDArray[np.int64], most: int) -> NDArray[np.float64]:
        """e(p) of each of these prompts, which come in batches of up to `most` tokens: with none in decode, and beside
        some, in a row each."""
        found = np.zeros((2, len(lengths)))
        if not self.prefill:
            return found
        # Those whose past has no room beside the dense layers are another matter.
        for chosen in (lengths <= self.system.prompt_tokens, lengths > self.system.prompt_tokens):
            if chosen.any():
                some = lengths[chosen]
                anchors = np.unique(np.geomspace(some.min(), some.max(), _LENGTHS).round())
                for row, beside in enumerate((0, _SOME) if self._rotates else (0,)):
                    values = [self._past(round(each), most, beside) for each in anchors.tolist()]
                    found[row, chosen] = np.interp(some, anchors, values)
        if not self._rotates:
            found[1] = found[0]
        return found

    def _alone(self, count: int) -> float:
        return self.system.step(Load(count, self.context)).seconds

    def _computed(self, near: int, tokens: int) -> float:
        """d of so many tokens as if none of a prompt met another, `near` of them in decode, whose time is in it."""
        if tokens <= near:
            return self._alone(near) * tokens / near
        return self.system.step(Load(near, self.context if near else 0.0, tokens - near)).seconds

    def _past(self, length: int, most: int, beside: int) -> float:
        """e of a prompt, by the chunk in its middle."""
        chunk, context = min(length, most), self.context if beside else 0.0
        if (beside, chunk) not in self._bare:
            self._bare[beside, chunk] = self.system.step(Load(beside, context, chunk)).seconds
        before, within = (length - chunk) / 2, chunk * chunk / 2
        load = Load(beside, context, chunk, within + chunk * before, chunk + before, prompts=chunk / length)
        if length > self.system.prompt_tokens:  # what comes before has room where decode reads it alone
            load = Load(beside, context, chunk, within, chunk, chunk, chunk * before, chunk / length)
        return max(0.0, self.system.step(load).seconds - self._bare[beside, chunk]) / chunk


def level_of(count: int) -> int:
    """0 for none, 1 for up to 3, 2 for up to 63, 3 for up to 1023, and so on."""
    return (count.bit_length() + 5) // 4 if count else 0


def _first(level: int) -> int:
    """The fewest sequences of a level."""
    return max(1, 16 ** (level - 1) // 4) if level else 0


def _known(table: NDArray[np.float64], at: int, value: Callable[[int], float]) -> float:
    """The value at a count of 1 or more, straight between the next of 1, 2, 3, 4, 6, 8, 12, ... of the table, which
    has them from now on."""
    power = at.bit_length() - 1
    place, low, high = 2 * power, 1 << power, (1 << power) + (1 << power >> 1)
    if at >= high > low:
        place, low, high = place + 1, high, 2 << power
    following = place + 1
    if power == 0:
        high, following = 2, 2
    if table[place] < 0:
        table[place] = value(low)
    if at == low:
        return float(table[place])
    if table[following] < 0:
        table[following] = value(high)
    return float(table[place] + (table[following] - table[place]) * (at - low) / (high - low))
