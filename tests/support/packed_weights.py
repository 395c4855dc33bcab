"""Packed weights of random codes, put where `lamina_kernels.packed.layout` says one by one, and their values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.packed.layout import BLOCK, LAYOUTS, ROWS, Format, packed_bytes, tiles_of

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Packed:
    """W `[n_out, n_in]`. data: uint8 [bytes], as the kernels read it; values: float64, exactly what it stands for."""

    format: Format
    data: torch.Tensor
    values: torch.Tensor


def random_packed(format: Format, n_out: int, n_in: int, seed: int = 0) -> Packed:
    """Random codes and scales; weights are about as large as those of a model."""
    draw, layout = np.random.default_rng(seed), LAYOUTS[format]
    rows, columns = tiles_of(n_out) * ROWS, layout.groups(n_in) * layout.group
    codes = np.zeros((rows, columns), np.uint8)
    codes[:n_out, :n_in] = draw.integers(0, 1 << layout.bits, (n_out, n_in))
    part = 16 if layout.bits == 6 else BLOCK
    shape = rows, columns // part
    size = n_in**-0.5 / (1 << layout.bits)

    def halves(*shape: int) -> Array:
        return (draw.uniform(0.2, 1.0, shape) * size).astype(np.float16)

    if layout.d < 0:
        scale, minimum = halves(*shape), -halves(*shape) * np.float16(1 << (layout.bits - 1))
        d = dmin = np.ones((rows, columns // layout.group), np.float16)
        offset = minimum.astype(float) if layout.min >= 0 else scale.astype(float) * -layout.zero
        factor = scale.astype(float)
    else:
        d, dmin = halves(rows, columns // layout.group), halves(rows, columns // layout.group)
        signed = layout.bits == 6
        scale = draw.integers(-128 if signed else 0, 128 if signed else 64, shape).astype(
            np.int8 if signed else np.uint8
        )
        minimum = draw.integers(0, 64, shape).astype(np.uint8)
        factor = scale * np.repeat(d.astype(float), layout.group // part, 1)
        lowest = minimum * np.repeat(dmin.astype(float), layout.group // part, 1)
        offset = factor * -layout.zero if layout.min < 0 else -lowest
    numbers = np.array([12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0])[codes] if layout.table else codes
    values = numbers * np.repeat(factor, part, 1) + np.repeat(offset, part, 1)
    data = torch.empty(packed_bytes(format, n_out, n_in), dtype=torch.uint8)
    place(format, codes, {"scale": scale, "min": minimum, "d": d, "dmin": dmin}, data.numpy())
    return Packed(format, data, torch.from_numpy(values[:n_out, :n_in]))


def place(format: Format, codes: Array, arrays: dict[str, Array], data: Array) -> None:
    """Codes `[rows, columns]` and arrays of their scales into the records of data."""
    layout = LAYOUTS[format]
    records = data.reshape(len(codes) // ROWS, -1, layout.record)
    records[:] = 0
    for tile, group in np.ndindex(*records.shape[:2]):
        record, rows = records[tile, group], slice(ROWS * tile, ROWS * (tile + 1))
        for i in range(layout.blocks):
            first = group * layout.group + i * BLOCK
            block = record[i * layout.block : (i + 1) * layout.block]
            block[:] = place_block(layout.bits, codes[rows, first : first + BLOCK])
        for name, array in arrays.items():
            offset = getattr(layout, name)
            if offset >= 0:
                width = array.shape[1] * layout.group // codes.shape[1]
                of = np.ascontiguousarray(array[rows, group * width : (group + 1) * width].T)
                record[offset : offset + of.nbytes] = of.view(np.uint8).ravel()


def place_block(bits: int, codes: Array) -> Array:
    """The bytes of a block with codes `[16, 32]`."""
    vectors = [codes[:, 4 * q : 4 * q + 4].ravel() for q in range(8)]
    if bits == 8:
        return np.concatenate(vectors)
    low = [(vectors[q] & 15) | (vectors[q + 4] & 15) << 4 for q in range(4)]
    if bits == 4:
        return np.concatenate(low)
    if bits == 5:
        return np.concatenate([*low, *(np.packbits(v >> 4, bitorder="little") for v in vectors)])
    high = [sum((vectors[4 * v + f] >> 4) << (2 * f) for f in range(4)) for v in range(2)]
    return np.concatenate([*low, *high])
