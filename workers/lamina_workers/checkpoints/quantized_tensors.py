"""Quantised weights in safetensors files, as GPTQ, AWQ and compressed-tensors write them: packed, by their plain names.

GPTQ, AWQ and compressed-tensors' "pack-quantized" keep integers of 4 or 8 bits, several in an int32, with a scale for
each group of inputs:

- GPTQ: `qweight` `[n_in / pack, n_out]`, packed along n_in, the lowest bits first; `qzeros` `[groups, n_out / pack]`,
  which in its first version are one less; `scales` `[groups, n_out]`; `g_idx` `[n_in]`, the group of each input.
- AWQ (gemm): `qweight` `[n_in, n_out / 8]`, packed along n_out in the order 0, 2, 4, 6, 1, 3, 5, 7; `qzeros` likewise.
- compressed-tensors, "pack-quantized": `weight_packed` `[n_out, n_in / pack]`, signed numbers plus half of the range;
  `weight_scale` `[n_out, groups]`, `weight_zero_point` `[n_out / pack, groups]`. "int-quantized": `weight`, int8.

Floats of few bits:

- "float-quantized": e4m3 `[n_out, n_in]` under the weight's own name, and behind that name `_scale` or `_scale_inv`,
  which e4m3 is multiplied by: one, one a row, or one a block of rows and columns, at the ends smaller. Experts may be
  stacked, `[experts, n_out, n_in]`, with a scale's dimensions alike.
- "nvfp4" (modelopt): e2m1, two in a byte, the first in the low bits, `[n_out, n_in / 2]`; `weight_scale` e4m3
  `[n_out, n_in / 16]`; `weight_scale_2`, one number, multiplies those. "nvfp4-pack-quantized": `weight_packed`,
  `weight_scale`, and `weight_global_scale`, which divides.
- "mxfp4" (gpt-oss; OCP Microscaling Formats 1.0): e2m1 as `_blocks` `[..., n_in / 32, 16]`, `_scales`
  `[..., n_in / 32]`, powers of two plus 127. "mxfp4-pack-quantized": `weight_packed` `[n_out, n_in / 2]`,
  `weight_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from lamina_kernels.packed.pack import FORMATS
from lamina_workers.checkpoints.checkpoint import Checkpoint
from lamina_workers.checkpoints.packed_tensors import (
    E2M1_ZERO,
    MXFP4_BLOCK,
    Codes,
    Mxfp4,
    PackedTensor,
    Rounded,
    chosen,
    e2m1,
)
from lamina_workers.checkpoints.quantization import Quantization
from lamina_workers.errors import ModelFileError

_AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # the place of column i of eight within its int32
# Of each way what stands behind a weight's name, or, of GPTQ and AWQ, in the place of `.weight`.
_PARTS: dict[str, dict[str, str]] = {
    "gptq": {"codes": ".qweight", "zeros": ".qzeros", "scales": ".scales", "order": ".g_idx"},
    "awq": {"codes": ".qweight", "zeros": ".qzeros", "scales": ".scales"},
    "pack-quantized": {
        "codes": "_packed",
        "scales": "_scale",
        "zeros": "_zero_point",
        "shape": "_shape",
        "order": "_g_idx",
    },
    "int-quantized": {"codes": "", "scales": "_scale", "zeros": "_zero_point"},
    "float-quantized": {"codes": "", "scales": "_scale"},
    "nvfp4": {"codes": "", "scales": "_scale", "factor": "_scale_2"},
    "nvfp4-pack-quantized": {"codes": "_packed", "scales": "_scale", "factor": "_global_scale"},
    "mxfp4": {"codes": "_blocks", "scales": "_scales"},
    "mxfp4-pack-quantized": {"codes": "_packed", "scales": "_scale"},
}
_INVERSE = "_scale_inv"  # another name of float-quantized's scales
_MXFP4 = ("mxfp4", "mxfp4-pack-quantized")
_NVFP4 = ("nvfp4", "nvfp4-pack-quantized")
_TINY = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
# Activations are rounded as the kernels do it, and keys and values stay what the engine keeps.
_UNUSED = {"input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "activation_scale"}
_UNUSED |= {"k_scale", "v_scale", "q_scale", "output_scale", "prob_output_scale"}


class QuantizedTensors:
    """The tensors of `source`, with one tensor in the place of the parts that each quantised weight has there. Raises
    ModelFileError where floats of 8 bits lack their scales."""

    def __init__(self, source: Checkpoint, quantization: Quantization) -> None:
        self._source, self._quantization = source, quantization
        self._behind = ".weight" if self._way in ("gptq", "awq") else ""
        names = dict.fromkeys(name for name in source.names() if name.rpartition(".")[2] not in _UNUSED)
        self._parts: dict[str, dict[str, str]] = {}  # of each quantised weight their names
        roles = _PARTS[self._way]
        for scales in (roles["scales"], _INVERSE) if self._way == "float-quantized" else (roles["scales"],):
            for stem in [name.removesuffix(scales) for name in names if name.endswith(scales)]:
                if stem + roles["codes"] in names:
                    parts = {role: stem + part for role, part in (roles | {"scales": scales}).items()}
                    self._parts[stem] = {role: name for role, name in parts.items() if name in names}
        hidden = {name for parts in self._parts.values() for name in parts.values()}
        self._plain = dict.fromkeys(name for name in names if name not in hidden)
        check_scaled(source, self._plain)

    @property
    def _way(self) -> str:
        return self._quantization.way

    def names(self) -> Iterable[str]:
        return [*self._plain, *(f"{stem}{self._behind}" for stem in self._parts)]

    def shape(self, name: str) -> Sequence[int]:
        stem = self._quantized(name)
        return self._source.shape(name) if stem is None else self._shape(stem)

    def tensor(self, name: str) -> torch.Tensor:
        stem = self._quantized(name)
        return self._source.tensor(name) if stem is None else self._packed(stem).floats().view(self._shape(stem))

    def packed(self, name: str) -> PackedTensor | None:
        stem = self._quantized(name)
        return self._source.packed(name) if stem is None else self._packed(stem)

    def release(self, name: str) -> None:
        stem = self._quantized(name)
        for part_name in [name] if stem is None else self._parts[stem].values():
            self._source.release(part_name)

    def _quantized(self, name: str) -> str | None:
        """What a name begins with, where it is that of a quantised weight."""
        stem = name.removesuffix(self._behind)
        return stem if stem + self._behind == name and stem in self._parts else None

    def _packed(self, stem: str) -> PackedTensor:
        if self._way in _MXFP4:
            return self._mxfp4(stem)
        if self._way in ("float-quantized", *_NVFP4):
            return self._floats(stem)
        codes = self._compressed(stem) if self._way in ("pack-quantized", "int-quantized") else self._codes(stem)
        order = self._act_order(stem)
        if order is None and codes.kind in FORMATS:
            return codes
        group = codes.n_in // codes.scales.shape[1]
        return _ordered(codes, torch.arange(codes.n_in) // group if order is None else order)

    def _shape(self, stem: str) -> tuple[int, ...]:
        """A weight's own: `[n_out, n_in]`, or with experts before that."""
        name, way = self._parts[stem]["codes"], self._way
        shape = self._source.shape(name)
        stacked = {"float-quantized": (2, 3), "mxfp4": (3, 4)}.get(way, (2,))
        if len(shape) not in stacked or 0 in shape:
            raise ModelFileError(
                f"tensor {name} has shape {list(shape)}, expected {' or '.join(map(str, stacked))} dimensions above 0"
            )
        *first, last = shape
        if way == "mxfp4":
            return *first[:-1], first[-1] * MXFP4_BLOCK
        if way == "gptq":
            return last, first[0] * self._pack
        if way == "awq":
            return last * self._pack, first[0]
        pack = self._pack if way == "pack-quantized" else 2 if way in (*_NVFP4, *_MXFP4) else 1
        return *first, last * pack

    @property
    def _pack(self) -> int:
        return 32 // self._quantization.bits

    def _matrix(self, stem: str) -> tuple[int, int]:
        """The rows of all experts, and the inputs."""
        *rows, n_in = self._shape(stem)
        return math.prod(rows), n_in

    def _part(
        self, stem: str, role: str, shape: Sequence[int] | None, dtype: torch.dtype | None = torch.int32
    ) -> torch.Tensor:
        """A part of a weight, checked. shape, None: any; dtype, None: any floats."""
        name = self._parts[stem].get(role)
        if name is None:
            raise ModelFileError(f"the checkpoint lacks {stem}{_PARTS[self._way][role]}")
        tensor = self._source.tensor(name)
        if (tensor.dtype != dtype) if dtype is not None else not tensor.is_floating_point():
            raise ModelFileError(f"tensor {name} holds {tensor.dtype}, expected {dtype or 'floats'}")
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ModelFileError(f"tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def _finite(self, stem: str, role: str, shape: Sequence[int] | None) -> torch.Tensor:
        """Scales as float32, checked."""
        scales = self._part(stem, role, shape, None).float()
        if not scales.isfinite().all():
            raise ModelFileError(f"tensor {self._parts[stem][role]} has scales that are not finite")
        return scales

    def _mxfp4(self, stem: str) -> Mxfp4:
        shape, (n_out, n_in) = self._shape(stem), self._matrix(stem)
        blocks = shape[-1] // MXFP4_BLOCK
        per_block = (blocks, MXFP4_BLOCK // 2) if self._way == "mxfp4" else (shape[-1] // 2,)
        codes = self._part(stem, "codes", (*shape[:-1], *per_block), torch.uint8)
        if shape[-1] % MXFP4_BLOCK:
            raise ModelFileError(f"{stem} has {shape[-1]} inputs; allowed are multiples of {MXFP4_BLOCK}")
        powers = self._part(stem, "scales", (*shape[:-1], blocks), torch.uint8)
        return Mxfp4(self._parts[stem]["scales"], codes.view(n_out, n_in // 2), powers.view(n_out, -1))

    def _floats(self, stem: str) -> Rounded:
        """Floats of 8 or 4 bits with scales."""
        fp8, shape, (n_out, n_in) = self._way == "float-quantized", self._shape(stem), self._matrix(stem)
        codes = self._part(stem, "codes", None, torch.float8_e4m3fn if fp8 else torch.uint8).view(n_out, -1)
        rows, group = self._quantization.rows or shape[-2], self._quantization.group or n_in
        grid = (*shape[:-2], -(-shape[-2] // rows), -(-n_in // group))
        scales = self._finite(stem, "scales", None)
        squeezed = [n for n in scales.shape if n > 1] == [n for n in grid if n > 1]
        if tuple(scales.shape) != grid and (not squeezed or scales.ndim == len(grid)):
            raise ModelFileError(
                f"tensor {self._parts[stem]['scales']} has shape {list(scales.shape)}, expected {list(grid)}, or "
                "that without or with more dimensions of 1"
            )
        if not fp8:
            factor = self._finite(stem, "factor", None).flatten()
            if len(factor) != 1 or float(factor) <= 0:
                raise ModelFileError(f"tensor {self._parts[stem]['factor']} must be one number above 0")
            scales = scales * (factor if self._way == "nvfp4" else 1 / factor) / 2  # of doubled e2m1
        scales = scales.reshape(-1, grid[-1])

        def read(numbers: torch.Tensor) -> torch.Tensor:
            part = chosen(codes, numbers)
            floats = part.float() if fp8 else e2m1(part).float().sub_(E2M1_ZERO)
            places = numbers // shape[-2] * grid[-2] + numbers % shape[-2] // rows
            return floats.mul_(scales[places].repeat_interleave(group, 1)[:, :n_in])

        return Rounded((n_out, n_in), read)

    def _codes(self, stem: str) -> Codes:
        bits, pack = self._quantization.bits, self._pack
        n_out, n_in = self._matrix(stem)
        groups = self._groups(stem, n_in)
        scales = self._finite(stem, "scales", (groups, n_out)).T.contiguous()
        zeros = self._part(stem, "zeros", (groups, n_out // pack))
        if n_out % pack:
            raise ModelFileError(f"{stem} has {n_out} outputs, expected a multiple of {pack}")
        zero = _unpacked(zeros, bits, self._order()) + self._quantization.less  # [groups, n_out]
        zero = (zero & ((1 << bits) - 1)).T
        packed = self._part(stem, "codes", (n_in // pack, n_out) if self._way == "gptq" else (n_in, n_out // pack))

        def read(rows: torch.Tensor) -> torch.Tensor:
            if self._way == "gptq":
                return _unpacked(packed[:, rows].T, bits).to(torch.uint8)
            first = int(rows.min()) // pack
            words = packed[:, first : int(rows.max()) // pack + 1]
            return _unpacked(words, bits, _AWQ_ORDER)[:, rows - first * pack].T.to(torch.uint8)

        return Codes(bits, n_in, read, scales, _mins(zero, scales, bits))

    def _compressed(self, stem: str) -> Codes:
        bits, half, pack = self._quantization.bits, 1 << (self._quantization.bits - 1), self._pack
        n_out, n_in = self._matrix(stem)
        packs, parts = self._way == "pack-quantized", self._parts[stem]
        if "shape" in parts:
            listed_shape = self._source.tensor(parts["shape"]).flatten().tolist()
            if listed_shape != [n_out, n_in]:
                raise ModelFileError(f"tensor {parts['shape']} is {listed_shape!r:.80}, expected {[n_out, n_in]}")
        groups = self._groups(stem, n_in)
        scale_shape = tuple(self._source.shape(parts["scales"]))
        one = scale_shape in ((1,), (), (1, 1)) and n_out > 1  # of the whole tensor
        scales = self._finite(stem, "scales", scale_shape if one else (n_out, groups)).reshape(-1, groups)
        scales = scales.expand(n_out, groups).contiguous()
        mins = None
        if "zeros" in parts:
            points = self._source.tensor(parts["zeros"])
            if packs and points.dtype == torch.int32 and tuple(points.shape) == (-(-n_out // pack), groups):
                zero = _unpacked(points.T, bits).T[:n_out]
            elif points.numel() in (1, n_out * groups) and not points.is_floating_point():
                zero = points.int().reshape(-1, groups).expand(n_out, groups) + half
            else:
                raise ModelFileError(f"tensor {parts['zeros']} has shape {list(points.shape)} of {points.dtype}")
            mins = _mins(zero, scales, bits)
        if packs:
            packed = self._part(stem, "codes", (n_out, n_in // pack))
            return Codes(bits, n_in, lambda rows: _unpacked(packed[rows], bits).to(torch.uint8), scales, mins)
        weight = self._part(stem, "codes", (n_out, n_in), torch.int8)
        return Codes(bits, n_in, lambda rows: (weight[rows].short() + half).to(torch.uint8), scales, mins)

    def _groups(self, stem: str, n_in: int) -> int:
        group = self._quantization.group or n_in
        if n_in % group:
            raise ModelFileError(f"{stem} has {n_in} inputs in groups of {group}; allowed are groups that divide them")
        return n_in // group

    def _order(self) -> torch.Tensor | None:
        return _AWQ_ORDER if self._way == "awq" else None

    def _act_order(self, stem: str) -> torch.Tensor | None:
        """The group of each input, int64, where those of a group do not follow one another."""
        if "order" not in self._parts[stem]:
            return None
        n_in = self._matrix(stem)[1]
        groups = self._part(stem, "order", (n_in,)).long()
        count = self._groups(stem, n_in)
        if int(groups.min()) < 0 or int(groups.max()) >= count:
            raise ModelFileError(f"tensor {self._parts[stem]['order']} has groups outside of 0 to {count - 1}")
        return None if torch.equal(groups, torch.arange(n_in) // (n_in // count)) else groups


def check_scaled(source: Checkpoint, names: Iterable[str]) -> None:
    """Raise ModelFileError where tensors that are no quantised weights hold floats of 8 bits."""
    for name in names:
        if source.dtype(name) in _TINY:
            raise ModelFileError(
                f"tensor {name} holds {source.dtype(name)} without scales that config.json's quantization_config "
                "describes; allowed are floats of 16 to 64 bits"
            )


def _ordered(codes: Codes, groups: torch.Tensor) -> Rounded:
    """Codes for which there are no tiles. groups: int64 `[n_in]`, the group of each input."""

    def read(rows: torch.Tensor) -> torch.Tensor:
        numbers = codes.read(rows).float()
        if codes.mins is None:
            return (numbers - (1 << (codes.bits - 1))) * codes.scales[rows][:, groups]
        return numbers * codes.scales[rows][:, groups] + codes.mins[rows][:, groups]

    return Rounded(codes.shape, read)


def _unpacked(packed: torch.Tensor, bits: int, order: torch.Tensor | None = None) -> torch.Tensor:
    """int32 `[n, m]` as the numbers in it, int32 `[n, m * 32 / bits]`; number i of each stands at place `order[i]`."""
    places = torch.arange(32 // bits, dtype=torch.int32) if order is None else order.int()
    return ((packed.unsqueeze(-1) >> (places * bits)) & ((1 << bits) - 1)).flatten(1)


def _mins(zero: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor | None:
    """-zero * scale; None where all zero points are in the middle."""
    if bool((zero == 1 << (bits - 1)).all()):
        return None
    return -(zero.float() * scales)
