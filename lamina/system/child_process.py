"""A child process of this one, on whose lines somebody listens. Knows processes; knows nothing of what is said.

A child ends when this process does, however that dies: its stdin is a pipe that closes then, and a child of ours asks
the system to kill it with the thread that started it, which is why one thread should start them all.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

GRACE = 5.0  # seconds between the polite end and the other one
_MAX_LINE = 1 << 20  # characters of a child's line that are looked at together


class ChildProcess:
    """One process. `on_line` gets each line it says, without the end, and then `on_end` is called once it has ended:
    both on a thread of the child's. Raises OSError where it cannot be started.

    What it says is its stdout, and with `hears_errors` its stderr too, which else is ours.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        on_line: Callable[[ChildProcess, str], None],
        on_end: Callable[[ChildProcess], None],
        *,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        hears_errors: bool = False,
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            pass_fds=pass_fds,
            env=environment,
            stdin=subprocess.PIPE,  # closes when this process ends
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if hears_errors else None,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C at the terminal is for this process, which ends its children in order
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, name=f"lamina-{name}-lines", daemon=True).start()
        threading.Thread(target=self._follow, args=(on_line, on_end), name=f"lamina-{name}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def how(self) -> str:
        """How it ended, for people."""
        code = self.status
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):  # a realtime signal has no name
                return f"killed by {signal.Signals(-code).name}"
            return f"killed by signal {-code}"
        return f"exit status {code}"

    def say(self, line: str) -> None:
        """Have a line written to its stdin; nothing where it is gone. Waits for nobody: a child may not read."""
        self._lines.put(line)

    def hush(self) -> None:
        """Have its stdin closed: to a child of ours that is as if this process had died, and it ends."""
        self._lines.put(None)

    def _write(self) -> None:
        """On a thread of its own."""
        stdin = self._process.stdin
        if stdin is None:
            return
        with contextlib.suppress(OSError, ValueError):  # it is gone
            while (line := self._lines.get()) is not None:
                stdin.write(line + "\n")
                stdin.flush()
        with contextlib.suppress(OSError, ValueError):
            stdin.close()

    def kill(self) -> None:
        self._process.kill()

    def _follow(self, on_line: Callable[[ChildProcess, str], None], on_end: Callable[[ChildProcess], None]) -> None:
        stream = self._process.stdout
        if stream is not None:
            for line in iter(lambda: stream.readline(_MAX_LINE), ""):
                on_line(self, line.rstrip("\n"))
            stream.close()
        self._process.wait()
        self.hush()
        on_end(self)

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def end_all(children: Iterable[ChildProcess], grace: float | None = None) -> None:
    """End children: politely, and after `grace` seconds (None: GRACE), for all together, otherwise. They are gone when
    this returns."""
    ending = list(children)
    for child in ending:
        child.hush()
    deadline = time.monotonic() + (GRACE if grace is None else grace)
    for child in ending:
        if not child.wait(max(0.0, deadline - time.monotonic())):  # stopped, or stuck
            child.kill()
            child.wait(GRACE)
