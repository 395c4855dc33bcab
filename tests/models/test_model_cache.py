"""Folders of the cache: whole or not there, whatever fails, and whoever else writes them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gguf_writing import write_tiny_llama

from lamina.errors import ModelFileError, UnsupportedModelError
from lamina.models import cache as model_cache
from lamina.models.cache import FileRecord, get_or_create, write_file
from lamina.models.gguf_conversion import convert
from lamina.models.gguf_files import GgufFile
from lamina_workers.errors import DiskFullError


def test_a_failed_creation_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, FileRecord]:
        write_file(folder / "model.safetensors", iter([b"half"]))
        raise UnsupportedModelError("no")

    with pytest.raises(UnsupportedModelError):
        get_or_create(tmp_path / "cache" / "x", fail)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["x.lock"]


def test_what_the_disk_gives_back_is_compared(tmp_path: Path) -> None:
    def lie(folder: Path) -> dict[str, FileRecord]:
        record = write_file(folder / "a", iter([b"meant"]))
        (folder / "a").write_bytes(b"other")
        return {"a": record}

    with pytest.raises(ModelFileError, match="damaged"):
        get_or_create(tmp_path / "x", lie)
    assert not (tmp_path / "x").exists()


@pytest.mark.fault("F28")
def test_a_killed_process_leaves_nothing_that_counts(tmp_path: Path) -> None:
    leftover = tmp_path / "x.partial"
    leftover.mkdir()
    (leftover / "a").write_bytes(b"half")
    folder = get_or_create(tmp_path / "x", lambda folder: {"b": write_file(folder / "b", iter([b"whole"]))})
    assert sorted(file.name for file in folder.iterdir()) == ["b", "manifest.json"]
    assert not leftover.exists()


def test_who_waited_for_another_process_takes_what_that_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = model_cache._locked

    @contextmanager
    def lock_after_another(file: Path) -> Iterator[None]:
        monkeypatch.setattr(model_cache, "_locked", lock)
        get_or_create(tmp_path / "x", lambda folder: {"a": write_file(folder / "a", iter([b"theirs"]))})
        with lock(file):
            yield

    monkeypatch.setattr(model_cache, "_locked", lock_after_another)
    folder = get_or_create(tmp_path / "x", lambda folder: pytest.fail("made a second time"))
    assert (folder / "a").read_bytes() == b"theirs"


@pytest.mark.fault("F28")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    tiny_gguf = write_tiny_llama(tmp_path / "tiny.gguf")

    def onto_full_disk(folder: Path) -> dict[str, FileRecord]:
        (folder / "tokenizer.json").symlink_to("/dev/full")
        return convert(GgufFile(tiny_gguf), folder, str(tiny_gguf), {})

    with pytest.raises(DiskFullError, match=r"no room to write .*x.*bytes are free") as caught:
        get_or_create(tmp_path / "x", onto_full_disk)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("x")] == ["x.lock"]
