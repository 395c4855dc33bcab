"""Says in the log when the head of a Ray cluster cannot be reached, which ends nothing at first.

Requests need no head: messages go from process to process. But Ray ends each process of its own after a while without
one, the program that is connected too, and says so in logs that nobody reads.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

logger = logging.getLogger("lamina")

LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # Ray's variable, of each node and of the program
_LIMIT_S = 60.0  # Ray's own default
_LOOK_S = 3.0


class HeadWatch:
    """Looks until `close`. `reach` raises OSError where the head at `address` does not answer; `clock` in seconds."""

    def __init__(
        self,
        address: str,
        reach: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        pause: float = _LOOK_S,
    ) -> None:
        self._address, self._reach, self._clock, self._pause = address, reach, clock, pause
        self._lost_at: float | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="lamina-ray-head", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self._pause):
            self.look()

    def look(self) -> None:
        """Ask once, and say what is new."""
        try:
            self._reach()
        except OSError as error:
            if self._lost_at is None:
                self._lost_at = self._clock()
                logger.error(
                    "Ray's head at %s does not answer (%s): requests go on, and nothing can be started or started "
                    "again. Without this head, or one with its state, Ray ends its processes after %s s, this program "
                    "too; %s says how long, where nodes and this program are started",
                    self._address, error, os.environ.get(LIMIT, f"{_LIMIT_S:g}"), LIMIT,
                )  # fmt: skip
            return
        if self._lost_at is not None:
            away = self._clock() - self._lost_at
            self._lost_at = None
            logger.warning("Ray's head at %s answers again, after %.0f s", self._address, away)
