"""How a worker's process ends: at once when it has closed what it must, or with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
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


def follow_parent(end: Callable[[], object], pipe: int = 0) -> None:
    """Call `end`, on a thread, when the pipe closes, which it does however the parent dies. The kernel's signal also
    ends a process that is stopped; it comes when the parent's thread that started this one ends."""
    die_with_parent()

    def read() -> None:
        try:
            while os.read(pipe, 4096):
                pass
        except OSError:
            pass  # as good as closed
        end()

    threading.Thread(target=read, name="lamina-parent", daemon=True).start()
