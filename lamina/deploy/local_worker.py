"""One worker as a child process of this one, with the last lines of its output."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from lamina.deploy.supervision import Worker
from lamina.system.child_process import ChildProcess

logger = logging.getLogger("lamina")

_MAX_LINE = 4096  # characters of a line that are kept
_LAST_LINES = 12  # lines that an error shows


class LocalWorker(Worker):
    """A child process that runs `command`. Raises OSError where it cannot be started.

    `takes(worker, line)` says whether a line was a message for the supervisor; all other lines are logged and, the
    last of them, kept. `on_end(worker)` comes after the last line. Both are called on a thread of the child's.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        on_end: Callable[[LocalWorker], None],
        *,
        takes: Callable[[LocalWorker, str], bool] = lambda worker, line: False,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        deadline: float | None = None,
    ) -> None:
        super().__init__(deadline=deadline)
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._takes = takes
        self.process = ChildProcess(
            name, command, self._hear, lambda _: on_end(self), pass_fds=pass_fds, environment=environment,
            merge_stderr=True,
        )  # fmt: skip
        self.pid = self.process.pid

    def _hear(self, process: ChildProcess, line: str) -> None:
        line = line[:_MAX_LINE].rstrip()
        if not self._takes(self, line):
            self.last_lines.append(line)
            logger.info("%s: %s", process.name, line)
