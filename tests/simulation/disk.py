"""The disk of an engine's journal: a folder in memory whose writes fail or end half way when they are told to."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from lamina.journal.journal import NAME

_MEMORY = Path("/dev/shm")


class Disk:
    """`lamina.journal.journal.FileCalls` over a folder of its own. `state`: of a "full" disk only `room` bytes more are
    written, beside those that take the place of others, on a "read-only" one nothing is opened, renamed or cut
    either."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lamina-simulation-", dir=_MEMORY if _MEMORY.is_dir() else None))
        self.state: Literal["", "full", "read-only"] = ""
        self.room = 0
        self.refused = 0  # calls

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        self._check("read-only", errno.EROFS)
        return os.open(path, flags, mode)

    def write(self, file: int, data: memoryview) -> int:
        self._check("read-only", errno.EROFS)
        if self.state == "full" and not _replaces(file, data):
            if not self.room:
                self._check("full", errno.ENOSPC)
            data = data[: self.room]
            self.room -= len(data)
        return os.write(file, data)

    def rename(self, old: Path, new: Path) -> None:
        self._check("read-only", errno.EROFS)
        os.rename(old, new)

    def ftruncate(self, file: int, length: int) -> None:
        self._check("read-only", errno.EROFS)
        os.ftruncate(file, length)

    def fail(self, how: Literal["full", "read-only"], room: int = 0) -> None:
        """Be full but for so many bytes, or read-only, until `mend`."""
        self.state, self.room = how, room

    def mend(self) -> None:
        """Take everything again."""
        self.state = ""

    def tear(self, lost: int) -> None:
        """The last write has ended half way: its last bytes are not there, never those of the write before it."""
        path = self.folder / NAME
        if path.exists():
            size = path.stat().st_size
            os.truncate(path, max(0, size - lost))

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check(self, state: str, error: int) -> None:
        if self.state == state:
            self.refused += 1
            raise OSError(error, os.strerror(error))


def _replaces(file: int, data: memoryview) -> bool:
    """Whether the file has as many bytes already at the place where these are written."""
    appends = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_APPEND
    return not appends and os.lseek(file, 0, os.SEEK_CUR) + len(data) <= os.fstat(file).st_size
