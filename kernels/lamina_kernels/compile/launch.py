"""Runs a compiled kernel on several threads, and keeps compiled kernels where disks are read-only or full.

A kernel is a numba `cfunc` of `void(void*)`. Its argument points to a block that begins with HEADER: every thread
takes share numbers from `taken` until none is left, so the result is the same whatever threads come. The threads are
the team that torch keeps, where torch's OpenMP allows that.

By itself numba refuses to compile what it cannot keep: in the folder of the code, or else in the user's cache. After
`tolerate_disks` a folder of the user below the system's folder for temporary files is next, and where that takes
nothing either, each process compiles the kernels that were not kept before.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba.core import caching

logger = logging.getLogger("lamina")

_PLACE = "NUMBA_CACHE_DIR"  # numba's variable for a folder of one's own
_warned: list[OSError] = []  # once a process


class _InTemporaryFolder(caching.InTreeCacheLocator):  # type: ignore[misc]  # numba has no types for it
    """Keeps the kernels of one file in a folder of this user alone, and begins with those that are kept beside it."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        super().__init__(py_func, py_file)
        self._source_cache = Path(self.get_cache_path())
        self._cache_path: str = os.path.join(_user_folder(), self.get_suitable_cache_subpath(py_file))

    def ensure_cache_path(self) -> None:
        path = _user_folder()
        os.makedirs(path, mode=0o700, exist_ok=True)
        facts = os.lstat(path)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise PermissionError(f"{path} is not a folder of this user alone")  # what is in it is run
        super().ensure_cache_path()
        for file in sorted(self._source_cache.glob(f"{Path(self._py_file).stem}.*.nb[ci]")):  # an index after its code
            if not (target := Path(self._cache_path, file.name)).exists():
                shutil.copy(file, target)


class _ReadOnly(caching.InTreeCacheLocator):  # type: ignore[misc]  # as above
    """Uses the kernels that are kept beside the code of one file, and keeps no others."""

    def ensure_cache_path(self) -> None:
        """Nothing is to be written there."""


@cache
def tolerate_disks() -> None:
    """Have numba compile what it cannot keep, too: all functions of the process."""
    caching.CacheImpl._locator_classes += [_InTemporaryFolder, _ReadOnly]
    save = caching.IndexDataCacheFile.save

    def tolerant(self: Any, key: Any, data: Any) -> None:
        try:
            save(self, key, data)
        except OSError as error:
            _warn(error)

    caching.IndexDataCacheFile.save = tolerant


def _user_folder() -> str:
    return os.path.join(tempfile.gettempdir(), f"lamina-kernels-{os.geteuid()}")


def _warn(error: OSError) -> None:
    if not _warned:
        _warned.append(error)
        logger.warning(
            "compiled kernels cannot be kept, so that each process compiles them anew, which takes minutes: %s; "
            "%s can name a folder that takes them",
            error,
            _PLACE,
        )


tolerate_disks()  # every module that has kernels imports this one before it compiles them

HEADER = [("taken", "i8"), ("finished", "i8"), ("shares", "i8")]  # the first fields of every argument block
TAKEN, FINISHED, SHARES = 0, 1, 2  # which int64 of the block they are
Launch = Callable[[int, int, int], None]


def block_type(fields: npt.DTypeLike) -> Any:
    """The ctypes twin of a block's numpy dtype, whose fields take a tenth of the time to set."""
    kinds = {"i": ctypes.c_int64, "f": ctypes.c_double}
    described: Mapping[str, Any] = np.dtype(fields).fields or {}
    return type("Block", (ctypes.Structure,), {"_fields_": [(n, kinds[f[0].kind]) for n, f in described.items()]})


def source_fingerprint(*modules: ModuleType) -> int:
    """A hash of other files whose code is compiled into a kernel. Closed over, it is a part of numba's cache key."""
    return zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)) or 1


def load_each(loads: Sequence[Callable[[], object]]) -> Iterator[tuple[int, int]]:
    """Call each, and yield before the first and after each how many of how many are done."""
    yield 0, len(loads)
    for done, load in enumerate(loads, 1):
        load()
        yield done, len(loads)


def launch(kernel: int, arguments: int, threads: int) -> None:
    """Call the function at address `kernel` with `arguments` on `threads` threads, and wait. Releases the GIL."""
    _launcher()(kernel, arguments, threads)


@cache
def _launcher() -> Launch:
    """Through torch's own OpenMP (1.3 us, and no core has two teams), else through a pool of Python's threads."""
    parallel = openmp_function("GOMP_parallel")
    if parallel is None:
        return _on_python_threads
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return lambda kernel, arguments, threads: parallel(kernel, arguments, threads, 0)


def openmp_function(name: str) -> Any:
    """A function of the OpenMP that torch runs on, by ctypes; None where that has none of this name."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            return getattr(ctypes.CDLL(str(library)), name)  # found in the OpenMP that the library is linked to
        except (OSError, AttributeError):
            continue
    return None


def _on_python_threads(kernel: int, arguments: int, threads: int) -> None:
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)
    others = [_pool().submit(call, arguments) for _ in range(threads - 1)]
    call(arguments)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="lamina-kernels")
