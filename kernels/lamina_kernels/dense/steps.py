"""The steps of programs of dense layers: linear maps and the small operations between them, in bfloat16.

The kernels are those of `few_rows`, `tiles`, `packed`, `dense_loops` and `gate_loops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lamina_kernels.compile import groups
from lamina_kernels.compile.programs import Step
from lamina_kernels.dense import dense_loops, few_rows, gate_loops, tiles
from lamina_kernels.dense.dense import Weight
from lamina_kernels.dense.dense_loops import ADD, PARALLEL
from lamina_kernels.packed import activations
from lamina_kernels.packed import multiply as packed
from lamina_kernels.packed.layout import Format
from lamina_kernels.packed.matrix import PackedMatrix

MAX_ROWS = few_rows.MAX_ROWS
HALF = torch.bfloat16
_SHARES = 2  # of a linear map, for each thread

Map = tuple[Weight, torch.Tensor | None]
"""W `[n_out, n_in]`, one that `few_rows` can multiply with or packed, and a bias `[n_out]`."""

Room = dict[tuple[str, int, int], torch.Tensor]
"""Memory of what is inside a program, by name, width and rows."""


class LinearSteps:
    """A linear map within a program: where it reads and writes may be changed from run to run."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.n_out, self.n_in = shape
        self.reader: Any = None
        """The block of the step that reads x."""
        self.writers: list[tuple[Any, str, int]] = []
        """Blocks with the address of y in a field, so many bytes from where y begins."""

    def read(self, x: int) -> None:
        self.reader.x = x

    def write(self, y: int) -> None:
        for block, field, offset in self.writers:
            setattr(block, field, y + offset)


