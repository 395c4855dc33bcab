"""Keeps responses in memory, so that a conversation can go on by `previous_response_id`: for a while, within bounds of
number and bytes, each for the API key that made it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from sys import getsizeof
from typing import Any

MAX_RESPONSES = 4096  # of all keys together
MAX_BYTES = 64 << 20  # of all keys together, in memory
MAX_AGE = 24 * 3600.0  # seconds since a response was last used
MAX_TURNS = 1024  # of one conversation
_LONGEST_ID = 128  # characters of an item's


@dataclass(eq=False, slots=True)
class StoredResponse:
    """A response with the items of its own input. `response` is the object as it stands; `end` ends it while it is
    under way, and is None afterwards."""

    id: str
    input: Sequence[dict[str, Any]]
    previous: str | None
    response: dict[str, Any]
    end: Callable[[], None] | None = None
    size: int = 0
    used: float = 0.0
    turns: int = field(default=1)


class ResponseStore:
    """The responses of `keys` API keys, each with an even share of the bounds. What a key used longest ago goes first.

    A conversation is as long as all of its turns are there: using one counts as using those before it.
    """

    def __init__(self, keys: int, clock: Callable[[], float] = time.monotonic) -> None:
        keys = max(1, keys)
        self.most = max(1, MAX_RESPONSES // keys)
        self.most_bytes = MAX_BYTES // keys
        self._clock = clock
        self._stored: dict[str, OrderedDict[str, StoredResponse]] = {}  # by key, the least recently used first
        self._bytes: dict[str, int] = {}

    def put(self, key: str, stored: StoredResponse) -> None:
        """Keep a response, or what has become of it. One that is too large by itself is not kept."""
        self.drop(key, stored.id)
        stored.size = memory([stored.input, stored.response]) + 1024
        if stored.size > self.most_bytes:
            return
        of_key = self._stored.setdefault(key, OrderedDict())
        of_key[stored.id] = stored
        self._bytes[key] = self._bytes.get(key, 0) + stored.size
        stored.used = self._clock()
        while len(of_key) > self.most or self._bytes[key] > self.most_bytes:
            self.drop(key, next(iter(of_key)))

    def get(self, key: str, response_id: str) -> StoredResponse | None:
        """A response of a key; None where there is none, or no more."""
        of_key = self._stored.get(key, OrderedDict())
        now = self._clock()
        while of_key and next(iter(of_key.values())).used < now - MAX_AGE:
            self.drop(key, next(iter(of_key)))
        stored = of_key.get(response_id)
        if stored is not None:
            stored.used = now
            of_key.move_to_end(response_id)
        return stored

    def drop(self, key: str, response_id: str) -> bool:
        """Forget a response. False where there is none."""
        of_key = self._stored.get(key)
        stored = None if of_key is None else of_key.pop(response_id, None)
        if of_key is None or stored is None:
            return False
        self._bytes[key] -= stored.size
        if not of_key:
            del self._stored[key], self._bytes[key]
        return True

    def conversation(self, key: str, response_id: str) -> list[StoredResponse] | None:
        """A response and those before it, the first one first; None where one of them is missing."""
        turns: list[StoredResponse] = []
        wanted: str | None = response_id
        while wanted is not None and len(turns) < MAX_TURNS:
            stored = self.get(key, wanted)
            if stored is None:
                return None
            turns.append(stored)
            wanted = stored.previous
        return turns[::-1]

    def item(self, key: str, item_id: str) -> dict[str, Any] | None:
        """An item of a response's output by its id, which holds that of its response."""
        _, _, rest = item_id[:_LONGEST_ID].partition("_")
        of_key, response_id = self._stored.get(key), f"resp_{rest.partition('_')[0]}"
        if of_key is None or (stored := of_key.get(response_id)) is None:
            return None
        return next((item for item in stored.response["output"] if item["id"] == item_id), None)


def memory(value: Any) -> int:
    """About how many bytes a JSON value takes as Python's objects, up to 25 times what it takes as text."""
    total, rest = 0, [value]
    while rest:
        each = rest.pop()
        total += getsizeof(each) + 8
        if isinstance(each, dict):
            rest += each.values()
            rest += each
        elif isinstance(each, list | tuple):
            rest += each
    return total
