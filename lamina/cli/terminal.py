"""What a person sees while waiting, and how text comes in: progress bars on stderr, prompts from files and stdin."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lamina.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


QUIET = 2.0  # seconds that nobody minds to wait without a word
_BETWEEN = 5.0  # seconds between two lines of progress
MOST_BYTES = 64 << 20
"""Of one text that is read whole."""


def write_line(text: str) -> None:
    """A line to stderr, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class ProgressBars:
    """A `progress(what, done, total)` callable that draws one bar for each `what` on stderr, if that is a terminal.
    Elsewhere `lines` gets a line when `what` changes and every few seconds, from `quiet` seconds after the start on.

    May be called from any thread. A bar goes when it is full; `hide()` takes all away, so that text can be written, and
    the next report brings them back.
    """

    def __init__(self, lines: Callable[[str], None] = write_line, quiet: float = QUIET) -> None:
        self._lines, self._last_line, self._loud_at = lines, ("", 0.0), time.monotonic() + quiet
        self._lock = threading.Lock()
        self._enabled = sys.stderr.isatty()
        self._display: Progress | None = None
        self._bars: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if not self._enabled:
            self._say(what, done, total)
            return
        with self._lock:
            if total is not None and done >= total:
                self._remove(what)
            else:
                self._draw(what, done, total)

    def hide(self) -> None:
        with self._lock:
            self._stop()

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_: object) -> None:
        self.hide()

    def _say(self, what: str, done: int, total: int | None) -> None:
        with self._lock:
            before, time_before = self._last_line
            now, full = time.monotonic(), total is not None and done >= total
            if what == before and now < time_before + _BETWEEN and not full:
                return
            if now < self._loud_at or (what != before and full):  # over at once: nobody waited
                return
            self._last_line = what, now
        self._lines(f"{what}: {done} of {total}" if total else what)

    def _draw(self, what: str, done: int, total: int | None) -> None:
        if self._display is None:
            self._display = _new_display()
            self._display.start()
        if what not in self._bars:
            self._bars[what] = self._display.add_task(what, total=total)
        self._display.update(self._bars[what], completed=done, total=total)

    def _remove(self, what: str) -> None:
        if self._display is not None and what in self._bars:
            self._display.remove_task(self._bars.pop(what))
            if not self._bars:
                self._stop()

    def _stop(self) -> None:
        if self._display is not None:
            self._display.stop()
        self._display = None
        self._bars.clear()


def _new_display() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),  # it moves where a step takes long; what remains is not known then
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # rich would send what is printed to stdout to this console, which is stderr
        redirect_stderr=False,
    )


def write(text: str, progress: ProgressBars) -> None:
    """Text to stdout at once, with the bars out of its way."""
    if text:
        progress.hide()
        sys.stdout.write(text)
        sys.stdout.flush()


def print_json(*objects: object) -> None:
    """One object a line."""
    for item in objects:
        sys.stdout.write(json.dumps(item) + "\n")


def print_rows(rows: Iterable[tuple[str, ...]]) -> None:
    """Columns as wide as they must be, the last as long as it is. At a terminal that is narrower the widest column is
    folded."""
    table = list(rows)
    if sys.stdout.isatty():
        _print_folded(table)
        return
    widths = [max(map(len, column)) for column in zip(*table, strict=True)][:-1]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
        sys.stdout.write("  ".join(cells) + "\n")


def _print_folded(table: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for width in widths:
        grid.add_column(overflow="fold", no_wrap=width < max(widths))
    for row in table:
        grid.add_row(*map(Text, row))
    Console().print(grid)


def show_bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def decode(data: bytes, source: str, offset: int = 0) -> str:
    """`data` as text, which must be UTF-8. `source` and `offset` (bytes before `data`) are for the error alone."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at position {offset + error.start}"
        ) from error


def decode_argument(argument: str) -> str:
    """A word of the command line; Python smuggles bytes that are not UTF-8 through it as lone surrogates."""
    return decode(os.fsencode(argument), "a prompt on the command line")


def read_all(path: str) -> str:
    """The text of a UTF-8 file, or of stdin for "-", up to `MOST_BYTES`. Raises InvalidRequest."""
    source = "stdin" if path == "-" else path
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path!r}: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise InvalidRequest(f"{source} has more than {MOST_BYTES} bytes; allowed are so many")
    return decode(data, source)


def read_lines(path: str) -> list[str]:
    """The lines of a UTF-8 file, or of stdin for "-", without their ends. Only LF and CR LF end a line."""
    if path == "-":
        return list(iter_lines(sys.stdin.buffer, "stdin"))
    try:
        with Path(path).open("rb") as file:
            return list(iter_lines(file, path))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path!r}: {error.strerror}") from error


def iter_lines(file: BinaryIO, source: str) -> Iterator[str]:
    """Lines as they come; fails at the first one that is not UTF-8, with the byte's position in the file."""
    offset = 0
    for line in file:
        yield decode(line.removesuffix(b"\n").removesuffix(b"\r"), source, offset)
        offset += len(line)


def close_stdout() -> None:
    """After its reader has gone: what Python still holds for stdout goes nowhere, instead of failing again at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
