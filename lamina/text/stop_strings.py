"""Finds stop strings in text that arrives in pieces.

The text ends at the stop string that is complete first; of several complete at the same character, the longest
counts. So the result does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class StopMatcher:
    """Watches one sample's text. `stops`: none of them empty; `include` shows the stop string itself too.

    Holds back no more than the longest end of the text that may still become a stop string. That end is all that must
    be known of the text so far: it only loses characters at its beginning, each once, so a text costs at most two
    searches a character, however many stop strings there are.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(sorted(stops))
        self._firsts = frozenset(stop[0] for stop in stops)
        self._include = include
        self._pending = ""
        self.stop: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; what may be shown now, and whether a stop string ended it. Once it has, push no more."""
        if not self._pending and self._firsts.isdisjoint(text):
            return text, False  # the common case
        old_length = len(self._pending)
        text = self._pending + text
        begin = 0  # of the end that may become a stop string
        for end in range(old_length + 1, len(text) + 1):
            while begin < end and not self._begins(text[begin:end]):
                begin += 1
            if text.endswith(self._stops, begin, end):
                self.stop = max((stop for stop in self._stops if text.endswith(stop, begin, end)), key=len)
                self._pending = ""
                return text[: end if self._include else end - len(self.stop)], True
        self._pending = text[begin:]
        return text[:begin], False

    def finish(self) -> str:
        """The text ends here: what was held back."""
        pending, self._pending = self._pending, ""
        return pending

    def _begins(self, text: str) -> bool:
        """Whether one of the stop strings begins with the text: the first that is not less than it does, if any."""
        place = bisect_left(self._stops, text)
        return place < len(self._stops) and self._stops[place].startswith(text)
