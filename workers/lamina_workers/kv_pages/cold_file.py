"""Memory of which parts lie in a file while they are not needed. It is about bytes, and knows nothing of pages.

The memory is cut into chunks. A chunk is anonymous, in huge pages, until something of it leaves memory: then it becomes
a private mapping of the file. So every byte can be read and written at any time: what left is read from the file, and
what is written stays in memory. Nothing is written to the file but by `save`: a shared mapping would write every new
key to the disk, has no huge pages (decode takes 1.1 to 1.2 times as long), and ends the process when the disk is full.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Sequence

import torch

from lamina_workers.errors import KVError

OS_PAGE = 4096
MOST_CHUNK = 2 << 20  # bytes: a huge page; larger where the mappings would be too many
_CHUNKS = 1 << 13  # the most; each may be two of the 65,530 mappings that Linux allows a process by default
_READ_WRITE, _FIXED, _ANONYMOUS = mmap.PROT_READ | mmap.PROT_WRITE, 0x10, 0x20
_RANDOM, _KEEP_SIZE_AND_PUNCH = 1, 3
_IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}  # numbers of file systems, from linux/magic.h

Run = tuple[int, int]  # bytes [first, end)


class ColdFile:
    """The bytes of `memory`, uint8 `[n]`, of which `save`d ones may leave by `drop`. The file is in `folder`, without a
    name, and ends with the process. A chunk has `least_chunk` bytes or more. Raises KVError where there can be no file.

    `save` may be called from any thread, the others by the one that writes to the memory.
    """

    def __init__(self, folder: str, memory: torch.Tensor, least_chunk: int = OS_PAGE) -> None:
        self.size = len(memory)
        self.chunk = _chunk_bytes(self.size, least_chunk)
        self._memory = memory  # kept alive as long as the file
        self._bytes = memoryview(memory.numpy())  # type: ignore[arg-type]
        self._address = memory.data_ptr()
        if self._address % OS_PAGE:
            raise KVError(f"kv_cold needs memory that begins with a page of the system, got address {self._address:#x}")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        self._file = unnamed_file(folder)
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, -(-self.size // OS_PAGE) * OS_PAGE)

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.size // self.chunk)

    def save(self, runs: Sequence[Run], wait: bool = True) -> None:
        """Write what the memory holds now. `wait` until it is on the disk and has left the system's cache: one large
        write is cached as one, which would stay as long as a byte of it is read. Raises OSError, where the disk is
        full."""
        for first, end in runs:
            while first < end:
                first += os.pwrite(self._file, self._bytes[first:end], first)
        if wait:
            os.fdatasync(self._file)
            for first, end in runs:
                os.posix_fadvise(self._file, first, end - first, os.POSIX_FADV_DONTNEED)

    def agrees(self, first: int, end: int) -> bool:
        """Whether the file has what the memory has of these bytes."""
        return os.pread(self._file, end - first, first) == self._bytes[first:end]

    def enter(self, chunk: int) -> None:
        """Let a chunk, all of which was saved as it is, be a mapping of the file."""
        first, size = self._of(chunk)
        self._map(first, size, mmap.MAP_PRIVATE | _FIXED, self._file, first)
        self._advise(first, size, _RANDOM)  # its neighbours were not asked for

    def leave(self, chunk: int) -> None:
        """Let a chunk, whose content is not needed any more, be anonymous memory again: zeros, and nothing on the
        disk."""
        first, size = self._of(chunk)
        self._map(first, size, mmap.MAP_PRIVATE | _FIXED | _ANONYMOUS, -1, 0)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._advise(first, size, mmap.MADV_HUGEPAGE)
        self._punch(first, size)

    def drop(self, first: int, end: int) -> None:
        """Let bytes leave memory that were saved as they are, in chunks that have entered. What is not a whole page of
        the system stays."""
        first, end = -(-first // OS_PAGE) * OS_PAGE, end // OS_PAGE * OS_PAGE
        if first < end:
            self._advise(first, end - first, mmap.MADV_DONTNEED)
            os.posix_fadvise(self._file, first, end - first, os.POSIX_FADV_DONTNEED)

    def discard(self, first: int, end: int) -> None:
        """As `drop`, of bytes whose content is not needed any more. They then take no room on the disk either."""
        first, end = -(-first // OS_PAGE) * OS_PAGE, end // OS_PAGE * OS_PAGE
        if first < end:
            self._punch(first, end - first)
            self._advise(first, end - first, mmap.MADV_DONTNEED)

    def fetch(self, first: int, end: int) -> None:
        """Begin to read bytes that were dropped. Returns at once; the thread that uses the bytes waits for them."""
        first = first // OS_PAGE * OS_PAGE
        self._advise(first, end - first, mmap.MADV_WILLNEED)

    def _of(self, chunk: int) -> tuple[int, int]:
        first = chunk * self.chunk
        return first, min(self.chunk, -(-self.size // OS_PAGE) * OS_PAGE - first)

    def _map(self, first: int, size: int, flags: int, file: int, offset: int) -> None:
        address = self._libc.mmap(self._address + first, size, _READ_WRITE, flags, file, offset)
        if address != self._address + first:
            raise OSError(ctypes.get_errno(), "mmap of cold KV")

    def _advise(self, first: int, size: int, advice: int) -> None:
        if self._libc.madvise(self._address + first, size, advice):
            raise OSError(ctypes.get_errno(), f"madvise {advice} of cold KV")

    def _punch(self, first: int, size: int) -> None:
        if self._libc.fallocate(self._file, _KEEP_SIZE_AND_PUNCH, first, size):
            # A file system without holes keeps the room, and gives up the cached pages alone.
            os.posix_fadvise(self._file, first, size, os.POSIX_FADV_DONTNEED)


def check_folder(folder: str, device: str) -> None:
    """Raise KVError unless pages of KV on that device can go to a file in `folder`."""
    if device.split(":")[0] != "cpu":
        raise KVError(f"kv_cold is {folder!r:.200} with KV on {device}; allowed is KV on a CPU")
    os.close(unnamed_file(folder))


def unnamed_file(folder: str) -> int:
    """A descriptor of a new file in `folder` that has no name, on a disk. Raises KVError, which says why not."""
    allowed = "allowed is a folder on a disk, in which this process may write"
    if sys.platform != "linux":
        raise KVError(f"kv_cold is {folder!r:.200}, but {sys.platform} has no private mappings to drop; it needs Linux")
    try:
        file, path = tempfile.mkstemp(prefix=".lamina-kv-", dir=folder)
    except OSError as error:
        raise KVError(f"kv_cold is {folder!r:.200}: {error.strerror or error}; {allowed}") from error
    with contextlib.suppress(OSError):
        os.unlink(path)
    if (system := _file_system(file)) in _IN_MEMORY:
        os.close(file)
        raise KVError(f"kv_cold is {folder!r:.200}, which lies in memory ({_IN_MEMORY[system]}); {allowed}")
    return file


def _file_system(file: int) -> int:
    """The number of a file's file system; 0 where unknown."""
    words = (ctypes.c_ulong * 32)()  # more than a `struct statfs`, which begins with it
    status = ctypes.CDLL(None).fstatfs(file, words)
    return 0 if status else words[0] & 0xFFFFFFFF


def _chunk_bytes(size: int, least: int) -> int:
    """A power of two: 2 MiB, less of small memory, more of memory that would be too many chunks."""
    least = max(OS_PAGE, least, min(MOST_CHUNK, size // 32), size // _CHUNKS)
    return 1 << (least - 1).bit_length()
