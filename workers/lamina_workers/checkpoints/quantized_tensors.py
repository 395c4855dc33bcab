"""Quantised weights in safetensors files, as GPTQ, AWQ and compressed-tensors write them: packed, by their plain names.

Each keeps integers of 4 or 8 bits, several in an int32, with a scale for each group of inputs:

- GPTQ: `qweight` `[n_in / pack, n_out]`, packed along n_in, the lowest bits first; `qzeros` `[groups, n_out / pack]`,
  which in its first version are one less; `scales` `[groups, n_out]`; `g_idx` `[n_in]`, the group of each input.
- AWQ (gemm): `qweight` `[n_in, n_out / 8]`, packed along n_out in the order 0, 2, 4, 6, 1, 3, 5, 7; `qzeros` likewise.
- compressed-tensors, "pack-quantized": `weight_packed` `[n_out, n_in / pack]`, signed numbers plus half of the range;
  `weight_scale` `[n_out, groups]`, `weight_zero_point` `[n_out / pack, groups]`. "int-quantized": `weight`, int8.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamina_workers.checkpoints.checkpoint import TensorSource
from lamina_workers.checkpoints.packed_tensors import Codes, PackedTensor
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import read_config_json
from lamina_workers.model_config.config_keys import Keys

logger = logging.getLogger("lamina")

METHODS = ("gptq", "awq", "compressed-tensors")
_COMPRESSED = ("pack-quantized", "int-quantized")
_AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # the place of column i of eight within its int32
_PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "int-quantized": ("weight", "weight_scale", "weight_zero_point"),
}
_UNUSED = ("input_scale", "input_zero_point")  # activations are rounded as the kernels do it
_BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's weights are quantised. way: one of `_PARTS`; group: inputs that share a scale, 0: all of them;
    less: what the stored zero points lack."""

    way: str
    bits: int
    group: int
    less: int = 0


def read_quantization(folder: Path) -> Quantization | None:
    """What the folder's config.json says of its weights; None where they are floats, or of a way that the model's own
    family reads. Raises UnsupportedModelError for a way that is not known."""
    raw = read_config_json(folder)
    section = raw.get("quantization_config", raw.get("compression_config"))
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise ModelFileError(f"{folder}: quantization_config is {section!r:.80}, expected an object")
    keys = Keys(section, {})
    method = keys.text("quant_method", "")
    if method == "mxfp4":  # gpt-oss; see `decoder_weights`
        return None
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}
    if method not in readers:
        raise UnsupportedModelError(
            f"{folder}: weights are quantised by {method!r:.80}; supported are {', '.join(METHODS)}"
        )
    quantization = readers[method](keys)
    if quantization.bits not in _BITS:
        raise UnsupportedModelError(f"{folder}: {method} weights of {quantization.bits} bits; supported are 4 and 8")
    return quantization


