"""A model's folder from the Hugging Face hub, kept in the hub's own cache.

Endpoint, token and offline mode are the hub library's own configuration (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from lamina.system.progress import Progress
from lamina_workers.errors import DiskFullError, ModelFileError

_RECORD = "gguf.json"  # of Lamina's own cache; it could name any file of this machine
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")  # never pickles: loading them can run code


def download(hub_id: str, progress: Progress) -> Path:
    """The folder of the model `hub_id`, such as org/name, with its newest files, or the cached files when offline.

    Raises ModelFileError where the hub cannot be reached or has no such model, DiskFullError where there is no room.
    """
    from huggingface_hub import snapshot_download  # takes 0.2 s to load

    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=list(_FILES), ignore_patterns=[_RECORD], tqdm_class=_bar(hub_id, progress)
            )
        )
    except Exception as error:  # the library lets errors of its HTTP client through
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DiskFullError(f"no room to fetch {hub_id}: {error}") from error
        raise ModelFileError(f"cannot fetch {hub_id!r} from the hub: {_why(error)}") from error


def _why(error: Exception) -> str:
    """What went wrong and what to do, in one sentence. The library's own words are paragraphs."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "its owner asks for consent: give it on the hub's page of the model, then log in by `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such model, or it is private: then log in by `hf auth login`"
    if isinstance(error, OSError) and not isinstance(error, HfHubHTTPError):
        return "the hub cannot be reached, and no copy is here; copy the model to this machine and give its path"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _bar(hub_id: str, progress: Progress) -> Any:
    """A class that looks like tqdm to the hub library and reports bytes to `progress` instead of drawing."""
    from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

    most = 0

    class Bar(tqdm):  # type: ignore[misc]  # for the same reason
        def __init__(self, *args: Any, **keywords: Any) -> None:
            self._in_bytes = keywords.get("unit") == "B"
            self._done = 0
            super().__init__(*args, **(keywords | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            nonlocal most  # bytes received and bytes written have a bar each; both end at the same total
            self._done += int(n or 0)
            if self._in_bytes and self._done > most:
                most = self._done
                progress(f"fetching {hub_id}", most, int(self.total) if self.total else None)

    return Bar
