"""A model as other programs read it: its folder with floats in one safetensors file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lamina_workers.checkpoints.checkpoint import TensorSource
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.checkpoints.packed_tensors import EVERY, unpack_into
from lamina_workers.checkpoints.safetensors_files import SINGLE_FILE
from lamina_workers.model_config.config import read_config_json

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
_BLOCK = 16 << 20  # numbers
_CONFIG = "config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def export(folder: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the model in `folder`, as `resolve` gives it, to the new folder `target`, unpacked to `dtype`, bfloat16 or
    float32. Returns `target`. Raises ModelFileError, and OSError as it comes."""
    target.mkdir(parents=True)
    config = {key: value for key, value in read_config_json(folder).items() if key != "quantization_config"}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (target / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in _TOKENIZER:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    with open_checkpoint(folder) as source, (target / SINGLE_FILE).open("wb") as stream:
        for block in _safetensors(source, dtype):
            stream.write(block)
    return target


def _safetensors(source: TensorSource, dtype: torch.dtype) -> Iterator[bytes]:
    """The bytes of a safetensors file, some rows at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    names = list(source.names())
    for name in names:
        shape = list(source.shape(name))
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [total, total + size]}
        total += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts aligned
    yield len(encoded).to_bytes(8, "little") + encoded
    for name in names:
        for block in _blocks(source, name, dtype):
            yield block.contiguous().view(torch.uint8).numpy().tobytes()
        source.release(name)


def _blocks(source: TensorSource, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    packed = source.packed(name)
    if packed is None:
        yield source.tensor(name).to(dtype)
        return
    n_out, n_in = packed.shape
    step = max(1, _BLOCK // n_in)
    for rows in torch.arange(n_out).split(step):
        block = torch.empty(len(rows), n_in, dtype=dtype)
        unpack_into(block, packed, rows, EVERY)
        yield block
