"""Cuts the attention of a batch into pieces and deals them to threads: pure arithmetic on `Rows`.

The LeanAttention schedule (stream-K, arXiv 2405.10480): the work of all rows and heads is laid end to end and cut
into equal shares, so a share may begin in the middle of one output and end in another. A cut output has several
pieces, whose partials are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lamina_kernels.paged.rows import EVERYTHING, Ints, Rows, visible

MAX_ROWS = 128  # query vectors of a piece: its queries and sums stay in the second-level cache
MIN_KEYS = 64  # nothing is cut this close to an end
FIXED = 32  # a piece costs as much as so many keys more
READ = 8  # reading a key from memory costs as much as multiplying it with so many query vectors

# A block of queries of one row and KV head against a range of keys. Positions count from the row's base: they are
# slots of its table.
PIECE = np.dtype(
    [
        ("q", "i8"),  # number of its first vector in the flat q
        ("stride", "i8"),  # vectors from one token to the next
        ("group", "i8"),
        ("rows", "i8"),  # query vectors: tokens * group
        ("position", "i8"),  # of its first token
        ("lo", "i8"),
        ("hi", "i8"),
        ("window", "i8"),
        ("table", "i8"),  # address of the KV head's entries in layer 0
        ("layer_stride", "i8"),  # entries from one layer to the next
        ("listed", "i8"),  # whether an entry is a slot, not a page
        ("output", "i8"),  # pieces of one output follow each other
        ("parts", "i8"),  # how many pieces its output has, said at the first of them
        ("partial", "i8"),  # number of its first vector among the partials; -1: its output is whole
    ]
)
Pieces = npt.NDArray[Any]


def block_tokens(group: Ints) -> Ints:
    """How many tokens of a row are in one block, by the query heads to a KV head."""
    return np.maximum(MAX_ROWS // group, 1)


def cut(rows: Rows) -> Pieces:
    """Every KV head's blocks of at most MAX_ROWS query vectors, with the keys that any of them sees: one piece for
    each output, two where it sees sinks apart from its window."""
    tokens = block_tokens(rows.group)
    blocks = -(-rows.count // tokens)
    outputs = rows.kv_heads * blocks
    row = np.repeat(np.arange(len(rows)), outputs)
    inside = np.arange(len(row)) - np.repeat(np.cumsum(outputs) - outputs, outputs)
    head, first = inside // blocks[row], inside % blocks[row] * tokens[row]
    group, base = rows.group[row], rows.base[row]
    count = np.minimum(rows.count[row] - first, tokens[row])

    pieces = np.zeros(len(row), PIECE)
    pieces["q"] = rows.first[row] + first * rows.stride[row] + head * group
    pieces["stride"], pieces["group"], pieces["rows"] = rows.stride[row], group, count * group
    position = rows.start[row] + first
    pieces["position"] = position - base
    pieces["listed"], pieces["output"] = rows.listed[row], np.arange(len(row))
    pieces["table"], pieces["layer_stride"] = _addresses(rows.tables, row, head)

    reads = visible(position, position + count - 1, rows.lo[row], rows.hi[row], rows.window[row], rows.sinks[row])
    apart, near = pieces.copy(), pieces
    apart["lo"], apart["hi"], apart["window"] = reads.lo - base, reads.end - base, EVERYTHING
    near["lo"], near["hi"], near["window"] = reads.begin - base, reads.hi - base, reads.window
    empty = reads.begin >= reads.hi
    near["lo"][empty] = near["hi"][empty] = 0
    pairs = np.stack([apart, near], -1).reshape(-1)
    nonempty = pairs["lo"] < pairs["hi"]
    nonempty[1::2] |= ~nonempty[::2]  # an output without keys must be written too
    return pairs[nonempty]


def _addresses(arrays: Sequence[npt.NDArray[Any]], row: Ints, head: Ints) -> tuple[Ints, Ints]:
    """Of each row's array `[layers, kv_heads, n]`: where a head begins in layer 0, and numbers from layer to layer."""
    described = [(x.ctypes.data, x.strides[1], x.strides[0] // 4) for x in arrays]
    start, head_stride, layer_stride = np.array(described, np.int64).reshape(-1, 3)[row].T
    return start + head * head_stride, layer_stride


def deal(whole: Pieces, shares: int) -> tuple[Pieces, Ints]:
    """Cut pieces so that `shares` equal runs result: the pieces, and where each share starts and the last one ends."""
    if not len(whole):
        return whole, np.zeros(shares + 1, np.int64)
    lo, hi, rate = whole["lo"], whole["hi"], whole["rows"] + READ
    ends = np.cumsum((hi - lo + FIXED) * rate)
    edges = ends[-1] * np.arange(1, shares) // shares
    index = np.searchsorted(ends, edges, "right")
    key = (hi[index] - (ends[index] - edges) // rate[index]) // 32 * 32
    late, early = hi[index] - key < MIN_KEYS, key - lo[index] < MIN_KEYS
    index = index + late
    inside = ~late & ~early
    before = np.append(0, np.cumsum(hi - lo))  # keys laid end to end, which numbers every place to cut
    place = before[index] + np.where(inside, key - lo[np.minimum(index, len(whole) - 1)], 0)

    cuts, where = np.unique(place[inside], return_index=True)
    cut_piece, key = index[inside][where], key[inside][where]
    pieces = np.repeat(whole, 1 + np.bincount(cut_piece, minlength=len(whole)))
    number = cut_piece + 1 + np.arange(len(cuts))
    pieces["lo"][number] = pieces["hi"][number - 1] = key
    starts = index + np.searchsorted(cuts, place, "right")
    return number_partials(pieces), np.concatenate([[0], starts, [len(pieces)]])


def number_partials(pieces: Pieces) -> Pieces:
    """The same pieces: each output's first one says in "parts" how many there are of it, and where there are several,
    their partials follow each other."""
    pieces["parts"] = np.bincount(pieces["output"])[pieces["output"]]
    rows = np.where(pieces["parts"] > 1, pieces["rows"], 0)
    pieces["partial"] = np.where(rows > 0, np.cumsum(rows) - rows, -1)
    pieces["parts"][1:][pieces["output"][1:] == pieces["output"][:-1]] = 1
    return pieces
