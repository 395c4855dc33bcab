"""Child processes: how each one starts (`start_child`), and those whose lines of output are read here and whose stdin
takes lines (`ChildProcess`).

A child imports nothing from the working folder, which may be a stranger's model, and gets no secret by its environment.
It ends when this process does, however this process dies: its stdin is a pipe that closes then. A Lamina child also
asks the system to kill it with the thread that started it, so one thread should start all children.

Forked processes are another matter. An engine's threads stay in the process that made it, so a forked child cannot use
the engine. `check_process` tells it so.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lamina.errors import EngineError

SPAWN = "multiprocessing.get_context('spawn')"


def check_process(process: int, what: str) -> None:
    """Raise EngineError in a process that was forked from the one that made `what`."""
    if process != os.getpid():
        raise EngineError(
            f"{what} was made in process {process}, and this is {os.getpid()}, forked from it, without its threads; "
            f"make an LLM after the fork, or use {SPAWN}"
        )


GRACE = 5.0  # seconds between closing a child's stdin and killing it
_MAX_LINE = 1 << 20  # characters; a longer line comes in parts
KEY_VARIABLE = "LAMINA_API_KEY"  # no child needs it: the HTTP process reads its keys from its first line of input
_MODULE = (  # `python -m` with -P, which Python 3.10 does not have: "" on the path is the working folder
    "import sys; sys.path[:] = filter(None, sys.path); del sys.argv[0]; "
    "import runpy; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *arguments: str) -> list[str]:
    """What runs a module as `python -m` does, except that nothing is imported from the working folder."""
    return [sys.executable, "-c", _MODULE, module, *arguments]


def start_child(
    command: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Start a process with this one's variables, without secrets, and those of `environment`. `options` are those of
    `Popen`. Raises OSError."""
    inherited = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    return subprocess.Popen(command, env=inherited | {"PYTHONSAFEPATH": "1"} | dict(environment or {}), **options)


class ChildProcess:
    """One process. `on_line` gets each line of its stdout, without the line break; `on_end` is called after the last
    one, once the process has ended. Both are called on a thread of the child's.

    `environment` adds variables. With `merge_stderr` the lines of its stderr come too; else its stderr is that of this
    process. Raises OSError where it cannot be started.
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
        merge_stderr: bool = False,
    ) -> None:
        self.name = name
        self._process: subprocess.Popen[str] = start_child(
            command,
            environment,
            pass_fds=pass_fds,
            stdin=subprocess.PIPE,  # closes when this process ends
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge_stderr else None,
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
        """How it ended, for people: "exit status 1", "killed by SIGKILL"."""
        code = self.status
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):  # a realtime signal has no name
                return f"killed by {signal.Signals(-code).name}"
            return f"killed by signal {-code}"
        return f"exit status {code}"

    def say(self, line: str) -> None:
        """Have a line written to its stdin; no effect once it has ended. Returns at once: a child may not read."""
        self._lines.put(line)

    def close_stdin(self) -> None:
        """Have its stdin closed, which ends a Lamina child as the death of this process would."""
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

    def terminate(self) -> None:
        """Send SIGTERM, on which a Lamina child ends in order."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def _follow(self, on_line: Callable[[ChildProcess, str], None], on_end: Callable[[ChildProcess], None]) -> None:
        stream = self._process.stdout
        if stream is not None:
            for line in iter(lambda: stream.readline(_MAX_LINE), ""):
                on_line(self, line.rstrip("\n"))
            stream.close()
        self._process.wait()
        self.close_stdin()
        on_end(self)

    def wait(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def end_all(children: Iterable[ChildProcess]) -> None:
    """End children: close their stdins, and kill what still runs after `GRACE` seconds for all together. All have ended
    when this returns."""
    ending = list(children)
    for child in ending:
        child.close_stdin()
    deadline = time.monotonic() + GRACE
    for child in ending:
        if not child.wait(max(0.0, deadline - time.monotonic())):  # stopped, or stuck
            child.kill()
            child.wait(GRACE)
