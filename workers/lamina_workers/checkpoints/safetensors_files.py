"""The safetensors files of a folder and their headers, checked before use.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without a gap
(github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina_workers.errors import ModelFileError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
              "F8_E4M3": 1, "F8_E8M0": 1}  # fmt: skip

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_JSON_BYTES = 32 << 20  # twice the index of 10**12 weights; parsed, JSON of the worst kind takes 20 times as much
_MAX_DIMENSIONS = 8
_MAX_SIZE = 1 << 62


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` from `offset`, both in bytes from the start of `file`. `dtype` as in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint in `folder`: one `model.safetensors`, or the shards that its index names.

    Embedding models are published without a head, and then without `model.` before each name; it is added.

    Raises ModelFileError where a file is missing, truncated or malformed, lies outside the folder, or where
    there are only pickled weights, which would run code when loaded.
    """
    tensors = _named(folder)
    return {f"model.{name}": info for name, info in tensors.items()} if "embed_tokens.weight" in tensors else tensors


def _named(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor by the name that the files give it."""
    if (folder / SINGLE_FILE).exists():
        return read_header(inside(folder, SINGLE_FILE))
    if not (folder / INDEX_FILE).exists():
        raise _no_weights(folder)
    weight_map = _read_index(inside(folder, INDEX_FILE))
    shards = {name: read_header(inside(folder, name)) for name in sorted(set(weight_map.values()))}
    tensors = {}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise ModelFileError(
                f"{folder / INDEX_FILE} places tensor {tensor!r:.80} in {shard}, which does not have it"
            )
        tensors[tensor] = shards[shard][tensor]
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Together they cover its data exactly: no hole, no overlap, no rest."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_JSON_BYTES):
                raise ModelFileError(
                    f"{file} has {size} bytes and a header length of {length}; "
                    f"allowed is what fits into the file, up to {_MAX_JSON_BYTES} (is the file truncated?)"
                )
            header = _parse_json(stream.read(length), file)
    except OSError as error:
        raise ModelFileError(f"cannot read {file}: {error}") from error
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _tensor_info(file, name, entry, start) for name, entry in header.items()}
    _check_cover(file, tensors, start, size)
    return tensors


def _tensor_info(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    where = f"{file}: tensor {name!r:.80}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelFileError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ModelFileError(f"{where} has dtype {dtype!r:.80}; supported are {', '.join(ITEM_SIZES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ModelFileError(
            f"{where} has shape {shape!r:.80}; allowed are at most {_MAX_DIMENSIONS} sizes from 0 to 2^62"
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ModelFileError(f"{where} has data_offsets {offsets!r:.80}; allowed are [begin, end] from 0 to 2^62")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise ModelFileError(
            f"{where} has shape {shape} of {dtype}, {math.prod(shape) * ITEM_SIZES[dtype]} bytes, "
            f"but its data_offsets {offsets} span {end - begin}"
        )
    return TensorInfo(file, dtype, tuple(shape), start + begin, end - begin)


def _check_cover(file: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            problem = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise ModelFileError(f"{file}: tensor {name!r:.80} at byte {info.offset} {problem}; expected {position}")
        position += info.nbytes
    if position != size:
        problem = "truncated" if position > size else "longer than its tensors"
        raise ModelFileError(f"{file} is {problem}: it has {size} bytes, its header describes {position}")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _MAX_SIZE for item in value)


def _read_index(file: Path) -> dict[str, str]:
    try:
        if (size := file.stat().st_size) > _MAX_JSON_BYTES:
            raise ModelFileError(f"{file} has {size} bytes; allowed are {_MAX_JSON_BYTES}")
        weight_map = _parse_json(file.read_bytes(), file).get("weight_map")
    except OSError as error:
        raise ModelFileError(f"cannot read {file}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{file} has no weight_map of tensor names to files")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise ModelFileError(
                f"{file} places tensor {tensor!r:.80} in {shard!r:.80}; "
                "allowed is the plain name of a .safetensors file beside it"
            )
    return weight_map


def _parse_json(data: bytes, file: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{file} has a malformed header or index: {error}") from error
    if not isinstance(parsed, dict):
        raise ModelFileError(f"{file} has a header or index that is a {type(parsed).__name__}; expected an object")
    return parsed


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r:.80} appears twice")
        result[key] = value
    return result


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder` as a real path: a regular file in it, or in the blobs of a hub cache's snapshot.
    Raises ModelFileError."""
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # hub cache: <model>/snapshots/<revision>/<name> -> <model>/blobs/<hash>
        allowed.append(root.parent.parent / "blobs")
    try:
        file = (root / name).resolve(strict=True)
        mode = file.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # a NUL; a loop of links, before Python 3.13
        raise ModelFileError(f"cannot read {folder / name}: {error}") from error
    if file.parent not in allowed:
        raise ModelFileError(f"{folder / name} links to {file}, outside of its folder; refused")
    if not stat.S_ISREG(mode):
        raise ModelFileError(f"{folder / name} is no regular file; refused")
    return file


def _no_weights(folder: Path) -> ModelFileError:
    if not folder.is_dir():
        return ModelFileError(f"{folder} is no folder")
    weight_files = f"{SINGLE_FILE}, or {INDEX_FILE} with its shards"
    for file in sorted(folder.iterdir()):
        if file.suffix in _PICKLES:
            return ModelFileError(
                f"{file} is refused: pickled weights can run code when loaded; allowed is {weight_files}"
            )
    return ModelFileError(f"{folder} has no weights; expected {weight_files}")
