"""What a model's weights take in memory, by the ways in which an engine may keep them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lamina_kernels.packed.pack import bytes_of, can_pack
from lamina_workers.checkpoints.gguf_checkpoint import read_record
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.checkpoints.safetensors_files import find_tensors
from lamina_workers.checkpoints.weight_loader import QUANTIZE, Packing
from lamina_workers.converted.models import model_config, way

FLOATS = {"bfloat16": 2, "float32": 4}
"""Bytes of a weight that is not packed."""
_TABLES = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class WeightMemory:
    """A model's parameters, the bytes of them in its files, and those of each way to keep them in memory: bfloat16,
    float32, and packed where the files are, else int8 and int4. A model that is converted has floats alone."""

    parameters: int
    stored: int
    ways: dict[str, int]


def weight_memory(folder: Path) -> WeightMemory:
    """Of the model in a folder, whose weights are not read. Raises ModelFileError, UnsupportedModelError."""
    converted = way(model_config(folder)) == "converted"
    with open_checkpoint(folder) as checkpoint:
        tensors = {name: (tuple(checkpoint.shape(name)), checkpoint.packed(name)) for name in checkpoint.names()}
    parameters = sum(math.prod(shape) for shape, _ in tensors.values())
    ways = {name: parameters * size for name, size in FLOATS.items()}
    packings = {"packed": Packing(packed=True)}
    if all(packed is None for _, packed in tensors.values()):
        packings = {name: Packing(quantize=name) for name in sorted(QUANTIZE, reverse=True)}
    for name, packing in packings.items() if not converted else ():
        total = 0
        for tensor, (shape, packed) in tensors.items():
            kind = packing.kind_of(packed, plain=len(shape) != 2, wide=tensor.endswith(_TABLES))
            fits = kind is not None and len(shape) == 2 and can_pack(kind, *shape)
            total += bytes_of(kind, *shape) if kind is not None and fits else math.prod(shape) * FLOATS["bfloat16"]
        ways[name] = total
    record = read_record(folder)
    entries = find_tensors(folder) if record is None else record.tensors
    return WeightMemory(parameters, sum(entry.nbytes for entry in entries.values()), ways)
