"""Folders of converted models: written once, whole or not at all, and recognised at the next start."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lamina_workers.errors import DiskFullError, ModelFileError

MANIFEST = "manifest.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_MANIFEST_BYTES = 1 << 20
_HASH = re.compile(r"-[0-9a-f]{12}\Z")  # as `folder_name` appends it


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be: its size in bytes and the hex SHA-256 of its content."""

    size: int
    sha256: str


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/lamina/models`, by default in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lamina" / "models"


def kept_models() -> dict[str, Path]:
    """The whole folders of the cache by their names, and by the names without the hash at the end where that leaves one
    of them alone."""
    base = cache_folder()
    folders = {path.name: path for path in sorted(base.iterdir()) if is_whole(path)} if base.is_dir() else {}
    short = Counter(_HASH.sub("", name) for name in folders)
    return {plain if short[plain := _HASH.sub("", name)] == 1 else name: path for name, path in folders.items()}


def kept_bytes(folder: Path) -> int:
    """What a folder of the cache takes; 0 where it is not whole."""
    return sum(record.size for record in read_manifest(folder).values()) if is_whole(folder) else 0


def remove(folder: Path) -> int:
    """Remove a folder of the cache, and a download of it that was not finished. Returns the bytes that were freed.
    Programs that have the files open keep them until they end. Raises ModelFileError where it cannot be removed."""
    if folder.parent != cache_folder():
        raise ModelFileError(f"{folder} is not in {cache_folder()}; allowed are folders there")
    partial = folder.with_name(f"{folder.name}.download")
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        freed = sum(path.stat().st_size for path in (*folder.glob("*"), partial) if path.is_file())
        if lock.exists() or folder.exists() or partial.exists():
            with _locked(lock):
                if folder.exists():
                    shutil.rmtree(folder)
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise ModelFileError(f"cannot remove {folder}: {error}") from error
    return freed


def folder_name(name: str, identity: str) -> str:
    """The cache's name for the model `name` whose source is `identity`, a string that changes with the source."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def get_or_create(folder: Path, create: Callable[[Path], dict[str, FileRecord]]) -> Path:
    """`folder`, if it is whole; else `create` writes its files to an empty folder, which is then moved there.

    `create` returns a record of every file. The files are read back and compared before the move, so `folder` is
    never there in part. Of several processes one creates the folder, and the others wait for it. Raises DiskFullError
    where there is no room, ModelFileError where the disk cannot be written or returns other bytes.
    """
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if is_whole(folder):  # another process has just made it
                return folder
            _replace(folder, create)
    except OSError as error:
        if error.errno in _NO_ROOM:
            free = shutil.disk_usage(folder.parent).free
            raise DiskFullError(f"no room to write {folder}: {error.strerror}; {free} bytes are free there") from error
        raise ModelFileError(f"cannot write {folder}: {error}") from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file that the manifest lists is there with its size. Reads no contents, so it is fast."""
    try:
        return all((folder / name).stat().st_size == record.size for name, record in read_manifest(folder).items())
    except (OSError, ModelFileError):
        return False


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The record of every file in a folder of the cache, by name. Raises ModelFileError where there is none."""
    file = folder / MANIFEST
    try:
        if (size := file.stat().st_size) > _MAX_MANIFEST_BYTES:
            raise ModelFileError(f"{file} has {size} bytes; allowed are {_MAX_MANIFEST_BYTES}")
        entries: Any = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): FileRecord(int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"cannot read {file}: {error}") from error


def write_file(path: Path, blocks: Iterator[bytes]) -> FileRecord:
    """Write `blocks` to a new file and sync it to the disk. The record is made from `blocks`, not read back."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as stream:
        for block in blocks:
            stream.write(block)
            digest.update(block)
            size += len(block)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(size, digest.hexdigest())


def _replace(folder: Path, create: Callable[[Path], dict[str, FileRecord]]) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed; the lock is ours
    partial.mkdir()
    try:
        records = create(partial)
        for name, record in records.items():
            verify_file(partial / name, record)
        manifest = json.dumps({name: asdict(record) for name, record in records.items()}, indent=2)
        write_file(partial / MANIFEST, iter([manifest.encode()]))
        if folder.exists():  # it was damaged
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def verify_file(file: Path, record: FileRecord) -> None:
    """Read a file and compare it with its record. Raises ModelFileError where it differs."""
    try:
        size, sha256 = file.stat().st_size, hash_file(file)
    except OSError as error:
        raise ModelFileError(f"cannot read {file}: {error}") from error
    if FileRecord(size, sha256) != record:
        raise ModelFileError(
            f"{file} is damaged: it has {size} bytes and sha256 {sha256}; expected {record.size} and {record.sha256}"
        )


def hash_file(file: Path) -> str:
    """The hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock `file` against other processes and threads. The system frees it when its holder dies."""
    with file.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
