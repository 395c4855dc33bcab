"""Folders of one process, and what happens to those of processes that were killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.system import private_folder
from lamina.system.private_folder import LOCK, for_sockets, lock, sweep

HOLDS = """
import os, sys, time
from pathlib import Path
from lamina.system.private_folder import lock
lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(100)
"""


@pytest.mark.fault("F28")
def test_sweep_deletes_old_folders_that_nobody_has_locked(tmp_path: Path) -> None:
    used, left, fresh, odd, linked = (tmp_path / f"x-{name}" for name in ("used", "left", "fresh", "odd", "linked"))
    for folder in (left, fresh):
        os.close(lock(folder))
    held = lock(used)
    odd.mkdir()
    (tmp_path / "mine").mkdir()
    os.close(lock(tmp_path / "mine" / "x-deep"))
    linked.symlink_to(tmp_path / "mine" / "x-deep")
    for folder in (used, left, tmp_path / "mine" / "x-deep"):
        os.utime(folder / LOCK, (1000, 1000))
    sweep(tmp_path, "x-", LOCK, 2000)
    os.close(held)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "x-fresh", "x-linked", "x-odd", "x-used"]
    assert (tmp_path / "mine" / "x-deep").is_dir()
    sweep(tmp_path / "nowhere", "x-", LOCK, 2000)


@pytest.mark.fault("F28")
def test_the_death_of_a_process_frees_its_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match=f"in use by process {holder.pid}"):
            lock(tmp_path)
        holder.kill()
        holder.wait()
    os.close(lock(tmp_path))


def test_sockets_go_to_memory_where_the_disk_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert for_sockets(tmp_path) == tmp_path
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(private_folder, "_MEMORY", str(tmp_path / "memory"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    private_folder._in_memory.cache_clear()
    found = for_sockets(tmp_path)
    assert found.parent == tmp_path / "memory"
    assert found.stat().st_mode & 0o077 == 0
    assert for_sockets(tmp_path) == found
    private_folder._in_memory().cleanup()
    private_folder._in_memory.cache_clear()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert for_sockets(tmp_path) == tmp_path
