"""What a model's weights take in its files, and in memory by the ways in which an engine may keep them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from lamina.system.machine import Machine, native_dtype
from lamina_workers.checkpoints.gguf_checkpoint import read_record
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.checkpoints.safetensors_files import find_tensors
from lamina_workers.checkpoints.weight_loader import QUANTIZE, UNPACKED, Packing, kept_bytes
from lamina_workers.converted.models import model_config, way

FLOATS = {"bfloat16": 2, "float32": 4}
"""Bytes of a weight that is not packed."""


@dataclass(frozen=True, slots=True)
class WeightMemory:
    """A model's parameters, the bytes of each kind of them in its files, and those of each way to keep them in memory:
    bfloat16, float32, and packed where the files are, else int8 and int4. A model that is converted has floats
    alone."""

    parameters: int
    kinds: dict[str, int]
    ways: dict[str, int]

    @property
    def stored(self) -> int:
        """Bytes of the weights in the files."""
        return sum(self.kinds.values())

    def usual(self, machine: Machine) -> str:
        """The way of an engine on a CPU where nothing else is said."""
        return "packed" if "packed" in self.ways else native_dtype(machine)[0]


def weight_memory(folder: Path) -> WeightMemory:
    """Of the model in a folder, whose weights are not read. Raises ModelFileError, UnsupportedModelError."""
    packings: dict[str, Packing] = {}
    kinds: Counter[str] = Counter()
    with open_checkpoint(folder) as checkpoint:
        parameters = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
        if way(model_config(folder)) != "converted":
            packed = any(checkpoint.packed(name) is not None for name in checkpoint.names())
            quantized = {name: Packing(quantize=name) for name in sorted(QUANTIZE, reverse=True)}
            packings = {"packed": Packing(packed=True)} if packed else quantized
        ways = {name: kept_bytes(checkpoint, getattr(torch, name), UNPACKED) for name in FLOATS}
        ways |= {name: kept_bytes(checkpoint, torch.bfloat16, packing) for name, packing in packings.items()}
    if (record := read_record(folder)) is not None:
        for part in (part for entry in record.tensors.values() for part in entry.parts):
            kinds[part.kind] += part.nbytes
    else:
        for tensor in find_tensors(folder).values():
            kinds[tensor.dtype] += tensor.nbytes
    return WeightMemory(parameters, dict(kinds.most_common()), ways)
