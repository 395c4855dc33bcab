"""Experts that a checkpoint keeps together, one tensor for all of a layer, as tensors of each expert.

In most, the rows of gate stand before those of up. gpt-oss has them alternating, in MXFP4 or as floats. Each read takes
one part of one expert out of the file, so no layer's experts are dequantised at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from lamina_workers.decoder.checkpoint import TensorSource
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.packed_tensors import PackedTensor
from lamina_workers.errors import ModelFileError

MXFP4_BLOCK = 32  # numbers that share a scale
_SIGNLESS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = torch.tensor([*_SIGNLESS, *(-x for x in _SIGNLESS)])
# Of each byte its two numbers, that of the low four bits first, as one int32 of two bfloat16.
_OF_BYTE = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], 1).bfloat16().view(torch.int32).flatten()

_POWERS = torch.tensor([*(2.0 ** (scale - 127) for scale in range(255)), torch.nan]).bfloat16()


def published_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint whose parts are `shapes`: the same but for experts that are stacked."""
    moe = config.moe
    if moe is None or not moe.stacked:
        return dict(shapes)
    part, named = _part(config), config.family.experts
    found = {name: shape for name, shape in shapes.items() if not part.fullmatch(name)}
    hidden, size = config.hidden_size, moe.intermediate_size
    for layer in (layer for layer, sparse in enumerate(config.sparse) if sparse):
        for name, n_out, n_in in zip(named.stacked, (2 * size, hidden), (hidden, size), strict=True):
            at = f"model.layers.{layer}.{named.block}.{name}"
            if moe.stacked == "rows":
                found[at] = moe.experts, n_out, n_in
                continue
            found[f"{at}_bias"] = moe.experts, n_out
            if moe.stacked == "mxfp4":
                found[f"{at}_blocks"] = moe.experts, n_out, n_in // MXFP4_BLOCK, MXFP4_BLOCK // 2
                found[f"{at}_scales"] = moe.experts, n_out, n_in // MXFP4_BLOCK
            else:
                found[at] = moe.experts, n_in, n_out
    return found


def _part(config: ModelConfig) -> re.Pattern[str]:
    """Of the name of an expert's tensor: the block, the expert, the map, and what it is."""
    named = config.family.experts
    return re.compile(
        rf"(model\.layers\.\d+\.{named.block})\.experts\.(\d+)\.({'|'.join(filter(None, named.maps))})\.(weight|bias)"
    )


def found_stacked(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The model as it is published: with experts stacked, where the checkpoint, of those `names`, has them so."""
    tensor = f".{config.family.experts.block}.{config.family.experts.stacked[0]}"
    if config.moe is None or config.moe.stacked or not any(name.endswith(tensor) for name in names):
        return config
    return replace(config, moe=replace(config.moe, stacked="rows"))


class SeparateExperts:
    """The checkpoint `source`, whose tensors are `published_shapes`, with one tensor for each part of each expert."""

    def __init__(self, source: TensorSource, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        moe, self._named = config.moe, config.family.experts
        self._source = source
        self._shapes = shapes
        self._kind = "" if moe is None else moe.stacked
        self._part = _part(config)
        gate, up, down = self._named.maps
        size = 0 if moe is None else moe.intermediate_size
        apart = (slice(size), slice(size, None)) if self._kind == "rows" else (slice(0, None, 2), slice(1, None, 2))
        self._rows = {gate: apart[0], up: apart[1], down: slice(None)}

    def names(self) -> Iterable[str]:
        return self._shapes

    def shape(self, name: str) -> Sequence[int]:
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, or a part of one expert: a view, or bfloat16 where it was MXFP4."""
        if (part := self._part.fullmatch(name)) is None:
            return self._source.tensor(name)
        expert, rows = int(part[2]), self._rows[part[3]]
        stacked = [self._source.tensor(each) for each in self._stacked(part)]
        if part[4] == "bias" or self._kind == "rows":
            return stacked[0][expert, rows]
        if self._kind == "floats":
            return stacked[0][expert].T[rows]
        for each, tensor in zip(self._stacked(part), stacked, strict=True):
            if tensor.dtype != torch.uint8:
                raise ModelFileError(f"tensor {each} holds {tensor.dtype}, expected torch.uint8")
        blocks, scales = stacked
        return from_mxfp4(blocks[expert, rows], scales[expert, rows])

    def packed(self, name: str) -> PackedTensor | None:
        """Experts that are stacked are unpacked."""
        return self._source.packed(name) if self._part.fullmatch(name) is None else None

    def release(self, name: str) -> None:
        part = self._part.fullmatch(name)
        for each in [name] if part is None else self._stacked(part):
            self._source.release(each)

    def _stacked(self, part: re.Match[str]) -> list[str]:
        """The tensors that a part of an expert is in."""
        at = f"{part[1]}.{self._named.stacked[part[3] == self._named.maps[2]]}"
        if part[4] == "bias":
            return [f"{at}_bias"]
        return [f"{at}_blocks", f"{at}_scales"] if self._kind == "mxfp4" else [at]


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Numbers in MXFP4 (OCP Microscaling Formats 1.0) as bfloat16 `[n, blocks * 32]`, which has all of them exactly.

    blocks: uint8 `[n, blocks, 16]`, two numbers of 4 bits (sign, two bits of exponent, one of mantissa) in a byte, the
    first in the low bits; scales: uint8 `[n, blocks]`, each block's power of two plus 127 (255: NaN).
    """
    numbers = _OF_BYTE.index_select(0, blocks.flatten().int()).view(torch.bfloat16)
    return (numbers.view(*scales.shape, MXFP4_BLOCK) * _POWERS[scales.int()].unsqueeze(-1)).flatten(1)
