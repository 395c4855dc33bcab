"""How a worker's process ends: at once when it has closed what it must, or with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End this process at once. The interpreter would take half a second to free torch's objects one by one, while
    threads of torch and gRPC still run."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader may be gone
            stream.flush()
    os._exit(status)


_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the system to kill this process, even a stopped one, when the parent's thread that started it ends. Only
    Linux can; elsewhere the closing of a pipe ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
