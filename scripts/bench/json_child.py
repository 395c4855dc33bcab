"""A process that is asked by lines of JSON and answers each with one line, as benchmarks measure engines."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from cpu_time import go_first


class JsonChild:
    """The parent's side. `name` is said where the process has ended, which raises SystemExit; what it says besides goes
    to the file `log`. `first`: it goes before other processes of this machine, as root can have it on Linux."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: str = os.devnull,
        environment: Mapping[str, str] | None = None,
        first: bool = False,
    ) -> None:
        with open(log, "a") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=first,
            )
        self.pid = self._process.pid
        self._name, self._first = name, first
        if first:
            go_first(self.pid)

    def ask(self, question: Any) -> str:
        """The answer's line."""
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self.line()

    def ready(self) -> None:
        """Wait for the line that says that it is."""
        self.line()
        if self._first:
            go_first(self.pid)  # what it has started may have sessions of its own

    def line(self) -> str:
        """The next line that it prints."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"{self._name} ended with status {self._process.wait()}")
        return line

    def close(self) -> None:
        """Let it end, and what it has started."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
