"""Traces in the two formats that are published: the Azure LLM inference trace's CSV, and Mooncake's JSON lines.

The first line decides which one a file has, not its name. Either may be packed by gzip. Any error is an InvalidRequest
that names the file, the line and the value. A request without prompt or output is wrong too: the published traces have
none, and to leave it out would change the load unseen.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from lamina.errors import InvalidRequest
from lamina.simulator.traces.arrivals import MAX_REQUESTS, Arrival, Trace, wrong_blocks, wrong_tokens

MAX_BYTES = 256 << 20
_GZIP = b"\x1f\x8b"
MAX_LINE = 1 << 20  # bytes; the names of the blocks of 2**24 tokens fit
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
FORMATS = f"a CSV file that begins with {HEADER} (Azure LLM inference trace) or one of JSON objects (Mooncake)"
_TIME = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:\+00:00)?", re.ASCII)
_EPOCH = datetime(1970, 1, 1)
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
_MAX_MILLISECONDS = 1 << 53
_Numbers = tuple[int | float, int, int, tuple[int, ...]]


def read(path: str | Path, name: str | None = None) -> Trace:
    """The trace in a file. Its times are seconds from its first request; `name` is the file's own unless given.

    Azure: a time with up to 9 digits of fraction, tokens of prompt and output. Mooncake: milliseconds, tokens, and one
    id for each 512 tokens of the prompt; other fields are ignored. Raises InvalidRequest.
    """
    try:
        lines = _lines(Path(path))
        number, first = next(lines, (1, ""))
        if first == HEADER:
            arrivals = _arrivals(lines, _azure, 1e9)
        elif first.startswith("{"):
            arrivals = _arrivals(chain([(number, first)], lines), _mooncake, 1e3)
        else:
            raise InvalidRequest(f"line {number} is {first!r:.80}; allowed is {FORMATS}")
        return Trace(
            Path(path).name.removesuffix(".gz").rpartition(".")[0] or Path(path).name if name is None else name,
            tuple(arrivals),
        )
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error}") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a NUL in the path
        raise InvalidRequest(f"{path} cannot be read: {error}") from error


def _arrivals(lines: Iterator[tuple[int, str]], parse: Callable[[str], _Numbers], unit: float) -> Iterator[Arrival]:
    start: int | float | None = None
    before: int | float = 0
    for count, (number, line) in enumerate(lines):
        try:
            if count == MAX_REQUESTS:
                raise InvalidRequest(f"is one request more than allowed; allowed are {MAX_REQUESTS}")
            time, prompt, output, blocks = parse(line)
            if start is None:
                start = before = time
            if time < before:
                raise InvalidRequest(f"has an earlier time than the one before: {line!r:.80}; allowed are rising times")
        except InvalidRequest as error:
            raise InvalidRequest(f"line {number} {error}") from error
        before = time
        yield Arrival((time - start) / unit, prompt, output, blocks)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number and text of each line that is not blank."""
    if not path.is_file():
        raise InvalidRequest("there is no such file" if not path.exists() else "it is no file")
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise InvalidRequest(f"it has {size} bytes; allowed are {MAX_BYTES}")
        packed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
        number = nbytes = 0
        while line := stream.readline(MAX_LINE + 1):
            number, nbytes = number + 1, nbytes + len(line)
            if len(line) > MAX_LINE or nbytes > MAX_BYTES:
                raise InvalidRequest(f"line {number} is too long; allowed are {MAX_LINE} bytes, and {MAX_BYTES} in all")
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at position {error.start}"
                raise InvalidRequest(f"line {number} is not UTF-8: {byte}") from error
            if number == 1:
                text = text.removeprefix("\ufeff")
            if text:
                yield number, text


def _azure(line: str) -> _Numbers:
    """Nanoseconds, tokens, and no blocks."""
    words = line.split(",")
    if len(words) != 3:
        raise InvalidRequest(f"has {len(words)} fields: {line!r:.80}; allowed are 3, {HEADER}")
    counts = []
    for name, word in zip(("ContextTokens", "GeneratedTokens"), words[1:], strict=True):
        count = int(word) if word.isascii() and word.isdecimal() and len(word) <= 20 else word
        if wrong := wrong_tokens(count):
            raise InvalidRequest(f"has a {name} that {wrong}")
        counts.append(int(count))
    return _nanoseconds(words[0]), counts[0], counts[1], ()


def _nanoseconds(word: str) -> int:
    """Since 1970. Whole numbers, as seconds in a float would lose the last digits."""
    try:
        if not (match := _TIME.fullmatch(word)):
            raise ValueError("it has another form")
        moment = datetime.fromisoformat(f"{match[1]} {match[2]}")
    except ValueError as error:  # also a 31st of June
        raise InvalidRequest(
            f"has the TIMESTAMP {word!r:.80}; allowed are such as 2023-11-16 18:15:46.6805900 ({error})"
        ) from error
    return (moment - _EPOCH) // timedelta(seconds=1) * 10**9 + int((match[3] or "").ljust(9, "0"))


def _mooncake(line: str) -> _Numbers:
    """Milliseconds, tokens, and the names of blocks."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"is not JSON: {line!r:.80} ({error})") from error
    if not isinstance(fields, dict):
        raise InvalidRequest(f"is {line!r:.80}; allowed is an object with {', '.join(_FIELDS)}")
    if missing := [name for name in _FIELDS if name not in fields]:
        raise InvalidRequest(f"has no {missing[0]}: {line!r:.80}; needed are {', '.join(_FIELDS)}")
    time, prompt, output, blocks = (fields[name] for name in _FIELDS)
    if type(time) not in (int, float) or not 0 <= time <= _MAX_MILLISECONDS:
        raise InvalidRequest(f"has the timestamp {time!r:.80}; allowed are milliseconds from 0 to {_MAX_MILLISECONDS}")
    for name, count in (("input_length", prompt), ("output_length", output)):
        if wrong := wrong_tokens(count):
            raise InvalidRequest(f"has an {name} that {wrong}")
    if not isinstance(blocks, list):
        raise InvalidRequest(f"has hash_ids that are {blocks!r:.80}; allowed is a list of whole numbers")
    if wrong := wrong_blocks(blocks, prompt):
        raise InvalidRequest(f"has hash_ids that {wrong}")
    return time, prompt, output, tuple(blocks)
