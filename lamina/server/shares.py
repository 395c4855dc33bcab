"""How a server's room is dealt to its API keys: pure, without clocks or threads.

Half of the room is divided evenly among the keys: of its part, a key can always have as much as is left of it, whatever
the others hold. The other half goes to whoever comes first. A lone key can have everything.

Where room must be waited for, `turn` says in which order: start-time fair queueing (Goyal, Vin and Cheng, 1996). Among
keys that always ask for more, each gets the same; a key that asks for little is soon served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class KeyShares:
    """`capacity` units of something, dealt to `keys` keys. `own` units are reserved for each, `most` it can have."""

    def __init__(self, capacity: int, keys: int) -> None:
        keys = max(1, keys)
        self.capacity = capacity
        self.own = capacity if keys == 1 else capacity // (2 * keys)
        self.most = capacity if keys == 1 else max(1, capacity // 2 + self.own)
        self._open = capacity - self.own * keys  # units that any key may have
        self._units: Counter[str] = Counter()
        self._now = 0  # the turn that was served last
        self._next: dict[str, int] = {}  # the first turn that a key has not taken

    def held(self, key: str) -> int:
        """How many units a key has."""
        return self._units[key]

    def fits(self, key: str, units: int = 1) -> bool:
        """Whether a key can have so many units more now."""
        then = self._units[key] + units
        if then > self.most:
            return False
        beyond = sum(max(0, count - self.own) for other, count in self._units.items() if other != key)
        return then <= self.own or beyond + then - self.own <= self._open

    def take(self, key: str, units: int = 1) -> None:
        """A key has so many units more. Raises ValueError where they do not fit."""
        if not self.fits(key, units):
            raise ValueError(f"{units} more units do not fit beside {self._units[key]}, of {self.most} at most")
        self._units[key] += units

    def give(self, key: str, units: int = 1) -> None:
        """A key has so many units less. Once nobody has any, turns begin at 0 again."""
        self._units[key] -= units
        if not self._units[key]:
            del self._units[key]
        if not self._units:
            self._now = 0
            self._next.clear()

    @contextmanager
    def taken(self, key: str, units: int = 1) -> Iterator[None]:
        """A key has so many units more until the context ends. Raises ValueError where they do not fit."""
        self.take(key, units)
        try:
            yield
        finally:
            self.give(key, units)

    def turn(self, key: str, units: int = 1) -> int:
        """When it is the turn of so many units for a key: lower ones come first."""
        turn = max(self._now, self._next.get(key, 0))
        self._next[key] = turn + units
        return turn

    def served(self, turn: int) -> None:
        """A turn has come: keys that ask from now on are not put before it for what they did not ask earlier."""
        self._now = max(self._now, turn)
