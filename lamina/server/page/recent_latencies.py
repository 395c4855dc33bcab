"""The recent latencies of first and further tokens, for the built-in page."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lamina.completions import Completion
from lamina.errors import LaminaError
from lamina.messages.engine_request import EngineRequest
from lamina.server.frontend import Observer

SECONDS = 30.0
"""The age up to which a latency counts as recent."""

_MOST = 2048  # values kept of each kind


class RecentLatencies:
    """An observer that keeps the newest latencies, and passes every call on to the observer `behind` it. `clock` is
    monotonic, in seconds."""

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
        """The seconds until first tokens, and the seconds per further token; the oldest first."""
        since = self._clock() - SECONDS
        return _newer(self._first, since), _newer(self._next, since)


def _newer(values: deque[tuple[float, float]], since: float) -> list[float]:
    while values and values[0][0] < since:
        values.popleft()
    return [seconds for _, seconds in values]
