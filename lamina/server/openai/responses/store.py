"""Keeps responses in memory, so that a conversation can go on by `previous_response_id`: for a while, within bounds of
number and bytes, each for the API key that made it. They are kept as JSON, so their bytes are those that they take.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MAX_RESPONSES = 4096  # of all keys together
MAX_BYTES = 64 << 20  # of all keys together, in memory
MAX_AGE = 24 * 3600.0  # seconds since a response was last used
MAX_TURNS = 1024  # of one conversation
MAX_HISTORY = 8 << 20  # bytes of one conversation, which becomes objects of several times that for its next turn
_LONGEST_ID = 128  # characters of an item's


@dataclass(eq=False, slots=True)
class StoredResponse:
    """A response as it stands, in JSON: the list of its own `input`, the items of its `output`, and the object without
    these (`head`). `end` ends it while it is under way, and is None afterwards."""

    id: str
    input: str
    previous: str | None
    head: str
    output: Sequence[str] = ()
    status: str = "in_progress"
    end: Callable[[], None] | None = None
    size: int = 0
    used: float = 0.0

    @property
    def response(self) -> str:
        """The response object."""
        return with_output(self.head, self.output)

    @property
    def items(self) -> list[str]:
        """What the next turn reads: the list of the input, and one of the output."""
        return [self.input, f"[{','.join(self.output)}]"]


def with_output(head: str, output: Sequence[str]) -> str:
    """A response object as JSON, from one without its output and the items of that."""
    return f'{head[:-1]},"output":[{",".join(output)}]}}'


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
        stored.size = sum(map(len, (stored.input, stored.head, *stored.output))) + 1024  # ASCII: a byte a character
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
        next_id: str | None = response_id
        while next_id is not None and len(turns) < MAX_TURNS:
            stored = self.get(key, next_id)
            if stored is None:
                return None
            turns.append(stored)
            next_id = stored.previous
        return turns[::-1]

    def of(self, key: str) -> Mapping[str, StoredResponse]:
        """The responses of a key by their ids, as they stand now."""
        return dict(self._stored.get(key, ()))


def item(stored: Mapping[str, StoredResponse], item_id: str) -> str | None:
    """An item of a response's output, as JSON, by its id, which ends with that of its response and its place."""
    response_id, _, index = item_id[:_LONGEST_ID].partition("_")[2].partition("_")
    response = stored.get(f"resp_{response_id}")
    if response is None or not index.isdecimal() or int(index) >= len(response.output):
        return None
    return response.output[int(index)]
