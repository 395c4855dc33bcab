"""Kernels are compiled whether or not a disk can keep them."""

from __future__ import annotations

import errno
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from numba.core import caching

from lamina_kernels.compile import launch

CODE = "import numba\n\ndef make():\n    return numba.njit('int64(int64)', cache=True)(lambda x: x + 41)\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that compiles one kernel, from a file of its own; temporary files go to `tmp_path / "tmp"`."""
    path = tmp_path / "code" / "one.py"
    path.parent.mkdir()
    (tmp_path / "tmp").mkdir()
    path.write_text(CODE)
    spec = importlib.util.spec_from_file_location("one", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(launch, "_warned", [])
    return module.make


def read_only(monkeypatch: pytest.MonkeyPatch, *others: str) -> None:
    """The folders of the code and of the user's cache take nothing, nor do `others`."""
    ensure = caching._CacheLocator.ensure_cache_path

    def refuse(self: Any) -> None:
        plain = type(self) in (caching.InTreeCacheLocator, caching.UserWideCacheLocator)
        if plain or type(self).__name__ in others:
            raise OSError(errno.EROFS, "Read-only file system")
        ensure(self)

    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", refuse)


def kept(folder: Path) -> list[str]:
    return [path.suffix for path in sorted(folder.rglob("*.nb*"))]


@pytest.mark.fault("F28")
def test_a_kernel_in_a_read_only_folder_is_kept_in_a_private_temporary_one(source, tmp_path, monkeypatch, caplog):
    read_only(monkeypatch)
    assert source()(1) == 42
    folder = tmp_path / "tmp" / f"lamina-kernels-{os.geteuid()}"
    assert kept(folder) == [".nbc", ".nbi"]
    assert folder.stat().st_mode & 0o077 == 0
    assert not caplog.text


def test_a_temporary_folder_of_others_is_not_used(source, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "tmp" / f"lamina-kernels-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    read_only(monkeypatch)
    assert source()(1) == 42
    assert kept(folder) == []


@pytest.mark.parametrize("temporary", [True, False])
def test_what_was_kept_before_the_folder_became_read_only_is_used(source, tmp_path, monkeypatch, temporary):
    assert source()(1) == 42
    assert kept(tmp_path / "code") == [".nbc", ".nbi"]
    if not temporary:
        monkeypatch.setattr(tempfile, "tempdir", os.devnull)
    read_only(monkeypatch)
    again = source()
    assert again(1) == 42
    assert again.stats.cache_hits


@pytest.mark.fault("F28")
def test_a_full_disk_keeps_nothing_and_stops_nothing(source, tmp_path, monkeypatch, caplog):
    def full(self: Any, path: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_open_for_write", full)
    assert source()(1) == 42
    assert source()(1) == 42
    assert caplog.text.count("No space left on device; NUMBA_CACHE_DIR can name a folder") == 1
    assert kept(tmp_path) == []
