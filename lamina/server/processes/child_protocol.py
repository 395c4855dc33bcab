"""What a server's children and their supervisor say to each other: one JSON array a line, its first item a word.

A child hears on stdin and says on what was its stdout; anything that prints there goes to stderr instead. Knows lines;
knows nothing of what is said.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from lamina_workers.process.exit import die_with_parent

LOG_LEVEL = "LAMINA_LOG_LEVEL"  # the variable that says from which level on children log
LEVELS = ("error", "warning", "info", "debug")


class Mouth:
    """A child's way to its supervisor. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, word: str, *items: Any) -> None:
        with self._lock:
            try:
                self._out.write(line(word, *items) + "\n")
                self._out.flush()
            except (OSError, ValueError):  # the supervisor is gone, and this process about to go
                pass


def begin(name: str) -> tuple[Mouth, Iterator[list[Any]]]:
    """Make this process a child of the supervisor's: it ends with it, leaves signals to it, and logs to stderr, each
    line after `name`. The way to the supervisor, and what that says."""
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a signal to all processes of a service is the supervisor's to answer
    level = os.environ.get(LOG_LEVEL, "warning").upper()
    logging.basicConfig(level=level, format=f"{name}: %(message)s", stream=sys.stderr)
    return Mouth(), hear()


def line(word: str, *items: Any) -> str:
    """What is said, as a line."""
    return json.dumps([word, *items])


def parse(text: str) -> list[Any] | None:
    """What a line says; None where it says nothing of ours."""
    try:
        said = json.loads(text)
    except ValueError:
        return None
    return said if isinstance(said, list) and said and isinstance(said[0], str) else None


def hear() -> Iterator[list[Any]]:
    """What the supervisor says, until it is gone."""
    for text in sys.stdin:
        if (said := parse(text)) is not None:
            yield said
