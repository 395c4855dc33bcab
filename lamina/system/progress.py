"""How progress is reported: by a call, and bars on stderr for Python programs. The command line draws its own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Progress = Callable[[str, int, int | None], None]
"""What is being done, how many bytes of it are done, and how many there are (None: unknown)."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """So much is done before an engine serves: the arguments of a `Progress`, as they cross to another process."""

    what: str
    done: int
    total: int | None


def watched() -> bool:
    """Whether somebody sees stderr as it is written: a terminal, or a notebook."""
    return sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)


class StderrBars:
    """A `Progress` that draws a bar on stderr for each thing that is done, and takes it away once it is full. May be
    called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        with self._lock:
            if total is not None and done >= total:
                if (full := self._bars.pop(what, None)) is not None:
                    full.close()
                return
            if (bar := self._bars.get(what)) is None:
                from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

                bar = self._bars[what] = tqdm(
                    desc=what, total=total, leave=False, unit="", unit_scale=True, file=sys.stderr
                )
            bar.total = total
            bar.update(done - bar.n)

    def close(self) -> None:
        """Take away the bars that are not full, after an error."""
        with self._lock:
            for bar in self._bars.values():
                bar.close()
            self._bars.clear()
