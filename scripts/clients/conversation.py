"""What every scripted conversation is made of: steps that must not fail, and a count of those that did."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
QUESTION = "What is the weather in Paris? Use the tool."


class Conversation:
    """The steps of one client. `address` is the server's, without /v1."""

    def __init__(self, package: str) -> None:
        if len(sys.argv) != 3:
            sys.exit(f"usage: {sys.argv[0]} http://127.0.0.1:8000 MODEL")
        self.address, self.model = sys.argv[1].rstrip("/"), sys.argv[2]
        self._package = package
        self._steps = self._failed = 0

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[..., None]]:
        """One step; what it is given is printed. An exception is a protocol error: the client did not understand."""
        began = time.monotonic()
        said: list[object] = []
        self._steps += 1
        try:
            yield lambda *values: said.extend(values)
        except Exception:  # noqa: BLE001  # whatever a client raises is the finding
            self._failed += 1
            traceback.print_exc()
        print(f"  {name}: {' '.join(map(str, said))[:100]!r}, {time.monotonic() - began:.1f} s", flush=True)

    def end(self) -> None:
        """Print the sum, and leave with status 1 where a step failed."""
        print(f"{self._package} {version(self._package)}: {self._steps} steps, {self._failed} errors")
        sys.exit(bool(self._failed))


def expect(true: object, what: str) -> None:
    """Raise ValueError where something is not as the protocol says."""
    if not true:
        raise ValueError(what)
