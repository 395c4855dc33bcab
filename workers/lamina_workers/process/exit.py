"""How a worker's process ends once all that must be closed was. Knows nothing of its work."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End this process at once: the interpreter would take half a second to free, object by object, what torch is made
    of, and threads of torch and gRPC may be anywhere meanwhile."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody may read them any more
            stream.flush()
    os._exit(status)


_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the system to kill this process once the parent's thread that started it has ended, whatever it is doing
    then, also while it is stopped. Where the system cannot (not Linux), the pipe that closes must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
