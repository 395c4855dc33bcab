"""How much of a batch each tenant gets while several have work. Pure: callers give the seconds of batches.

A batch ends for all of its rows together, so a tenant that asks for little waits for what the others put beside it.
While several tenants have work a batch takes at most `BESIDE` times as long as one of the tenant alone that asks for
least. Its tokens are dealt max-min fairly: each tenant gets an even share; what it does not need goes to the others.

A batch cannot be stopped, so whoever comes next waits for the one under way. While another tenant may come back, which
was there in the last `REMEMBERED` batches, a batch takes at most `BEFORE` times as long as one of a single token.
"""

from __future__ import annotations

from collections.abc import Mapping

BESIDE = 1.5
BEFORE = 2.0
REMEMBERED = 1024

_KNEE = 16  # tokens that take as long as a batch's fixed part, where nothing was measured near
_WEIGHT = 0.2  # of the newest measurement


class FairShare:
    """Deals the tokens of batches to tenants, and knows how long batches take."""

    def __init__(self) -> None:
        self._batches = 0
        self._seen: dict[str, int] = {}  # by tenant: the last batch for which it had work
        self._measured: dict[int, tuple[float, float]] = {}  # tokens and seconds of batches, by the tokens' bit length

    def took(self, tokens: int, seconds: float) -> None:
        """A batch of so many tokens took so many seconds."""
        measured = self._measured.get(tokens.bit_length(), (tokens, seconds))
        mean = [old + _WEIGHT * (new - old) for old, new in zip(measured, (tokens, seconds), strict=True)]
        self._measured[tokens.bit_length()] = mean[0], mean[1]

    def deal(self, wanted: Mapping[str, int], most: int) -> dict[str, int] | None:
        """How many of at most `most` tokens each tenant gets of what it wants, one or more; None where it is alone and
        has been for a while, so that it gets what it likes."""
        self._batches += 1
        self._seen |= dict.fromkeys(wanted, self._batches)
        self._seen = {each: at for each, at in self._seen.items() if at > self._batches - REMEMBERED}
        if len(self._seen) < 2 or not wanted:
            return None
        limit = BESIDE * self._seconds(min(wanted.values())) if len(wanted) > 1 else float("inf")
        if len(self._seen) > len(wanted):
            limit = min(limit, BEFORE * self._seconds(1))
        return even(wanted, self._within(limit, most))

    def _within(self, seconds: float, most: int) -> int:
        """How many tokens, of at most `most`, a batch can have that is to take so long."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._seconds(middle) <= seconds else (low, middle - 1)
        return low

    def _seconds(self, tokens: int) -> float:
        """How long a batch takes, by the measured ones that are nearest in size."""
        if not self._measured:
            return float(_KNEE + tokens)
        near = min(self._measured, key=lambda bits: (abs(bits - tokens.bit_length()), bits))
        mean, seconds = self._measured[near]
        return seconds * (_KNEE + tokens) / (_KNEE + mean)


def even(wanted: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` dealt max-min fairly: nobody gets more than it wants, and less only where nobody gets over one more.
    Everybody gets one, even where there are fewer."""
    dealt: dict[str, int] = {}
    for left, tenant in zip(range(len(wanted), 0, -1), sorted(wanted, key=lambda each: wanted[each]), strict=True):
        dealt[tenant] = max(1, min(wanted[tenant], total // left))
        total -= dealt[tenant]
    return dealt
