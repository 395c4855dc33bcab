"""A watch over asyncio's event loops: how long their callbacks compute. Run as a script, this is the HTTP process of
`lamina serve` under the watch, which writes what took too long to stderr.

It counts seconds of a processor of the loop's own thread, so that a busy machine fails nothing, without the garbage
that Python happens to collect there. uvloop's callbacks cannot be seen, so servers under the watch have asyncio's loop.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable

LONGEST = 0.05
"""Seconds of a processor that a callback may take."""
SLOW = "a callback of the event loop took"


class LoopWatch:
    """Calls `report` with a text for each callback that took too long. It cannot be undone."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._run = asyncio.Handle._run
        self._collecting = threading.local()
        gc.callbacks.append(self._collected)
        asyncio.Handle._run = lambda handle: self._watched(handle)  # type: ignore[method-assign]

    def _watched(self, handle: asyncio.Handle) -> None:
        self._collecting.seconds, begun = 0.0, time.thread_time()
        self._run(handle)
        seconds = time.thread_time() - begun - self._collecting.seconds
        if seconds > LONGEST:
            self._report(f"{SLOW} {seconds:.3f} s: {handle!r:.500}")

    def _collected(self, phase: str, _: object) -> None:
        if phase == "start":
            self._collecting.begun = time.thread_time()
        elif (begun := getattr(self._collecting, "begun", None)) is not None:
            self._collecting.seconds = getattr(self._collecting, "seconds", 0.0) + time.thread_time() - begun


_slow: defaultdict[int, list[str]] = defaultdict(list)  # by thread
_watches: list[LoopWatch] = []


def slow_callbacks(thread: threading.Thread) -> list[str]:
    """What took too long on a thread since it began, to be called before it begins and when it has ended."""
    if not _watches:
        _watches.append(LoopWatch(lambda text: _slow[threading.get_ident()].append(text)))
    return [] if thread.ident is None else _slow.pop(thread.ident, [])


def main() -> int:
    from lamina.server.processes import http_main

    sys.modules["uvloop"] = None  # type: ignore[assignment]  # it cannot be imported any more
    LoopWatch(lambda text: sys.stderr.write(f"{text}\n"))
    return http_main.main()


if __name__ == "__main__":
    sys.exit(main())
