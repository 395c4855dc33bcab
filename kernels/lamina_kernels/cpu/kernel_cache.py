"""Where numba keeps compiled kernels when disks are read-only or full.

By itself numba refuses to compile what it cannot keep: in the folder of the code, or else in the user's cache. After
`tolerate_disks` a folder of the user below the system's folder for temporary files is next, and where that takes
nothing either, each process compiles the kernels that were not kept before.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from numba.core import caching

logger = logging.getLogger("lamina")

_PLACE = "NUMBA_CACHE_DIR"  # numba's variable for a folder of one's own
_warned: list[OSError] = []  # once a process


class _InTemporaryFolder(caching.InTreeCacheLocator):  # type: ignore[misc]  # numba has no types for it
    """Keeps the kernels of one file in a folder of this user alone, and begins with those that are kept beside it."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        super().__init__(py_func, py_file)
        self._beside = Path(self.get_cache_path())
        self._cache_path: str = os.path.join(_user_folder(), self.get_suitable_cache_subpath(py_file))

    def ensure_cache_path(self) -> None:
        path = _user_folder()
        os.makedirs(path, mode=0o700, exist_ok=True)
        facts = os.lstat(path)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise PermissionError(f"{path} is not a folder of this user alone")  # what is in it is run
        super().ensure_cache_path()
        for kept in sorted(self._beside.glob(f"{Path(self._py_file).stem}.*.nb[ci]")):  # an index after its code
            if not (here := Path(self._cache_path, kept.name)).exists():
                shutil.copy(kept, here)


class _ReadOnly(caching.InTreeCacheLocator):  # type: ignore[misc]  # as above
    """Uses the kernels that are kept beside the code of one file, and keeps no others."""

    def ensure_cache_path(self) -> None:
        """Nothing is to be written there."""


@cache
def tolerate_disks() -> None:
    """Have numba compile what it cannot keep, too: for the whole process, whoever's functions they are."""
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
            "%s can name a folder that takes them", error, _PLACE,
        )  # fmt: skip
