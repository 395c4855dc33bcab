"""Folders of one user, and folders that belong to one process: no other one uses them meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

_MEMORY = "/dev/shm"  # of Linux
LOCK = "lock"  # the file in a folder that its process holds locked


def state_folder() -> Path:
    """Where what one user did is remembered: `$XDG_STATE_HOME/lamina`, by default in `~/.local/state`."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "lamina"


def check_own(facts: os.stat_result) -> None:
    """Raise PermissionError unless a folder or file belongs to this user, or to root, and nobody else may write to
    it."""
    if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & 0o022:
        raise PermissionError(
            f"it is of user {facts.st_uid} with mode {facts.st_mode & 0o7777:04o}; allowed is one of this user "
            f"({os.geteuid()}) that nobody else may write to: chmod 700, or another name, which is made so"
        )


def lock(folder: Path) -> int:
    """A descriptor that keeps other processes out of `folder` while it is open; the end of this process closes it. The
    folder is made where there is none. Raises OSError, BlockingIOError where another process has it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_own(folder.stat())
    file = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(file, 32).decode("ascii", "replace").strip()
        os.close(file)
        raise BlockingIOError(f"it is in use by process {owner or 'unknown'}; each has a folder of its own") from error
    with contextlib.suppress(OSError):  # only for readers of the message above
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file


def for_sockets(folder: Path) -> Path:
    """A private folder in which sockets can be made: `folder`, or where its disk is read-only now, one of this process
    in memory, if the system has memory for files."""
    if os.access(folder, os.W_OK) or not os.access(_MEMORY, os.W_OK):
        return folder
    return Path(_in_memory().name)


@cache
def _in_memory() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="lamina-", dir=_MEMORY)


def sweep(parent: Path, prefix: str, file: str, before: float) -> None:
    """Delete the folders that killed processes have left in `parent`: those of this user whose names begin with
    `prefix`, that no process has locked, and whose `file` was last written before `before`, a time of the file
    system."""
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            facts = (folder / file).lstat()
            if facts.st_uid != os.geteuid() or facts.st_mtime >= before or folder.is_symlink():
                continue
            lock_file = lock(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock_file)
