"""A checkpoint whose tensors stay in a GGUF file: a folder has config.json, and a record of where each tensor lies."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lamina_workers.checkpoints.checkpoint import MappedFiles
from lamina_workers.checkpoints.packed_tensors import GgmlBlocks, PackedTensor, block_of
from lamina_workers.errors import ModelFileError

RECORD = "gguf.json"
_MAX_RECORD_BYTES = 32 << 20  # as of the JSON in safetensors files
_MAX_HEADER_BYTES = 1 << 30
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Kinds that are no blocks."""


@dataclass(frozen=True, slots=True)
class GgufPart:
    """Rows that follow one another in a GGUF file, as a matrix: `kind` is ggml's name, `offset` in bytes of the file.

    turned: (a, b, c) where llama.cpp's converter has put them in another order: the row that is wanted next is the
    next one of `[a, c, b]`, of rows that lie as `[a, b, c]`. by_head: so many heads of it lie transposed.
    """

    kind: str
    shape: tuple[int, int]
    offset: int
    turned: tuple[int, ...] = ()
    by_head: int = 0

    @property
    def nbytes(self) -> int:
        if self.kind in FLOATS:
            return math.prod(self.shape) * FLOATS[self.kind].itemsize
        numbers, size = block_of(self.kind)
        return math.prod(self.shape) // numbers * size


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """A tensor of `shape`, outermost first, made of `parts`: the rows of one behind those of the other, or with `heads`
    those of a head behind one another.

    columns: as a part's `turned`. added: what the converter has added to the numbers; negated: it has taken -exp.
    """

    shape: tuple[int, ...]
    parts: tuple[GgufPart, ...]
    heads: int = 1
    columns: tuple[int, ...] = ()
    added: float = 0.0
    negated: bool = False

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


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
        """Without what is left at its default: a model of experts has some ten thousand tensors."""
        return json.dumps(asdict(self, dict_factory=lambda items: {name: value for name, value in items if value}))


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
        if any(part.offset + part.nbytes > record.size for part in entry.parts):
            raise ModelFileError(f"{path}: tensor {name!r} leaves the {record.size} bytes of the file")
    return record


def _entry(path: Path, name: str, raw: Mapping[str, Any]) -> GgufEntry:
    parts = tuple(_part(path, name, part) for part in raw["parts"])
    shape, columns = _sizes(path, name, raw["shape"], 1, 4), _sizes(path, name, raw.get("columns", []), 0, 3)
    (heads,) = _sizes(path, name, [raw.get("heads", 1)], 1, 1)
    entry = GgufEntry(shape, parts, heads, columns, float(raw.get("added", 0.0)), bool(raw.get("negated", False)))
    fits = math.prod(shape) == sum(math.prod(part.shape) for part in parts) and math.isfinite(entry.added)
    for part in parts:
        rows, width = part.shape
        numbers = 1 if part.kind in FLOATS else block_of(part.kind)[0]
        fits &= not width % numbers and not rows % (math.prod(part.turned) * max(1, part.by_head)) and not rows % heads
        fits &= len(part.turned) in (0, 3) and (part.by_head > 0 or width == parts[-1].shape[1])
    if not fits or (columns and (len(columns) != 3 or shape[-1] % math.prod(columns))):
        raise ModelFileError(f"{path}: tensor {name!r:.80} of shape {list(shape)} is not what its parts are")
    return entry


def _part(path: Path, name: str, raw: Mapping[str, Any]) -> GgufPart:
    offset, by_head = _sizes(path, name, [raw.get("offset", 0), raw.get("by_head", 0)], 2, 2, least=0)
    shape, turns = _sizes(path, name, raw["shape"], 2, 2), _sizes(path, name, raw.get("turned", []), 0, 3)
    return GgufPart(str(raw["kind"]), shape, offset, turns, by_head)


def _sizes(path: Path, name: str, sizes: Any, fewest: int, most: int, least: int = 1) -> Any:
    """Whole numbers, so many of them, each at `least` that."""
    if not isinstance(sizes, list) or any(type(n) is not int or n < least for n in sizes):
        raise ModelFileError(f"{path}: tensor {name!r:.80} has {sizes!r:.80}; allowed are sizes")
    if not fewest <= len(sizes) <= most:
        raise ModelFileError(f"{path}: tensor {name!r:.80} has {sizes!r:.80}; allowed are {fewest} to {most} sizes")
    return tuple(sizes)


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
        values = _joined(entry, [self._floats(part) for part in entry.parts])
        if entry.columns:
            values = values[:, turned(entry.columns, values.shape[1])]
        if entry.negated:
            values = values.neg().log()
        return (values.float() - entry.added if entry.added else values).reshape(entry.shape)

    def packed(self, name: str) -> PackedTensor | None:
        entry, first = self._entry(name), self._entry(name).parts[0]
        changed = entry.added or entry.negated or any(part.by_head for part in entry.parts)
        if changed or len(entry.shape) < 2 or any(part.kind != first.kind for part in entry.parts):
            return None
        if first.kind in FLOATS:
            return None
        raw = tuple(self._raw(part) for part in entry.parts)
        order = None
        if len(raw) > 1 or first.turned:
            order = _joined(entry, _row_numbers(entry.parts))
        columns = turned(entry.columns, entry.shape[-1]) if entry.columns else None
        return GgmlBlocks(first.kind, raw, entry.shape[-1], order, columns)

    def release(self, name: str) -> None:
        for part in self._entry(name).parts:
            self._give_back(self._file, part.offset, part.nbytes)

    def _entry(self, name: str) -> GgufEntry:
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelFileError(f"{self._file} has no tensor {name!r}") from None

    def _raw(self, part: GgufPart) -> torch.Tensor:
        return self._bytes(self._file, part.offset, part.nbytes).view(part.shape[0], -1)

    def _floats(self, part: GgufPart) -> torch.Tensor:
        """Rows in the order that is wanted."""
        if part.kind in FLOATS:
            values = self._view(self._file, part.offset, part.nbytes, FLOATS[part.kind], part.shape)
        else:
            values = GgmlBlocks(part.kind, (self._raw(part),), part.shape[1]).floats()
        if part.by_head:
            values = values.view(part.by_head, -1, part.shape[1]).transpose(1, 2).flatten(0, 1)
        return values[turned(part.turned, len(values))] if part.turned else values


def _joined(entry: GgufEntry, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of all parts, or their numbers, in the entry's order."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (entry.heads, -1)) for part in parts], 1).flatten(0, 1)


def _row_numbers(parts: Sequence[GgufPart]) -> list[torch.Tensor]:
    """Of the rows of each part, in the order that is wanted, their numbers among those of all parts."""
    numbers, first = [], 0
    for part in parts:
        rows = part.shape[0]
        numbers.append(first + (turned(part.turned, rows) if part.turned else torch.arange(rows)))
        first += rows
    return numbers


def turned(sizes: Sequence[int], count: int) -> torch.Tensor:
    """Where each of `count` rows lies that a converter has `turned` so (`GgufPart`): int64 `[count]`.

    (heads, d / 2, 2): Hugging Face rotates dimension i of a head with i + d / 2, llama.cpp 2i with 2i + 1, so that the
    halves are interleaved. (1, heads of a group, groups): llama.cpp repeats key heads one after another, and so has
    the first value head of every group, then the second.
    """
    return torch.arange(count).view(*sizes, -1).transpose(1, 2).reshape(-1)
