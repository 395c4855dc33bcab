"""What a state layer is given: the rows of a batch, what its weights say, and checks of the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.states.layout import StateLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Ints = npt.NDArray[np.int64]
Pages = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class StateRows:
    """The rows of a batch. An item is one head of one row; items stand row by row, in a row head by head.

    count: int64 `[rows]`, tokens of each row, at least 1. heads: of each row, ascending numbers among all the layer's
    heads. group: heads that share a key head. A row's key heads are those of its heads, ascending.

    replay: int64 `[rows]` or None, so many tokens before each row's are taken into its states first, from what is kept
    of their inputs. keeps: bool `[rows]` or None, of these rows the inputs are kept, and the states that stand before
    their tokens. start: int64 `[rows]`, where each row begins in its sequence; needed with either.
    """

    count: Ints
    heads: Sequence[Ints]
    group: int = 1
    replay: Ints | None = None
    keeps: npt.NDArray[np.bool_] | None = None
    start: Ints | None = None

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"group must be at least 1, got {self.group}")
        if self.count.ndim != 1 or len(self.heads) != len(self.count):
            raise ValueError(f"heads must be given for each row, got {len(self.heads)} for count {self.count.shape}")
        if len(self.count) and self.count.min() < 1:
            raise ValueError(f"count must be at least 1, got {int(self.count.min())}")
        for row, heads in enumerate(self.heads):
            if not len(heads) or heads[0] < 0 or (np.diff(heads) < 1).any():
                raise ValueError(f"heads of row {row} must be ascending, from 0 on and not empty, got {list(heads)}")

    @property
    def items(self) -> int:
        return sum(map(len, self.heads))

    @property
    def vectors(self) -> int:
        """What comes out: one vector a token and head."""
        return sum(int(count) * len(heads) for count, heads in zip(self.count, self.heads, strict=True))

    @property
    def end(self) -> int:
        """One more than the highest number of a head."""
        return max((int(heads[-1]) + 1 for heads in self.heads), default=0)

    def key_heads(self, row: int) -> Ints:
        """Numbers of the key heads of a row's heads, ascending."""
        return np.unique(self.heads[row] // self.group)

    def width(self, layout: StateLayout, row: int) -> int:
        """Numbers of x a token of a row: q of its key heads, k of them, v of its heads."""
        return 2 * len(self.key_heads(row)) * layout.d_k + len(self.heads[row]) * layout.d_v


@dataclass(frozen=True, slots=True)
class StateConstants:
    """What a layer's weights give to its states, float32, for `heads` heads and `key_heads` key heads.

    conv: `[channels, conv]`, channels in the order of x: q of all key heads, k of them, v of all heads; the last weight
    is that of the newest token. bias: `[channels]` or None. skip: `[heads]` or None: mamba2's D. decays: `[heads]` or
    None: lightning's log decay a token. scale multiplies q.
    """

    heads: int
    key_heads: int
    scale: float
    conv: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    decays: torch.Tensor | None = None
    taps: torch.Tensor | None = field(init=False, default=None)  # conv as kernels read it: `[conv, channels]`
    shift: torch.Tensor | None = field(init=False, default=None)  # bias, zeros where there is none

    def __post_init__(self) -> None:
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise ValueError(f"heads must be a multiple of key_heads, got {self.heads} and {self.key_heads}")
        for name in ("bias", "skip", "decays"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, getattr(self, name).contiguous())
        if self.conv is not None:
            object.__setattr__(self, "taps", self.conv.t().contiguous() if self.conv.ndim == 2 else None)
            object.__setattr__(self, "shift", torch.zeros(len(self.conv)) if self.bias is None else self.bias)

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    def check(self, layout: StateLayout, group: int, end: int) -> None:
        """Raise ValueError unless these are constants of a layer of such states, with heads below `end` in rows."""
        if self.group != group or end > self.heads:
            raise ValueError(
                f"rows must have heads below {self.heads}, {self.group} a key head; got heads below {end}, {group} "
                "a key head"
            )
        channels = 2 * self.key_heads * layout.d_k + self.heads * layout.d_v
        shapes = {
            "conv": (channels, layout.conv) if layout.conv else None,
            "bias": (channels,) if self.bias is not None and layout.conv else None,
            "skip": (self.heads,) if self.skip is not None and layout.kind == "mamba2" else None,
            "decays": (self.heads,) if layout.kind == "lightning" else None,
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if (tensor is None) != (shape is None):
                requirement = "no tensor" if shape is None else f"float32 {list(shape)}"
                raise ValueError(f"{name} of a {layout.kind} layer with conv {layout.conv} must be {requirement}")
            if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
                raise ValueError(f"{name} must be float32 {list(shape or ())}, got {tensor.dtype} {list(tensor.shape)}")


def check_tables(
    layout: StateLayout, items: int, arena: torch.Tensor, source: Pages, target: Pages, kept: Pages | None = None
) -> None:
    """Raise ValueError unless pages `[layers, items]` are in the arena, and no page is written twice, or written for
    one item and read for another.

    source may be -1: a state of zeros. With `kept`, the pages of inputs, target may be -1 too: nothing is written; and
    so may kept: there are none.
    """
    if arena.dtype != torch.float32 or arena.ndim != 2 or arena.shape[1] != layout.record:
        raise ValueError(f"arena must be float32 [pages, {layout.record}], got {arena.dtype} {list(arena.shape)}")
    if not arena.is_contiguous() or arena.data_ptr() % 64:
        raise ValueError("arena must be contiguous and 64-byte aligned")
    tables = [("source", source, -1), ("target", target, 0 if kept is None else -1)]
    for name, table, low in (*tables, *(() if kept is None else (("kept", kept, -1),))):
        if table.ndim != 2 or table.shape[1] != items or table.shape != target.shape:
            raise ValueError(f"{name} must be [layers, {items}] as target is, got {table.shape} {target.shape}")
        if table.size and not low <= table.min() <= table.max() < len(arena):
            raise ValueError(
                f"{name} must name pages from {low} to {len(arena) - 1}, got {table.min()} to {table.max()}"
            )
    written = np.zeros(len(arena), np.bool_)
    pages = target if kept is None else np.concatenate([target[target >= 0], kept[kept >= 0]])
    written[pages] = True
    if np.count_nonzero(written) < pages.size:
        raise ValueError("target names a page twice")
    if written[source[(source != target) & (source >= 0)]].any():
        raise ValueError("a page that is written for one item is the source of another")


def input_sizes(layout: StateLayout, rows: StateRows) -> tuple[int, int]:
    """Numbers of x and of gates of such rows."""
    n_x = sum(int(count) * rows.width(layout, row) for row, count in enumerate(rows.count))
    return n_x, rows.vectors * layout.gates


def check_inputs(sizes: tuple[int, int], x: torch.Tensor, gates: torch.Tensor) -> None:
    """Raise ValueError unless x and gates have the sizes that `input_sizes` gave."""
    n_x, n_gates = sizes
    if x.shape != (n_x,) or x.dtype not in DTYPES:
        allowed = ", ".join(map(str, DTYPES))
        raise ValueError(f"x must be [{n_x}] in one of {allowed}, got {x.dtype} {list(x.shape)}")
    if gates.shape != (n_gates,) or gates.dtype != torch.float32:
        raise ValueError(f"gates must be float32 [{n_gates}], got {gates.dtype} {list(gates.shape)}")
