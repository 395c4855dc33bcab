"""Reads API keys from the environment and from files, so that they do not appear among a program's arguments."""

from __future__ import annotations

import os
from pathlib import Path

from lamina.errors import InvalidRequest
from lamina.system.child_process import KEY_VARIABLE
from lamina.system.text_files import read_text

_MAX_FILE = 64 << 10  # bytes


def keys_from_environment() -> list[str]:
    """The keys in `$LAMINA_API_KEY`, with spaces or lines between them."""
    return os.environ.get(KEY_VARIABLE, "").split()


def keys_from_file(path: Path | None) -> list[str]:
    """The keys of a file, one per line; none where there is no path. Raises InvalidRequest."""
    if path is None:
        return []
    try:
        text = read_text(path, _MAX_FILE)
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error}") from error
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise InvalidRequest(f"{path} holds no API key; allowed is one a line")
    return keys
