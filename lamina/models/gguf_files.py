"""The header of a GGUF file, checked before use, and its tensors, dequantised a few rows at a time.

The format is that of github.com/ggml-org/ggml, docs/gguf.md. The `gguf` package dequantises; every size that it gets
was compared with the file's.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from lamina_workers.errors import ModelFileError, UnsupportedModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_STRING = 1 << 24  # bytes; a chat template has some thousand
_MAX_ARRAY = 1 << 22  # items; the largest vocabularies have some hundred thousand tokens
_MAX_ITEMS = 1 << 24  # of all arrays together; each takes up to 36 bytes of memory
_MAX_NAMES = 1 << 16  # of keys, and of tensors; a model of 1,024 layers has some 12,000
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_BLOCK_BYTES = 16 << 20  # float32 bytes that one step of dequantisation makes


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: `shape` outermost first (as in torch), rows quantised as `kind`, at byte `offset` of the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


class GgufFile:
    """A GGUF file of version 2 or 3, little-endian: `metadata` (key to value) and `tensors` (name to `GgufTensor`).

    Raises ModelFileError where the file is malformed or truncated, where a tensor leaves it or overlaps another.
    The file stays mapped as long as this object or a block from `rows` exists.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise ModelFileError(f"cannot read {self.path}: {error}") from error
        reader = _Reader(self.path, self._map)
        self.metadata, self.tensors = _read_header(reader)
        self.header, self.size = reader.position, len(self._map)  # bytes
        _check_offsets(self.path, self.tensors, self.header, self.size)

    def header_sha256(self) -> str:
        """The hex SHA-256 of all before the tensors' data."""
        return hashlib.sha256(self._map[: self.header]).hexdigest()

    def rows(self, name: str) -> Iterator[npt.NDArray[np.float32]]:
        """The tensor `name` as float32 blocks `[some rows, last dimension]`, of 16 MiB or one row at most.

        A one-dimensional tensor is one row.
        """
        tensor = self.tensors[name]
        width = tensor.shape[-1]
        raw = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset).reshape(math.prod(tensor.shape[:-1]), -1)
        step = max(1, _BLOCK_BYTES // (4 * width))
        for begin in range(0, len(raw), step):
            block = raw[begin : begin + step]
            try:
                values = dequantize(np.ascontiguousarray(block), tensor.kind)
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{self.path}: tensor {name!r:.80} is quantised as {tensor.kind.name}, which cannot be read"
                ) from error
            yield values.astype(np.float32, copy=False).reshape(len(block), width)


class _Reader:
    """Reads values one after another and never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.position = 0
        self._items = 0
        self._data = data

    def take(self, count: int, what: str) -> bytes:
        if count > len(self._data) - self.position:
            raise self.malformed(f"{what} of {count} bytes at byte {self.position} passes the end at {len(self._data)}")
        begin, self.position = self.position, self.position + count
        return self._data[begin : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), "a number"))[0]

    def string(self) -> str:
        if (length := self.scalar("Q")) > _MAX_STRING:
            raise self.malformed(f"a string of {length} bytes; allowed are {_MAX_STRING}")
        try:
            return self.take(length, "a string").decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.malformed(f"a string is not UTF-8: {error}") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.scalar("I"), self.scalar("Q"))
        raise self.malformed(f"unknown value type {kind}")

    def array(self, kind: int, count: int) -> list[Any]:
        if count > _MAX_ARRAY:
            raise self.malformed(f"an array of {count} items; allowed are {_MAX_ARRAY}")
        self._items += count
        if self._items > _MAX_ITEMS:
            raise self.malformed(f"arrays of more than {_MAX_ITEMS} items together")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            data = self.take(count * struct.calcsize("<" + code), f"an array of {count}")
            return list(struct.unpack(f"<{count}{code}", data))
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        raise self.malformed(f"an array of type {kind}; allowed are numbers and strings")

    def malformed(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path} is malformed: {problem}")


def _read_header(reader: _Reader) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors. Leaves the reader at the end of the header, where the tensors' data begins."""
    if (magic := reader.take(4, "the magic")) != b"GGUF":
        raise reader.malformed(f"it starts with {magic!r}; a GGUF file starts with b'GGUF'")
    if (version := reader.scalar("I")) not in _VERSIONS:
        raise UnsupportedModelError(f"{reader.path} is GGUF version {version}; supported are {_VERSIONS}")
    tensor_count, key_count = reader.scalar("Q"), reader.scalar("Q")
    if max(tensor_count, key_count) > _MAX_NAMES:
        raise reader.malformed(f"{tensor_count} tensors and {key_count} keys; allowed are {_MAX_NAMES} of each")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):  # a wrong count fails at the end of the file
        key = reader.string()
        if key in metadata:
            raise reader.malformed(f"the key {key!r:.80} appears twice")
        metadata[key] = reader.value(reader.scalar("I"))
    tensors: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        name = reader.string()
        if name in tensors:
            raise reader.malformed(f"the tensor {name!r:.80} appears twice")
        tensors[name] = _read_tensor(reader, name)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise reader.malformed(f"general.alignment is {alignment!r:.80}; allowed are powers of two from 8")
    reader.position += -reader.position % alignment
    return metadata, {
        name: GgufTensor(t.shape, t.kind, reader.position + t.offset, t.nbytes) for name, t in tensors.items()
    }


def _read_tensor(reader: _Reader, name: str) -> GgufTensor:
    if not 1 <= (dimensions := reader.scalar("I")) <= _MAX_DIMENSIONS:
        raise reader.malformed(f"tensor {name!r:.80} has {dimensions} dimensions; allowed are 1 to {_MAX_DIMENSIONS}")
    shape = tuple(reader.scalar("Q") for _ in range(dimensions))[::-1]
    code, offset = reader.scalar("I"), reader.scalar("Q")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        raise UnsupportedModelError(f"{reader.path}: tensor {name!r:.80} has the unknown type {code}") from error
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise reader.malformed(
            f"tensor {name!r:.80} of {kind.name} has shape {list(shape)}; rows must be multiples of {block}"
        )
    return GgufTensor(shape, kind, offset, math.prod(shape) // block * block_bytes)


def _check_offsets(path: Path, tensors: dict[str, GgufTensor], start: int, size: int) -> None:
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        place = f"{path}: tensor {name!r:.80} has {tensor.nbytes} bytes at byte {tensor.offset}"
        if tensor.offset < end:
            raise ModelFileError(f"{place}, which overlaps the tensor before it, up to byte {end}")
        if (end := tensor.offset + tensor.nbytes) > size:
            raise ModelFileError(f"{place}, but the file ends at byte {size} (is it truncated?)")
