"""`lamina serve` with a plan, as a process of this one: started, found, ended."""

from __future__ import annotations

import re
import threading
from collections import deque
from pathlib import Path
from types import TracebackType

from lamina.errors import EngineError
from lamina.system.child_process import ChildProcess, module_command
from lamina.system.progress import Progress

_MODULE = "lamina.measure.bench.served_main"
PATIENCE = 600.0
"""Seconds for the model to load, a download included."""
_LAST = 8  # lines of its output that an error shows
_GRACE = 45.0  # seconds to end in order
_SERVING = re.compile(r"serving .* at (http://\S+)")


class Served:
    """A server on a free port of this host. Use it as a context manager. `url` is where it listens.

    Raises EngineError with its last words where it does not come up.
    """

    def __init__(self, plan: Path, progress: Progress | None = None, patience: float = PATIENCE) -> None:
        self.url = ""
        self._said: deque[str] = deque(maxlen=_LAST)
        self._known = threading.Event()
        if progress is not None:
            progress("starting the server", 0, None)
        command = module_command(_MODULE, "serve", "--plan", str(plan.absolute()), "--host", "127.0.0.1", "--port", "0")
        self._process = ChildProcess("serve", command, self._heard, lambda _: self._known.set(), merge_stderr=True)
        try:
            if not self._known.wait(patience) or not self.url:
                said = " | ".join(self._said)
                raise EngineError(f"lamina serve did not come up in {patience:g} s: {said:.1000}")
        except BaseException:
            self.close()
            raise
        if progress is not None:
            progress("starting the server", 1, 1)

    def close(self) -> None:
        """End it, requests under way included. Harmless the second time."""
        self._process.terminate()
        if not self._process.wait(_GRACE):
            self._process.kill()
            self._process.wait(_GRACE)

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _heard(self, _: ChildProcess, line: str) -> None:
        """On a thread of the child's."""
        self._said.append(line)
        if (found := _SERVING.search(line)) is not None:
            self.url = found[1]
            self._known.set()
