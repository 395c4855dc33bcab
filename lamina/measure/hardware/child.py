"""A measuring process: started here, one line of JSON for each request and one for each answer.

Each is a process of its own, because OpenMP reads its settings once, keeps a team for each thread that ever computed,
and lets idle ones sleep where there are more than cores: two measurements in one process would disturb each other.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

from lamina.errors import EngineError
from lamina.system.child_process import module_command, start_child

_MODULE = "lamina.measure.hardware.children"
_GRACE = 15.0  # seconds to end in order, attention workers included
_TAIL = 2000  # bytes of a child's output that an error shows


class Child:
    """One process that measures. Use it as a context manager, or `close` it; it ends with this process, too.

    `kind` is one of `children`, with its `options`. Raises EngineError where it doesn't come up.
    """

    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        self._kind = kind
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        self._process: subprocess.Popen[str] = start_child(
            module_command(_MODULE, kind, json.dumps(options)),
            stdin=subprocess.PIPE,  # closes when this process ends, however it does: the child's sign to end
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
            start_new_session=True,  # Ctrl-C at the terminal is for this process, which ends its children
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, **arguments: Any) -> Any:
        """What the child measures, as plain data. Raises EngineError with its words where that fails."""
        if self._process.stdin is None:
            raise EngineError("a child without a pipe")
        try:
            self._process.stdin.write(json.dumps([what, arguments]) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        return self._answer()

    def close(self) -> None:
        """End it. Harmless the second time."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._output.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"measuring {self._kind}: {answer['error']}")
        return answer["result"]

    def _ended(self) -> EngineError:
        status = self._process.wait()
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _TAIL))
        words = self._output.read().decode(errors="replace").strip()
        return EngineError(f"the process that measures {self._kind} ended with status {status}: {words}")
