"""Runs a compiled kernel on several threads, and keeps compiled kernels for all processes of this user.

A kernel is a numba `cfunc` of `void(void*)`. Its argument points to a block that begins with HEADER: every thread
takes share numbers from `taken` until none is left, so the result is the same whatever threads come. The threads are
the team that torch keeps, where torch's OpenMP allows that.

By itself numba keeps a kernel beside its code, where two environments with unlike releases of numba that run the same
code take each other's away. After `keep_kernels` Lamina's are in the user's cache, named by release and source. Where
that takes nothing a folder of the user below the system's folder for temporary files is next, and where no disk takes
anything, each process compiles the kernels that were not kept before.
"""

from __future__ import annotations

import ctypes
import hashlib
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

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba.core import caching

logger = logging.getLogger("lamina")

_PLACE = "NUMBA_CACHE_DIR"  # numba's variable for a folder of one's own
_PACKAGES = ("lamina", "lamina_kernels", "lamina_workers")
_warned: list[OSError] = []  # once a process


class _OnMachine(caching.InTreeCacheLocator):  # type: ignore[misc]  # numba has no types for it
    """Keeps Lamina's own kernels for all checkouts and environments of this user."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        super().__init__(py_func, py_file)
        self._source = hashlib.sha256(Path(py_file).read_bytes()).hexdigest()[:16]
        self._folder = os.path.join(f"numba-{numba.__version__}", f"{Path(py_file).stem}-{self._source}")
        self._cache_path: str = os.path.join(_user_cache(), self._folder)

    def get_source_stamp(self) -> str:
        """Its bytes alone: some releases of numba look at its time, which is another in each checkout."""
        return self._source

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        package = (py_func.__module__ or "").partition(".")[0]
        return super().from_function(py_func, py_file) if package in _PACKAGES else None


class _InTemporaryFolder(_OnMachine):
    """Keeps them in a folder of this user alone, and begins with those that are kept on the machine."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        super().__init__(py_func, py_file)
        self._machine_folder = Path(self._cache_path)
        self._cache_path = os.path.join(_user_folder(), self._folder)

    def ensure_cache_path(self) -> None:
        path = _user_folder()
        os.makedirs(path, mode=0o700, exist_ok=True)
        facts = os.lstat(path)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise PermissionError(f"{path} is not a folder of this user alone")  # what is in it is run
        super().ensure_cache_path()
        for file in sorted(self._machine_folder.glob("*.nb[ci]")):  # an index after its code
            if not (target := Path(self._cache_path, file.name)).exists():
                shutil.copy(file, target)


class _ReadOnly(_OnMachine):
    """Uses those that are kept on the machine, and keeps no others."""

    def ensure_cache_path(self) -> None:
        """Nothing is to be written there."""


@cache
def keep_kernels() -> None:
    """Have numba keep Lamina's kernels on this machine, and compile what it cannot keep, too."""
    provided, *others = caching.CacheImpl._locator_classes  # the first: of `_PLACE`
    caching.CacheImpl._locator_classes = [provided, _OnMachine, _InTemporaryFolder, _ReadOnly, *others]
    save = caching.IndexDataCacheFile.save

    def tolerant(self: Any, key: Any, data: Any) -> None:
        logger.info("compiled a kernel: %s", self._index_name.partition("-")[0])
        try:
            save(self, key, data)
        except OSError as error:
            _warn(error)

    caching.IndexDataCacheFile.save = tolerant


def _user_cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    return os.path.join(folder, "lamina", "kernels") if os.path.isabs(folder) else _user_folder()


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


keep_kernels()  # every module that has kernels imports this one before it compiles them

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
