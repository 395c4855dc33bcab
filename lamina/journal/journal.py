"""The journal of an engine: a file that outlives its process, so that another can go on where it ended.

Records are appended, one write a batch. They are not flushed to the disk: they survive the death of the process, not of
the machine. Each record is its length, a checksum of that, a checksum of the content, and the content in msgpack. An
incomplete last write is cut; damage anywhere else is an error. `records` has the records, `history` their meaning.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import msgpack

from lamina.errors import JournalError, LaminaError
from lamina.journal.history import History, Record, RequestRecord, from_plain, to_plain
from lamina.system.private_folder import check_own, lock
from lamina_protocols.channels.control import package_version

logger = logging.getLogger("lamina")

FORMAT = 3
MAX_RECORD = 1 << 28  # bytes
NAME = "journal"
_MAGIC = b"lamina journal\r\n"  # a transfer that changes line ends is noticed
_HEAD = struct.Struct("<III")  # length, its checksum, the content's checksum
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_GROWN = 8 << 20  # bytes up to which the file is not written anew
_FACTOR = 4  # times its size when it was last written anew, up to which it is not either


@dataclass(frozen=True, slots=True)
class Facts:
    """What KV depends on: another engine can go on only where these are equal."""

    model: str
    page_size: int
    kv_dtype: str
    layers: int
    policies: str = "full"
    rope_scaling: str = "none"


class FileCalls(Protocol):
    """The calls by which a journal changes files: those of the module `os`, with its errors."""

    def open(self, path: Path, flags: int, mode: int = ..., /) -> int: ...
    def write(self, file: int, data: memoryview, /) -> int: ...
    def rename(self, old: Path, new: Path, /) -> None: ...
    def ftruncate(self, file: int, length: int, /) -> None: ...


class Run(NamedTuple):
    """An engine over all its starts: its id, 32 hexadecimal digits, and the number of starts so far."""

    engine: str
    starts: int


class Journal:
    """One engine's journal in `folder`, which no other process can open meanwhile. `history` is its state, `engine` the
    id by which attention workers know the engine, `starts` how often it was opened. `run` gives both, where the engine
    had another journal before. `calls` change the files.

    Raises JournalError where the folder cannot be used, is in use or is one that others may write to, or the journal is
    damaged or of another engine. On a full disk a journal that was there before is read, and is off.
    """

    def __init__(self, folder: str | Path, facts: Facts, run: Run | None = None, calls: FileCalls = os) -> None:
        self._calls = calls
        self._folder = Path(folder)
        self._path = self._folder / NAME
        self._facts = facts
        self._buffer: list[bytes] = []
        self._file: int | None = None
        self.size = self._compact_at = 0  # bytes
        self.history = History()
        self.engine, self.starts = run or Run(secrets.token_hex(16), 0)
        self._lock: int | None = None
        try:
            self._lock = lock(self._folder)
            if self._path.exists():
                self._read()
            self.starts += 1
            self._begin()
        except OSError as error:
            self.close()
            raise JournalError(f"the journal {self._path} cannot be used: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def on(self) -> bool:
        """Whether it still records: not closed, and no write has failed."""
        return self._file is not None

    def append(self, record: Record) -> None:
        """Add one record. The history has it at once; `commit` writes it."""
        self.history.apply(record)
        if self._file is None:
            return
        try:
            self._buffer.append(_packed(to_plain(record)))
        except (TypeError, ValueError, OverflowError) as error:
            self._give_up(f"a record cannot be written: {error}")

    def commit(self) -> None:
        """Write all added records in one call. Where that fails the journal ends, and the engine goes on without it."""
        if not self._buffer or self._file is None:
            return
        data = b"".join(self._buffer)
        self._buffer.clear()
        try:
            self._write(self._file, data)
            self.size += len(data)
            if self.size > self._compact_at:
                self._write_anew()
        except OSError as error:
            self._give_up(str(error))

    def close(self) -> None:
        """Write what was added, and release the folder. Harmless when it is closed already."""
        self.commit()
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _begin(self) -> None:
        """Write the file anew. Where the disk has no room for that the journal is off, and the header is written over
        the old one: the next engine has the id by which attention workers keep KV for it. Raises OSError."""
        try:
            self._write_anew()
        except OSError as error:
            if error.errno not in _NO_ROOM or not self._path.exists():
                raise
            self._file = self._calls.open(self._path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._write(self._file, _MAGIC + self._header())
            self._give_up(str(error))

    def _give_up(self, why: str) -> None:
        """Log the error and stop. The file would soon be out of date, so only its header stays: attention workers know
        the engine by the id in it."""
        logger.error("the journal %s is off, so an engine that dies is not gone on from: %s", self._path, why)
        self._buffer.clear()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._calls.ftruncate(self._file, len(_MAGIC) + len(self._header()))
            os.close(self._file)
            self._file = None

    def _header(self) -> bytes:
        return _packed(("journal", FORMAT, package_version(), asdict(self._facts), self.engine, f"{self.starts:010d}"))

    def _write_anew(self) -> None:
        """Replace the file by one with the fewest records that give the same state."""
        fresh = self._path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        file = self._calls.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            size = self._write(file, _MAGIC + self._header())
            for record in self.history.records():
                size += self._write(file, _packed(to_plain(record)))
            self._calls.rename(fresh, self._path)
        except BaseException:
            os.close(file)
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
        if self._file is not None:
            os.close(self._file)
        self._file, self.size = file, size
        self._compact_at = max(_GROWN, _FACTOR * size)

    def _write(self, file: int, data: bytes) -> int:
        view = memoryview(data)
        while view:
            view = view[self._calls.write(file, view) :]
        return len(data)

    def _read(self) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # the last: a pipe is not waited for
        with os.fdopen(os.open(self._path, flags), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise OSError("it is no regular file")
            check_own(facts)
            records = _records(file, self._path)
            first = next(records, None)
            if first is None:  # its first write was cut
                return
            offset, header = first
            self._check(header, offset)
            for offset, plain in records:
                try:
                    record = from_plain(plain)
                    if isinstance(record, RequestRecord):
                        record.restored()  # raises where it is no request of this version
                    self.history.apply(record)
                except (LaminaError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                    raise _damaged(self._path, offset, f"a record that does not fit: {error}") from error

    def _check(self, header: tuple[Any, ...], offset: int) -> None:
        match header:
            case ("journal", int(form), str(), dict(facts), str(engine), str(starts)) if (
                len(starts) == 10 and starts.isdecimal()
            ):
                if form != FORMAT:
                    raise JournalError(f"the journal {self._path} has format {form}; this version reads {FORMAT}")
                for name, value in asdict(self._facts).items():
                    if facts.get(name) != value:
                        raise JournalError(
                            f"the journal {self._path} is of another engine: its {name} is {facts.get(name)!r:.80}, "
                            f"this one's {value!r:.80}; give another folder, or delete it"
                        )
                self.engine, self.starts = engine, max(self.starts, int(starts))
            case _:
                raise _damaged(self._path, offset, "no header")


def _packed(plain: tuple[Any, ...]) -> bytes:
    content: bytes = msgpack.packb(plain)
    if len(content) > MAX_RECORD:
        raise ValueError(f"a record has {len(content)} bytes; allowed are {MAX_RECORD}")
    return _head(content) + content


def _head(content: bytes) -> bytes:
    length = len(content)
    return _HEAD.pack(length, zlib.crc32(length.to_bytes(4, "little")), zlib.crc32(content))


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[int, tuple[Any, ...]]]:
    size = os.fstat(file.fileno()).st_size
    magic = file.read(len(_MAGIC))
    if magic != _MAGIC[: len(magic)]:
        raise _damaged(path, 0, "it does not begin as a journal does")
    offset = len(_MAGIC)
    while offset + _HEAD.size <= size:
        length, of_length, of_content = _HEAD.unpack(file.read(_HEAD.size))
        end = offset + _HEAD.size + length
        if zlib.crc32(length.to_bytes(4, "little")) != of_length:
            if _is_blank(file, offset):
                return
            raise _damaged(path, offset, "the checksum of a record's length is wrong")
        if length > MAX_RECORD:
            raise _damaged(path, offset, f"a record of {length} bytes; allowed are {MAX_RECORD}")
        if end > size:
            return
        content = file.read(length)
        if zlib.crc32(content) != of_content:
            if end == size:  # after a crash of the machine the last record can have its length without its content
                return
            raise _damaged(path, offset, "the checksum of a record is wrong")
        yield offset, _unpacked(content, path, offset)
        offset = end


def _is_blank(file: BinaryIO, offset: int) -> bool:
    """Whether all bytes from there on are zeros, as a crash of the machine leaves them."""
    file.seek(offset)
    return not any(any(block) for block in iter(lambda: file.read(1 << 16), b""))


def _unpacked(content: bytes, path: Path, offset: int) -> tuple[Any, ...]:
    try:
        plain: Any = msgpack.unpackb(content, use_list=False, strict_map_key=False)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, offset, f"a record is malformed: {error}") from error
    if not isinstance(plain, tuple):
        raise _damaged(path, offset, f"a record is a {type(plain).__name__}")
    return plain


def _damaged(path: Path, offset: int, what: str) -> JournalError:
    return JournalError(f"the journal {path} is damaged at byte {offset}: {what}; delete it to begin anew")