def _gptq(keys: Keys) -> Quantization:
    version = keys.text("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(f"GPTQ's checkpoint_format is {version!r:.80}; supported are gptq, gptq_v2")
    group = keys.integer("group_size", -1, 1 << 20, -1)
    return Quantization("gptq", keys.integer("bits", 1, 32), max(group, 0), int(version == "gptq"))


def _awq(keys: Keys) -> Quantization:
    version = keys.text("version", "gemm").lower()
    if version != "gemm":
        raise UnsupportedModelError(f"AWQ's version is {version!r:.80}; supported is gemm")
    bits = keys.integer("bits", 1, 32, keys.integer("w_bit", 1, 32, 4))
    if bits != 4:
        raise UnsupportedModelError(f"AWQ weights of {bits} bits; supported are 4")
    return Quantization("awq", bits, max(keys.integer("group_size", -1, 1 << 20, 128), 0))


def _compressed(keys: Keys) -> Quantization:
    way = keys.text("format", "")
    if way not in _COMPRESSED:
        raise UnsupportedModelError(
            f"compressed-tensors' format is {way!r:.80}; supported are {', '.join(_COMPRESSED)}"
        )
    groups = keys.table("config_groups")
    schemes = {_scheme(name, group, way) for name, group in groups.items()}
    if len(schemes) != 1:
        raise UnsupportedModelError(f"compressed-tensors with {len(schemes)} schemes of weights; supported is one")
    return schemes.pop()


def _scheme(name: str, group: Any, way: str) -> Quantization:
    weights = Keys(Keys(group if isinstance(group, dict) else {}, {}).table("weights"), {})
    kind, strategy = weights.text("type", "int"), weights.text("strategy", "tensor")
    if kind != "int" or strategy not in ("tensor", "channel", "group"):
        raise UnsupportedModelError(
            f"compressed-tensors' {name!r:.80} has weights of type {kind!r:.80} by {strategy!r:.80}; supported are "
            "int, and tensor, channel or group"
        )
    size = weights.integer("group_size", -1, 1 << 20, 0) if strategy == "group" else 0
    return Quantization(way, weights.integer("num_bits", 1, 32, 8), max(size, 0))


class QuantizedTensors:
    """The tensors of `source`, with one `weight` in the place of the parts that each quantised weight has there."""

    def __init__(self, source: TensorSource, quantization: Quantization) -> None:
        self._source, self._quantization = source, quantization
        parts, names = _PARTS[quantization.way], set(source.names())
        scale = "scales" if "scales" in parts else "weight_scale"
        self._maps = {name.removesuffix(f".{scale}") for name in names if name.endswith(f".{scale}")}
        hidden = {f"{stem}.{part}" for stem in self._maps for part in (*parts, *_UNUSED)}
        self._parts = {stem: tuple(part for part in parts if f"{stem}.{part}" in names) for stem in self._maps}
        self._plain = names - hidden
        self._warned = False

    def names(self) -> Iterable[str]:
        return [*self._plain, *(f"{stem}.weight" for stem in self._maps)]

    def shape(self, name: str) -> Sequence[int]:
        stem = self._quantized(name)
        return self._source.shape(name) if stem is None else self._shape(stem)

    def tensor(self, name: str) -> torch.Tensor:
        stem = self._quantized(name)
        if stem is None:
            return self._source.tensor(name)
        if (order := self._act_order(stem)) is not None:
            return self._ordered(stem, order)
        return self._codes(stem).floats()

    def packed(self, name: str) -> PackedTensor | None:
        stem = self._quantized(name)
        if stem is None:
            return self._source.packed(name)
        if self._act_order(stem) is not None:
            if not self._warned:
                logger.warning("%s is unpacked: its inputs are grouped in an order of their own (desc_act)", name)
                self._warned = True
            return None
        return self._codes(stem)

    def release(self, name: str) -> None:
        stem = self._quantized(name)
        for part_name in [name] if stem is None else [f"{stem}.{part}" for part in self._parts[stem]]:
            self._source.release(part_name)

    def _quantized(self, name: str) -> str | None:
        """What a name begins with, where it is that of a quantised weight."""
        stem = name.removesuffix(".weight")
        return stem if stem != name and stem in self._maps else None

    def _shape(self, stem: str) -> tuple[int, int]:
        way, pack = self._quantization.way, 32 // self._quantization.bits
        which = {"gptq": "qweight", "awq": "qweight", "pack-quantized": "weight_packed"}.get(way, "weight")
        shape = tuple(self._source.shape(f"{stem}.{which}"))
        if len(shape) != 2:
            raise ModelFileError(f"tensor {stem}.{which} has shape {list(shape)}, expected two dimensions")
        first, second = shape
        if way == "gptq":
            return second, first * pack
        if way == "awq":
            return second * pack, first
        return first, second * (pack if way == "pack-quantized" else 1)

    def _part(self, stem: str, part: str, shape: tuple[int, ...], integers: bool = True) -> torch.Tensor:
        """A part of a weight, checked."""
        name = f"{stem}.{part}"
        if part not in self._parts[stem]:
            raise ModelFileError(f"the checkpoint lacks {name}")
        tensor = self._source.tensor(name)
        dtype = torch.int8 if (part, self._quantization.way) == ("weight", "int-quantized") else torch.int32
        if (tensor.dtype != dtype) if integers else not tensor.is_floating_point():
            raise ModelFileError(f"tensor {name} holds {tensor.dtype}, expected {dtype if integers else 'floats'}")
        if tuple(tensor.shape) != shape:
            raise ModelFileError(f"tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def _codes(self, stem: str) -> Codes:
        if self._quantization.way in _COMPRESSED:
            return self._compressed(stem)
        bits, pack = self._quantization.bits, 32 // self._quantization.bits
        n_out, n_in = self._shape(stem)
        groups = self._groups(stem, n_in)
        scales = self._part(stem, "scales", (groups, n_out), integers=False).float().T.contiguous()
        zeros = self._part(stem, "qzeros", (groups, n_out // pack))
        if n_out % pack:
            raise ModelFileError(f"tensor {stem}.qzeros has {n_out} outputs, expected a multiple of {pack}")
        zero = _unpacked(zeros, bits, self._order()) + self._quantization.less  # [groups, n_out]
        zero = (zero & ((1 << bits) - 1)).T
        packed = self._part(
            stem, "qweight", (n_in // pack, n_out) if self._quantization.way == "gptq" else (n_in, n_out // pack)
        )

        def read(rows: torch.Tensor) -> torch.Tensor:
            if self._quantization.way == "gptq":
                return _unpacked(packed[:, rows].T, bits).to(torch.uint8)
            first = int(rows.min()) // pack
            words = packed[:, first : int(rows.max()) // pack + 1]
            return _unpacked(words, bits, _AWQ_ORDER)[:, rows - first * pack].T.to(torch.uint8)

        return Codes(bits, n_in, read, scales, _mins(zero, scales, bits))

    def _compressed(self, stem: str) -> Codes:
        bits, half, pack = self._quantization.bits, 1 << (self._quantization.bits - 1), 32 // self._quantization.bits
        n_out, n_in = self._shape(stem)
        weight_shape, packs = (n_out, n_in), self._quantization.way == "pack-quantized"
        if packs and "weight_shape" in self._parts[stem]:
            listed_shape = self._source.tensor(f"{stem}.weight_shape").flatten().tolist()
            if listed_shape != list(weight_shape):
                raise ModelFileError(
                    f"tensor {stem}.weight_shape is {listed_shape!r:.80}, expected {list(weight_shape)}"
                )
        groups = self._groups(stem, n_in)
        scale_shape = tuple(self._source.shape(f"{stem}.weight_scale"))
        one = scale_shape in ((1,), (), (1, 1)) and n_out > 1  # of the whole tensor
        shape = scale_shape if one else (n_out, groups)
        scales = self._part(stem, "weight_scale", shape, integers=False).float().reshape(-1, groups)
        scales = scales.expand(n_out, groups).contiguous()
        mins = None
        if "weight_zero_point" in self._parts[stem]:
            points = self._source.tensor(f"{stem}.weight_zero_point")
            if packs and points.dtype == torch.int32 and tuple(points.shape) == (-(-n_out // pack), groups):
                zero = _unpacked(points.T, bits).T[:n_out]
            elif points.numel() in (1, n_out * groups) and not points.is_floating_point():
                zero = points.int().reshape(-1, groups).expand(n_out, groups) + half
            else:
                raise ModelFileError(
                    f"tensor {stem}.weight_zero_point has shape {list(points.shape)} of {points.dtype}"
                )
            mins = _mins(zero, scales, bits)
        if packs:
            packed = self._part(stem, "weight_packed", (n_out, n_in // pack))
            return Codes(bits, n_in, lambda rows: _unpacked(packed[rows], bits).to(torch.uint8), scales, mins)
        weight = self._part(stem, "weight", weight_shape)
        return Codes(bits, n_in, lambda rows: (weight[rows].short() + half).to(torch.uint8), scales, mins)

    def _groups(self, stem: str, n_in: int) -> int:
        group = self._quantization.group or n_in
        if n_in % group:
            raise ModelFileError(f"{stem} has {n_in} inputs in groups of {group}; allowed are groups that divide them")
        return n_in // group

    def _order(self) -> torch.Tensor | None:
        return _AWQ_ORDER if self._quantization.way == "awq" else None

    def _act_order(self, stem: str) -> torch.Tensor | None:
        """The group of each input, int64, where those of a group do not follow one another."""
        name = {"gptq": "g_idx", "pack-quantized": "weight_g_idx"}.get(self._quantization.way, "")
        if name not in self._parts[stem]:
            return None
        n_in = self._shape(stem)[1]
        groups = self._part(stem, name, (n_in,)).long()
        count = self._groups(stem, n_in)
        if int(groups.min()) < 0 or int(groups.max()) >= count:
            raise ModelFileError(f"tensor {stem}.{name} has groups outside of 0 to {count - 1}")
        return None if torch.equal(groups, torch.arange(n_in) // (n_in // count)) else groups

    def _ordered(self, stem: str, groups: torch.Tensor) -> torch.Tensor:
        """Floats whose inputs are of any groups."""
        codes = self._codes(stem)
        numbers = codes.read(torch.arange(len(codes.scales))).float()
        if codes.mins is None:
            return (numbers - (1 << (self._quantization.bits - 1))) * codes.scales[:, groups]
        return numbers * codes.scales[:, groups] + codes.mins[:, groups]


def _unpacked(packed: torch.Tensor, bits: int, order: torch.Tensor | None = None) -> torch.Tensor:
    """int32 `[n, m]` as the numbers in it, int32 `[n, m * 32 / bits]`; number i of each stands at place `order[i]`."""
    places = torch.arange(32 // bits, dtype=torch.int32) if order is None else order.int()
    return ((packed.unsqueeze(-1) >> (places * bits)) & ((1 << bits) - 1)).flatten(1)


def _mins(zero: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor | None:
    """-zero * scale; None where all zero points are in the middle."""
    if bool((zero == 1 << (bits - 1)).all()):
        return None
    return -(zero.float() * scales)
