"""Log lines of a server's processes: time, level and process before the message, or a JSON object a line.

A line that is written while a request is answered has the request's id. A record may have `fields`, which JSON has
beside the message.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextvars import ContextVar

LEVELS = ("error", "warning", "info", "debug")
FORMATS = ("text", "json")
LEVEL_VARIABLE = "LAMINA_LOG_LEVEL"  # of the environment of a server's children
FORMAT_VARIABLE = "LAMINA_LOG_FORMAT"

request_id: ContextVar[str] = ContextVar("lamina_request_id", default="")
"""The id of the request that the running task answers; empty elsewhere."""


def configure(process: str, level: str | None = None, form: str | None = None) -> None:
    """Have Lamina's log lines from `level` on, and all warnings of libraries, written to stderr in the name of
    `process`. Level and format are those of the environment where none are given."""
    level = level or os.environ.get(LEVEL_VARIABLE, "info")
    form = form or os.environ.get(FORMAT_VARIABLE, "text")
    handler = logging.StreamHandler(sys.stderr)
    line = f"%(asctime)s.%(msecs)03d %(levelname)s {process}%(request)s: %(message)s"
    handler.setFormatter(_JsonLines(process) if form == "json" else _TextLines(line, "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("lamina").setLevel(level.upper())


class _TextLines(logging.Formatter):
    """`2026-12-02 20:41:07.123 INFO http [id]: message`, a line of printable letters: parts may be a client's."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.request = f" [{request_id.get()}]" if request_id.get() else ""
        record.message = "".join(letter if letter.isprintable() else " " for letter in record.message)
        return super().formatMessage(record)


class _JsonLines(logging.Formatter):
    """An object with time (UTC), level, process, request_id, message, the record's fields, and the traceback."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "request_id": request_id.get() or None,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
            "traceback": self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else None,
        }
        return json.dumps({name: value for name, value in line.items() if value is not None})
