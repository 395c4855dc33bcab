"""How a child process notices that its parent has died. Knows descriptors and the system; knows nothing of its work."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the system to kill this process once the parent's thread that started it has ended, whatever it is doing
    then, also while it is stopped. Where the system cannot (not Linux), the pipe that closes must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
