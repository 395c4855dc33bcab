"""Kernels are compiled whether or not a disk can keep them."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core import caching

from lamina_kernels.compile import launch

CODE = "import numba\n\ndef make():\n    return numba.njit('int64(int64)', cache=True)(lambda x: x + 41)\n"


Make = Callable[[], Any]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A function that compiles one kernel, from a file of its own. The user's cache is `tmp_path / "cache"`, temporary
    files go to `tmp_path / "tmp"`."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(launch, "_warned", [])
    return checkout(tmp_path / "code", CODE)


def checkout(folder: Path, code: str) -> Make:
    """A copy of the kernel's file."""
    folder.mkdir()
    path = folder / "one.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("lamina_kernels.one", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make: Make = module.make
    return make


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache takes nothing."""
    ensure = caching._CacheLocator.ensure_cache_path

    def refuse(self: Any) -> None:
        if type(self) is launch._OnMachine:
            raise OSError(errno.EROFS, "Read-only file system")
        ensure(self)

    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", refuse)


def kept(folder: Path) -> list[str]:
    return [path.suffix for path in sorted(folder.rglob("*.nb*"))]


def test_a_kernel_is_compiled_once_for_all_checkouts_of_its_source(source: Make, tmp_path: Path) -> None:
    assert source()(1) == 42
    assert kept(tmp_path / "cache/lamina/kernels") == [".nbc", ".nbi"]
    assert kept(tmp_path / "code") == []
    same, other = checkout(tmp_path / "same", CODE)(), checkout(tmp_path / "other", CODE.replace("41", "42"))()
    assert (same(1), other(1)) == (42, 43)
    assert (bool(same.stats.cache_hits), bool(other.stats.cache_hits)) == (True, False)


AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse2,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi2,+cx16"}
COMPILES = """
import logging
logging.getLogger("lamina").setLevel(logging.INFO)
logging.basicConfig(format="%(message)s")
from lamina_kernels.attention.moves import append_kernel
append_kernel()
"""


def compiled(folder: Path, cache: Path, **environment: str) -> int:
    """How many kernels a process compiles that runs the checkout in `folder`."""
    variables = {name: text for name, text in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    variables |= {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(cache)} | environment
    command = [sys.executable, "-c", COMPILES]
    run = subprocess.run(command, env=variables, cwd=folder, check=True, capture_output=True, text=True)
    return run.stderr.count("compiled a kernel: ")


@pytest.mark.timeout(600)
def test_a_second_checkout_compiles_nothing_that_the_first_did_on_the_same_processor(tmp_path: Path) -> None:
    source, cache = Path(launch.__file__).parents[1], tmp_path / "cache"
    folders = [tmp_path / name for name in ("first", "second")]
    for number, folder in enumerate(folders):
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in folder.rglob("*.py"):
            os.utime(file, (1000 + number, 1000 + number))
    assert [compiled(folder, cache) for folder in folders] == [1, 0]
    assert compiled(folders[1], cache, **AVX2) == 1  # another processor
    assert not list(tmp_path.rglob("__pycache__/*.nb[ci]"))
    file = folders[1] / source.name / "attention" / "moves.py"
    file.write_text(f"{file.read_text()}# changed\n")
    assert [compiled(folder, cache) for folder in (folders[1], folders[0])] == [1, 0]


def test_environments_with_other_releases_of_numba_keep_kernels_beside_each_other(
    source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = [source()]  # numba loads what was compiled in this process as long as that lives
    for release, hit in (("1.0", False), (numba.__version__, True), ("1.0", True)):
        monkeypatch.setattr(numba, "__version__", release)
        kernels.append(source())
        assert bool(kernels[-1].stats.cache_hits) == hit


def test_functions_of_other_packages_stay_where_numba_keeps_them(source: Make) -> None:
    assert launch._OnMachine.from_function(json.dumps, json.__file__) is None


@pytest.mark.fault("F28")
def test_a_kernel_whose_cache_is_read_only_is_kept_in_a_private_temporary_folder(source, tmp_path, monkeypatch, caplog):
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
