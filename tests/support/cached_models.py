"""Folders of converted models, compared with what their manifests say."""

from __future__ import annotations

from pathlib import Path

from lamina.models.cache import read_manifest, verify_file


def verify(folder: Path) -> None:
    """Raises ModelFileError, which names a file that differs."""
    for name, record in read_manifest(folder).items():
        verify_file(folder / name, record)
