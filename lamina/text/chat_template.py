"""Renders a model's chat template in a child process that may be killed.

A template comes with the model, so it is not trusted. A sandbox keeps it from the interpreter's insides, but within
one process nothing stops `{{ 10 ** 10 ** 8 }}`. The child is kept between renderings: the first takes 0.1 s, later
ones a millisecond.
"""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.errors import InvalidRequest, ModelFileError
from lamina.system.child_process import module_command, start_child

_OPENING, _CLOSING = re.compile(r"\{[{%]"), re.compile(r"[%}]\}")
_STRING = re.compile(r"""'(?:[^'\\]|\\.)*(?:'|\\?\Z)|"(?:[^"\\]|\\.)*(?:"|\\?\Z)""", re.DOTALL)
_NAME = re.compile(r"(?<![.\w])[A-Za-z_]\w*", re.ASCII)  # not of an attribute


class ChatTemplate:
    """One template and the child process that renders it. Safe to use from several threads."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        blocks = [_CLOSING.split(part, maxsplit=1)[0] for part in _OPENING.split(source)[1:]]
        self._names = frozenset(name for block in blocks for name in _NAME.findall(_STRING.sub(" ", block)))

    def uses(self, variable: str) -> bool:
        """Whether the template's code has this name; else a variable of that name has no effect."""
        return variable in self._names

    def mentions(self, word: str) -> bool:
        """Whether the template contains the word anywhere."""
        return re.search(rf"\b{re.escape(word)}\b", self.source) is not None

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text that the template makes of `messages` and `variables`, all of which JSON can hold.

        Raises InvalidRequest where the template refuses the messages, ModelFileError where it is malformed, passes
        a limit (2 s, 512 MiB of memory, 4 Mi characters) or reaches for what the sandbox hides.
        """
        request = {"source": self.source, "variables": {"messages": list(messages), **variables}}
        with self._lock:
            answer = self._ask(request)
        match answer:
            case {"text": str(text)}:
                return text
            case {"refused": reason}:
                raise InvalidRequest(f"the model's chat template refuses these messages: {reason}")
            case {"broken": reason}:
                raise ModelFileError(f"the model's chat template cannot be rendered: {reason}")
        raise TypeError(f"no answer of the child process: {answer!r:.80}")

    def close(self) -> None:
        """End the child process. A later `render` starts another."""
        with self._lock:
            self._kill()

    def __del__(self) -> None:
        self._kill()

    def _ask(self, request: Mapping[str, Any]) -> Any:
        from lamina.text import chat_template_child  # loads Jinja, which only chats need

        if self._child is None:
            self._child = start_child(
                module_command(chat_template_child.__name__),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent
            )
        child = self._child
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("the child process has no pipes")
        try:
            chat_template_child.write_frame(child.stdin, request)
            return chat_template_child.read_frame(child.stdout)
        except (EOFError, OSError):
            status = child.wait()
            self._kill()
            why = (
                f"within {chat_template_child.TIME_LIMIT:g} s"
                if status == -signal.SIGALRM
                else f"well (status {status})"
            )
            raise ModelFileError(f"the model's chat template did not end {why}") from None
        except BaseException:  # interrupted between request and answer: the next request must not read this answer
            self._kill()
            raise

    def _kill(self) -> None:
        if (child := self._child) is not None:
            self._child = None
            child.kill()
            child.communicate()