class Builder:
    """Collects the steps of a program."""

    def __init__(self, room: Room, rows: int, threads: int, eps: float = 0.0, size: int = 2) -> None:
        self.rows, self.threads = rows, threads
        self.size = size
        """Bytes of a number: 2, or, of experts alone, 4."""
        self.most = MAX_ROWS
        """Rows that there is room for."""
        self.steps: list[Step] = []
        self._room, self._eps = room, eps
        self._loops = dense_loops.load_kernel(True)[0]

    def room(self, name: str, width: int) -> int:
        """Where `[rows, width]` inside a program are, for all programs of the thread."""
        return self.buffer(name, width, width * self.size)

    def buffer(self, name: str, width: int, row_bytes: int, each: int = 1) -> int:
        """Where rows of so many bytes are, by name and width, `each` for a row."""
        key = name, width, self.most * each
        if key not in self._room:
            self._room[key] = torch.empty(self.most * each * row_bytes, dtype=torch.uint8)
        return self._room[key].data_ptr()

    def linear(self, x: int, by: Map, y: int = 0, size: int = 2) -> LinearSteps:
        """y = x W^T + b, for addresses; size: bytes of a number of y."""
        weight, bias = by
        linear = LinearSteps(shape_of(weight))
        if not isinstance(weight, torch.Tensor):
            self._packed(linear, weight, size)
        elif self.rows >= tiles.MIN_ROWS and tiles.can_multiply(weight):
            self._tiles(linear, weight, size)
        else:
            block = few_rows.Arguments(
                shares=self.threads * _SHARES,
                w=weight.data_ptr(),
                rows=self.rows,
                n_in=linear.n_in,
                n_out=linear.n_out,
                size=size,
                identity=groups.IDENTITY,
            )
            linear.reader, linear.writers = block, [(block, "y", 0)]
            self.steps.append(Step(few_rows.load_kernel(), block, True))
        if bias is not None:
            added = self.small(ADD, linear.n_out, linear.n_out, y=address_of("bias", bias, HALF, linear.n_out))
            linear.writers.append((added, "x", 0))
        linear.read(x)
        linear.write(y)
        return linear

    def _tiles(self, to: LinearSteps, weight: torch.Tensor, size: int) -> None:
        """The steps of a map by tiles: x is written in lines, then multiplied."""
        write_lines, multiply_lines = tiles.load_kernels()
        lines = self.buffer("tiles", to.n_in, tiles.lines_size(MAX_ROWS, to.n_in) // MAX_ROWS)
        shared = self.rows * to.n_in >= tiles.PARALLEL
        to.reader = tiles.writing_arguments(self.rows, to.n_in, self.threads if shared else 1, lines)
        block = tiles.multiplying_arguments(weight, self.rows, size, self.threads * _SHARES, lines)
        to.writers = [(block, "y", 0)]
        self.steps.append(Step(write_lines, to.reader, shared or not self.steps))
        self.steps.append(Step(multiply_lines, block, True))

    def _packed(self, to: LinearSteps, parts: Sequence[PackedMatrix], size: int) -> None:
        """The steps of a packed map: x is rounded once, then each part writes beside the one before."""
        to.reader, lines, blocks = self.rounded([part.format for part in parts], to.n_in)
        column = 0
        for part in parts:
            n_out, _ = part.shape
            block = packed.arguments(part.format, self.rows, to.n_in, n_out, size, self.threads * _SHARES)
            block.x, block.blocks, block.w = lines, blocks, part.data.data_ptr()
            block.stride = to.n_out * size
            to.writers.append((block, "y", column * size))
            self.steps.append(Step(packed.load_kernel(part.format), block, True))
            column += n_out

    def rounded(self, formats: Sequence[Format], n_in: int, each: int = 1) -> tuple[Any, int, int]:
        """The step that rounds rows for packed maps, `each` for a row: its block, where it writes, and blocks a row."""
        blocks = max(packed.blocks_of(format, n_in) for format in formats)
        rows = self.rows * each
        shared = rows * n_in >= activations.PARALLEL
        reader = activations.arguments(rows, n_in, blocks, self.size, self.threads if shared else 1)
        reader.out = self.buffer("lines", blocks, blocks * activations.LINE, each)
        self.steps.append(Step(activations.load_kernel(), reader, shared or not self.steps))
        return reader, reader.out, blocks

    def small(self, operation: int, width: int, numbers: int, **fields: int) -> Any:
        """An operation of `dense_loops`. numbers: in a row of x. Returns the argument block."""
        shared = not self.steps or self.rows * numbers >= PARALLEL
        shares = min(self.threads, self.rows) if self.rows * numbers >= PARALLEL else 1
        block = dense_loops.Arguments(
            operation=operation, size=2, shares=shares, rows=self.rows, width=width, eps=self._eps, **fields
        )
        self.steps.append(Step(self._loops, block, shared))
        return block

    def gates(self, operation: int, width: int, groups: int, eps: float = 0.0, **fields: int) -> Any:
        """An operation of `gate_loops`. Returns the argument block."""
        shared = self.rows * width * groups >= PARALLEL
        block = gate_loops.Arguments(
            operation=operation,
            size=2,
            shares=min(self.threads, self.rows) if shared else 1,
            rows=self.rows,
            width=width,
            groups=groups,
            eps=eps,
            **fields,
        )
        self.steps.append(Step(gate_loops.load_kernel(True), block, shared))
        return block


def shape_of(weight: Weight) -> tuple[int, int]:
    """n_out and n_in of W."""
    if isinstance(weight, torch.Tensor):
        n_out, n_in = weight.shape
        return n_out, n_in
    return sum(part.shape[0] for part in weight), weight[0].shape[1]


def address_of(name: str, x: torch.Tensor, dtype: torch.dtype, numbers: int) -> int:
    """Where the numbers of `x` are, once it is certain that as many of that kind may be read there."""
    if x.dtype != dtype or x.numel() != numbers or not x.is_cpu or not x.is_contiguous():
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)} on {x.device} with strides {x.stride()}, expected {numbers} numbers "
            f"of {dtype}, contiguous, on a CPU"
        )
    return x.data_ptr()
