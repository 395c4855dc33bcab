"""Cuts the attention of a batch into pieces and deals them to threads: pure arithmetic on `Rows`.

The LeanAttention schedule (stream-K, arXiv 2405.10480): the work of all rows and heads is laid end to end and cut
into equal shares, so a share may begin in the middle of one output and end in another. A cut output has several
pieces, whose partials are merged. Knows nothing of pages' contents or of how a piece is computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lamina_kernels.pages import Rows

MAX_ROWS = 128  # query vectors of a piece: its queries and sums stay in the second-level cache
MIN_KEYS = 64  # nothing is cut this close to an end
FIXED = 32  # a piece costs as much as so many keys more
READ = 8  # reading a key from memory costs as much as multiplying it with so many query vectors
EVERYTHING = 1 << 40  # a window that hides nothing

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
        ("table", "i8"),  # address of the KV head's pages in layer 0
        ("layer_stride", "i8"),  # pages from one layer to the next
        ("parts", "i8"),  # how many pieces its output was cut into, said at the first of them
        ("partial", "i8"),  # number of its first vector among the partials; -1: its output is whole
    ]
)
Pieces = npt.NDArray[Any]


def cut(rows: Rows, window: int | None) -> Pieces:
    """Whole outputs: every KV head's blocks of at most MAX_ROWS query vectors, with the keys that any of them sees."""
    tokens = np.maximum(MAX_ROWS // rows.group, 1)
    blocks = -(-rows.count // tokens)
    outputs = rows.kv_heads * blocks
    row = np.repeat(np.arange(len(rows)), outputs)
    inside = np.arange(len(row)) - np.repeat(np.cumsum(outputs) - outputs, outputs)
    head, first = inside // blocks[row], inside % blocks[row] * tokens[row]
    heads, group, base = rows.kv_heads[row], rows.group[row], rows.base[row]
    count = np.minimum(rows.count[row] - first, tokens[row])
    pages = np.array([table.shape[2] for table in rows.tables], np.int64)[row]
    start = np.array([table.ctypes.data for table in rows.tables], np.int64)[row]

    pieces = np.zeros(len(row), PIECE)
    pieces["q"] = rows.first[row] + (first * heads + head) * group
    pieces["stride"], pieces["group"], pieces["rows"] = heads * group, group, count * group
    position = rows.start[row] + first
    pieces["position"] = position - base
    lo = np.maximum(rows.lo[row], position - (window or EVERYTHING) + 1)
    hi = np.minimum(rows.hi[row], position + count)
    pieces["lo"], pieces["hi"] = np.where(lo < hi, lo - base, 0), np.where(lo < hi, hi - base, 0)
    pieces["table"], pieces["layer_stride"] = start + head * pages * 4, heads * pages
    pieces["parts"], pieces["partial"] = 1, -1
    return pieces


def deal(whole: Pieces, shares: int) -> tuple[Pieces, npt.NDArray[np.int64]]:
    """Cut pieces so that `shares` equal runs result: the pieces, and where each share starts and the last one ends."""
    if not len(whole):
        return whole, np.zeros(shares + 1, np.int64)
    lo, hi, rate = whole["lo"], whole["hi"], whole["rows"] + READ
    ends = np.cumsum((hi - lo + FIXED) * rate)
    edges = ends[-1] * np.arange(1, shares) // shares
    at = np.searchsorted(ends, edges, "right")
    key = (hi[at] - (ends[at] - edges) // rate[at]) // 32 * 32
    late, early = hi[at] - key < MIN_KEYS, key - lo[at] < MIN_KEYS
    at = at + late
    inside = ~late & ~early
    before = np.append(0, np.cumsum(hi - lo))  # keys laid end to end, which numbers every place to cut
    place = before[at] + np.where(inside, key - lo[np.minimum(at, len(whole) - 1)], 0)

    cuts, where = np.unique(place[inside], return_index=True)
    output, key = at[inside][where], key[inside][where]
    parts = 1 + np.bincount(output, minlength=len(whole))
    pieces = np.repeat(whole, parts)
    number = output + 1 + np.arange(len(cuts))
    pieces["lo"][number] = pieces["hi"][number - 1] = key
    pieces["parts"] = np.repeat(parts, parts)
    rows = np.where(pieces["parts"] > 1, pieces["rows"], 0)
    pieces["partial"] = np.where(rows > 0, np.cumsum(rows) - rows, -1)
    pieces["parts"][number] = 1
    starts = at + np.searchsorted(cuts, place, "right")
    return pieces, np.concatenate([[0], starts, [len(pieces)]])
