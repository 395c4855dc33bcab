"""A checkpoint's tensors as views of memory-mapped safetensors files.

A tensor's bytes come into memory when they are first read and leave it with `release`, so code that repacks the weights
one by one never holds them twice.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch

from lamina_workers.checkpoints.packed_tensors import PackedTensor
from lamina_workers.checkpoints.safetensors_files import TensorInfo, find_tensors
from lamina_workers.errors import ModelFileError

if TYPE_CHECKING:
    from typing_extensions import Self

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class TensorSource(Protocol):
    """Named tensors of a checkpoint. A tensor may be a view of a file; `release` says that its pages may leave
    memory. A view stays valid after that, and reads them again where it must.

    `packed` is the matrix as the checkpoint has it, where that is not as floats, else None; `tensor` has its floats.
    Experts that are stacked, `[experts, n_out, n_in]`, are there one below the other.
    """

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> Sequence[int]: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def packed(self, name: str) -> PackedTensor | None: ...

    def release(self, name: str) -> None: ...


def check_tensors(source: TensorSource, wanted: dict[str, tuple[int, ...]], ignored: set[str]) -> None:
    """Raise ModelFileError unless `source` has exactly the tensors `wanted`. Takes no memory for any."""
    tensor_names = set(source.names())
    unexpected = tensor_names - wanted.keys() - ignored
    unexpected = {name for name in unexpected if not name.endswith("rotary_emb.inv_freq")}  # older files, computed here
    for problem, names in (("lacks", wanted.keys() - tensor_names), ("has unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ModelFileError(f"the checkpoint {problem} {', '.join(sorted(names)[:5])}{more}")
    for name, shape in wanted.items():
        if (stored_shape := tuple(source.shape(name))) != shape:
            raise ModelFileError(f"tensor {name} has shape {list(stored_shape)}, the config wants {list(shape)}")


class Renamed:
    """The tensors of `source` whose names begin with `prefix`, by other names: the parts of names in `renamed` are
    called what stands there."""

    def __init__(self, source: TensorSource, renamed: Mapping[str, str], prefix: str = "") -> None:
        self._source = source
        self._published = {_renamed(name, renamed): name for name in source.names() if name.startswith(prefix)}

    def names(self) -> Iterable[str]:
        return self._published

    def shape(self, name: str) -> Sequence[int]:
        return self._source.shape(self._published[name])

    def tensor(self, name: str) -> torch.Tensor:
        return self._source.tensor(self._published[name])

    def packed(self, name: str) -> PackedTensor | None:
        return self._source.packed(self._published[name])

    def release(self, name: str) -> None:
        self._source.release(self._published[name])


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    for part, other in renamed.items():
        name = name.replace(part, other)
    return name


class MappedFiles:
    """Files, mapped so that tensors can be views of them, until `close`. A context manager. Raises ModelFileError for a
    file that cannot be mapped."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        for file in files:
            try:
                with file.open("rb") as stream:
                    # Copy on write: torch wants a writable buffer, and no one can write through to the file.
                    self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise ModelFileError(f"cannot map {file}: {error}") from error

    def _bytes(self, file: Path, offset: int, nbytes: int) -> torch.Tensor:
        """A view of a file, uint8 `[nbytes]`."""
        if file not in self._maps:
            raise ModelFileError(f"{file} is closed")
        return torch.frombuffer(self._maps[file], dtype=torch.uint8, count=nbytes, offset=offset)

    def _view(self, file: Path, offset: int, nbytes: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A tensor as a view of a file."""
        data = self._bytes(file, offset, nbytes)
        if offset % dtype.itemsize:  # the formats do not promise alignment, kernels need it
            data = data.clone()
        return data.view(dtype).view(tuple(shape))

    def _give_back(self, file: Path, offset: int, nbytes: int) -> None:
        """Give back the memory that reading these bytes took. Views stay valid and are read from the file again."""
        if nbytes and file in self._maps and hasattr(mmap, "MADV_DONTNEED"):
            begin = offset - offset % mmap.PAGESIZE
            self._maps[file].madvise(mmap.MADV_DONTNEED, begin, offset + nbytes - begin)

    def close(self) -> None:
        """Forget the files. Each stays mapped only as long as a tensor that views it lives."""
        self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Checkpoint(MappedFiles):
    """The tensors of `model.safetensors`, or of the shards of `model.safetensors.index.json`, in a folder.

    Raises ModelFileError where the files are missing, truncated, malformed or refused; every offset is checked
    before anything is mapped. Use it as a context manager.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._tensors = find_tensors(self._folder)
        super().__init__({info.file for info in self._tensors.values()})

    def names(self) -> tuple[str, ...]:
        """The names of all tensors, in the order of the files."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`, without reading it."""
        return self._info(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` as a view of the file, in its dtype and shape, on the CPU.

        Writing to it changes neither the file nor what `release` brings back.
        """
        info = self._info(name)
        dtype = _DTYPES[info.dtype]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        return self._view(info.file, info.offset, info.nbytes, dtype, info.shape)

    def packed(self, name: str) -> PackedTensor | None:
        """None: a safetensors file has floats, or what `quantized_tensors` reads."""
        return None

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._info(name).dtype]

    def release(self, name: str) -> None:
        info = self._info(name)
        self._give_back(info.file, info.offset, info.nbytes)

    def close(self) -> None:
        super().close()
        self._tensors.clear()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelFileError(f"{self._folder} has no tensor {name!r} (or is closed)") from None
