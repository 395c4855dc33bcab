"""A checkpoint whose tensors stay in a GGUF file: a folder has config.json, and a record of where each tensor lies."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lamina_workers.checkpoints.checkpoint import MappedFiles
from lamina_workers.checkpoints.packed_tensors import GgmlBlocks, PackedTensor, block_of
from lamina_workers.errors import ModelFileError

RECORD = "gguf.json"
_MAX_RECORD_BYTES = 32 << 20  # as of the JSON in safetensors files
_MAX_HEADER_BYTES = 1 << 30
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """A tensor in a GGUF file: `kind` is ggml's name, `shape` outermost first, `offset` in bytes of the file.

    permuted: heads whose rows llama.cpp's converter has interleaved (0: none). added: what it has added to the numbers.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int
    permuted: int = 0
    added: float = 0.0

    @property
    def nbytes(self) -> int:
        if self.kind in _FLOATS:
            return math.prod(self.shape) * _FLOATS[self.kind].itemsize
        numbers, size = block_of(self.kind)
        return math.prod(self.shape) // numbers * size


@dataclass(frozen=True, slots=True)
class GgufRecord:
    """What a folder says of its GGUF `file`, in the folder unless the path is absolute: its size in bytes, the SHA-256
    of its first `header` bytes, and its tensors by the names that they have in a Hugging Face checkpoint."""

    file: str
    size: int
    header: int
    sha256: str
    tensors: Mapping[str, GgufEntry]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read_record(folder: Path) -> GgufRecord | None:
    """The record in `folder`; None where it has none. Raises ModelFileError where it is malformed."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        if (size := path.stat().st_size) > _MAX_RECORD_BYTES:
            raise ModelFileError(f"{path} has {size} bytes; allowed are {_MAX_RECORD_BYTES}")
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        tensors = {str(name): _entry(path, name, entry) for name, entry in raw["tensors"].items()}
        record = GgufRecord(str(raw["file"]), int(raw["size"]), int(raw["header"]), str(raw["sha256"]), tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ModelFileError(f"cannot read {path}: {error!r:.200}") from error
    if not 0 < record.header <= min(record.size, _MAX_HEADER_BYTES):
        raise ModelFileError(f"{path} has a header of {record.header} bytes; allowed are 1 to {_MAX_HEADER_BYTES}")
    for name, entry in tensors.items():
        if entry.offset + entry.nbytes > record.size:
            raise ModelFileError(f"{path}: tensor {name!r} leaves the {record.size} bytes of the file")
    return record


def _entry(path: Path, name: str, raw: Mapping[str, Any]) -> GgufEntry:
    shape, offset, heads = raw["shape"], raw["offset"], raw["permuted"]
    if any(type(n) is not int or n < 0 for n in (*shape, offset, heads)) or not 1 <= len(shape) <= 4 or 0 in shape:
        raise ModelFileError(
            f"{path}: tensor {name!r:.80} has shape {shape!r:.80} at {offset!r:.80}; allowed are sizes"
        )
    entry = GgufEntry(str(raw["kind"]), tuple(shape), offset, heads, float(raw["added"]))
    numbers = 1 if entry.kind in _FLOATS else block_of(entry.kind)[0]
    if shape[-1] % numbers or (heads and shape[0] % (2 * heads)) or not math.isfinite(entry.added):
        raise ModelFileError(f"{path}: tensor {name!r:.80} of {entry.kind} has shape {shape!r:.80}")
    return entry


def file_of(folder: Path, record: GgufRecord) -> Path:
    """The GGUF file, checked to be the one of the record. Raises ModelFileError."""
    file = folder / record.file
    try:
        if file.exists() and not file.is_file():
            raise ModelFileError(f"{file}, which has the weights of {folder}, is no regular file; refused")
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest = hashlib.sha256(stream.read(record.header)).hexdigest()
    except (OSError, ValueError) as error:  # the second: a NUL
        raise ModelFileError(f"cannot read {file}, which has the weights of {folder}: {error}") from error
    if (size, digest) != (record.size, record.sha256):
        raise ModelFileError(
            f"{file} has {size} bytes and is not the file of {record.size} bytes that {folder} was made of; give its "
            "path as the model again"
        )
    return file


class GgufCheckpoint(MappedFiles):
    """The tensors of the GGUF file that a folder's record points to: a `TensorSource`.

    Raises ModelFileError where the file is not there, or not the one of the record.
    """

    def __init__(self, folder: str | Path, record: GgufRecord) -> None:
        self._file = file_of(Path(folder), record)
        self._tensors = dict(record.tensors)
        super().__init__([self._file])

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` in the order and of the values that the model wants: a view of the file where that has
        floats, else float32."""
        entry = self._entry(name)
        if entry.kind in _FLOATS:
            values = self._view(self._file, entry.offset, entry.nbytes, _FLOATS[entry.kind], entry.shape)
        else:
            values = self._blocks(entry).floats().view(entry.shape)
        if entry.permuted:
            values = values[unpermuted(entry)]
        return values.float() - entry.added if entry.added else values

    def packed(self, name: str) -> PackedTensor | None:
        entry = self._entry(name)
        if entry.kind in _FLOATS or len(entry.shape) != 2 or entry.added:
            return None
        blocks = self._blocks(entry)
        return replace(blocks, order=unpermuted(entry)) if entry.permuted else blocks

    def release(self, name: str) -> None:
        entry = self._entry(name)
        self._give_back(self._file, entry.offset, entry.nbytes)

    def _entry(self, name: str) -> GgufEntry:
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelFileError(f"{self._file} has no tensor {name!r}") from None

    def _blocks(self, entry: GgufEntry) -> GgmlBlocks:
        data = self._bytes(self._file, entry.offset, entry.nbytes)
        return GgmlBlocks(entry.kind, data.view(math.prod(entry.shape[:-1]), -1), entry.shape[-1])


def unpermuted(entry: GgufEntry) -> torch.Tensor:
    """For each row of a Hugging Face q or k projection, its row in a GGUF of the llama family: int64 `[rows]`.

    Hugging Face rotates dimension i of a head with i + d/2, llama.cpp 2i with 2i + 1, so its converter
    (convert_hf_to_gguf.py, `permute`) interleaves the halves.
    """
    return torch.arange(entry.shape[0]).view(entry.permuted, -1, 2).transpose(1, 2).reshape(-1)
