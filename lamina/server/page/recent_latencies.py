"""How long first and further tokens took lately, for the built-in page.

Stands in front of the observer that a server has, and tells it everything. Knows seconds; knows no engine and no HTTP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lamina.completions import Completion
from lamina.errors import LaminaError
from lamina.messages.engine_request import EngineRequest
from lamina.server.frontend import Observer

SECONDS = 30.0
"""What counts as lately."""

_MOST = 2048  # values of each kind that are kept


class RecentLatencies:
    """An observer that keeps the newest latencies. `clock` gives seconds and never goes back."""

    def __init__(self, behind: Observer, clock: Callable[[], float]) -> None:
        self._behind = behind
        self._clock = clock
        self._first: deque[tuple[float, float]] = deque(maxlen=_MOST)
        self._next: deque[tuple[float, float]] = deque(maxlen=_MOST)

    def first_token(self, seconds: float) -> None:
        self._first.append((self._clock(), seconds))
        self._behind.first_token(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        self._next.append((self._clock(), seconds / count))
        self._behind.next_tokens(seconds, count)

    def ended(self, request: EngineRequest, completion: Completion, seconds: float) -> None:
        self._behind.ended(request, completion, seconds)

    def failed(self, request: EngineRequest, error: LaminaError) -> None:
        self._behind.failed(request, error)

    def lately(self) -> tuple[list[float], list[float]]:
        """Seconds until first tokens, and a token between further ones, the oldest first."""
        since = self._clock() - SECONDS
        return _newer(self._first, since), _newer(self._next, since)


def _newer(values: deque[tuple[float, float]], since: float) -> list[float]:
    while values and values[0][0] < since:
        values.popleft()
    return [seconds for _, seconds in values]
