"""A model's folder opened as a checkpoint, whatever its weights are in, and a name for what it has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamina_workers.checkpoints.checkpoint import Checkpoint, TensorSource
from lamina_workers.checkpoints.gguf_checkpoint import GgufCheckpoint, file_of, read_record
from lamina_workers.checkpoints.quantization import read_quantization
from lamina_workers.checkpoints.quantized_tensors import QuantizedTensors, check_scaled
from lamina_workers.checkpoints.safetensors_files import find_tensors, inside
from lamina_workers.errors import ModelFileError

_SAMPLED = 32  # tensors
_SAMPLE_BYTES = 4096


@contextmanager
def open_checkpoint(folder: str | Path) -> Iterator[TensorSource]:
    """The tensors of the model in `folder`: in safetensors files, quantised there, or in a GGUF file elsewhere.

    Raises ModelFileError where files are missing, malformed or refused, UnsupportedModelError where weights are
    quantised in a way that is not known.
    """
    path = Path(folder)
    if (record := read_record(path)) is not None:
        with GgufCheckpoint(path, record) as gguf:
            yield gguf
        return
    quantization = read_quantization(path)
    with Checkpoint(path) as checkpoint:
        if quantization is None:
            check_scaled(checkpoint, checkpoint.names())
            yield checkpoint
        else:
            yield QuantizedTensors(checkpoint, quantization)


def check_weights(folder: Path, foreign: bool) -> None:
    """Raise what `open_checkpoint` would raise, without mapping anything. Of a `foreign` folder, which was not made
    here, the GGUF file must be in it."""
    if (record := read_record(folder)) is not None:
        if foreign:
            inside(folder, record.file)
        file_of(folder, record)
    else:
        find_tensors(folder)


def fingerprint(folder: str | Path) -> str:
    """A name for a model that takes no reading of all of it: a hash of its config, of every tensor's name,
    dtype and shape, and of the beginning of its largest tensors. 32 hexadecimal digits.

    Raises ModelFileError as `open_checkpoint` does.
    """
    path = Path(folder)
    places: dict[str, tuple[Path, int, int]] = {}  # of each tensor its file, offset and bytes
    digest = hashlib.sha256()
    try:
        digest.update((path / "config.json").read_bytes())
        if (record := read_record(path)) is not None:
            file = file_of(path, record)
            for name, entry in sorted(record.tensors.items()):
                kinds = [(part.kind, part.shape, part.turned, part.by_head) for part in entry.parts]
                digest.update(f"{name} {entry.shape} {kinds} {entry.heads} {entry.columns} {entry.added}\n".encode())
                places[name] = file, entry.parts[0].offset, entry.parts[0].nbytes
        else:
            for name, info in sorted(find_tensors(path).items()):
                digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
                places[name] = info.file, info.offset, info.nbytes
        for _, (file, offset, nbytes) in sorted(places.items(), key=lambda item: (-item[1][2], item[0]))[:_SAMPLED]:
            with file.open("rb") as stream:
                stream.seek(offset)
                digest.update(stream.read(min(nbytes, _SAMPLE_BYTES)))
    except OSError as error:
        raise ModelFileError(f"cannot read {folder}: {error}") from error
    return digest.hexdigest()[:32]
