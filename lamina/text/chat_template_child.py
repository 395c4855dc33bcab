"""The child process of `chat_template`: reads a template and its variables, answers with text, and limits itself.

Frames on stdin and stdout are 8 bytes of little-endian length, then JSON. The system kills this process when a
rendering passes the time limit, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import IO, Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TIME_LIMIT = 2.0  # seconds for one rendering
MEMORY_LIMIT = 512 << 20  # bytes of address space
OUTPUT_LIMIT = 4 << 20  # characters


class Refused(Exception):
    """The template called `raise_exception`: it does not accept these messages."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, where access to a hidden attribute is an error instead of an empty text."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}, which is not allowed")


class GenerationBlocks(Extension):
    """`{% generation %}` marks the assistant's text, for training. Rendering passes its content through."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(source: str, variables: Mapping[str, Any]) -> dict[str, str]:
    """`{"text": ...}`, `{"refused": ...}` with the template's reason, or `{"broken": ...}` with its error."""
    pieces, length = [], 0
    try:
        for piece in compile_template(source).generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > OUTPUT_LIMIT:
                return {"broken": f"it writes more than {OUTPUT_LIMIT} characters"}
    except Refused as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"broken": f"it needs more than {MEMORY_LIMIT >> 20} MiB of memory"}
    except Exception as error:  # noqa: BLE001 - a template can raise anything, and all of it is the template's fault
        return {"broken": f"{type(error).__name__}: {error}"}
    return {"text": "".join(pieces)}


@lru_cache(maxsize=4)
def compile_template(source: str) -> jinja2.Template:
    """The template with the globals, filters and whitespace rules that transformers gives chat templates."""
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox.from_string(source)


def _refuse(reason: str) -> NoReturn:
    raise Refused(reason)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def read_frame(stream: IO[bytes]) -> Any:
    """The JSON value of the next frame. EOFError where the stream ends."""
    length = int.from_bytes(_read(stream, 8), "little")
    return json.loads(_read(stream, length))


def write_frame(stream: IO[bytes], value: Any) -> None:
    """Write a JSON value as one frame."""
    data = json.dumps(value).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _read(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError(f"the stream ended after {len(data)} of {count} bytes")
    return data


def main() -> None:
    """Answer frames until stdin ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default kills, even within one long operation
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # not every system limits address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request = read_frame(sys.stdin.buffer)
            signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
            answer = render(request["source"], request["variables"])
            signal.setitimer(signal.ITIMER_REAL, 0)
            write_frame(sys.stdout.buffer, answer)


if __name__ == "__main__":
    main()
