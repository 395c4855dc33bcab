"""An index over the keys of one layer and KV head: immutable segments that follow each other, searched one by one,
their hits merged.

Keys at positions from `KeyIndex.hi` on are not in the index: attention reads them all until a segment of them is added.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lamina_workers.errors import KVError

Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]
LARGEST = 1e15  # of a key's or query's numbers: inner products then stay finite in float32


class Found(NamedTuple):
    """The keys that were found for each query, in ascending order of position, none twice.

    positions: int64 `[group, k']`. scores: float32 `[group, k']`, their inner products with the query, not scaled, as
    exact as the segment's copy of the keys. distances: how many keys' inner products were computed, all queries
    together; a key that is computed for two queries counts twice.
    """

    positions: Positions
    scores: Floats
    distances: int


class Segment(Protocol):
    """An index over the keys at positions [lo, hi). Never changes, so any number of threads may search it at once."""

    @property
    def lo(self) -> int: ...

    @property
    def hi(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of what was built, keys included where it holds a copy of them."""
        ...

    @property
    def build_seconds(self) -> float: ...

    def search(self, q: Floats, k: int, effort: int | None = None) -> Found:
        """The `min(k, hi - lo)` keys that seem best for each query. q: float32 `[group, d]`.

        `effort` is what the kind of segment spends on a search, in its own unit; None: what it was built with.
        Raises ValueError for a wrong q or k.
        """
        ...


class KeyIndex:
    """The segments of one layer and KV head. Searches see the segments that were there when they began."""

    def __init__(self, lo: int = 0) -> None:
        if lo < 0:
            raise ValueError(f"lo is {lo}; allowed is 0 or more")
        self._lo = lo
        # Replaced as a whole and never changed, so that a search on another thread needs no lock.
        self._segments: tuple[Segment, ...] = ()

    @property
    def lo(self) -> int:
        return self._lo

    @property
    def hi(self) -> int:
        """The end of what is indexed; `lo` where nothing is."""
        return self._segments[-1].hi if self._segments else self._lo

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self._segments

    def add(self, segment: Segment) -> None:
        """Search `segment` too from now on. One thread adds at a time. Raises KVError if it does not begin at `hi`."""
        if segment.lo != self.hi or segment.hi <= segment.lo:
            raise KVError(
                f"a segment of [{segment.lo}, {segment.hi}) was given; it must begin at {self.hi} and hold keys"
            )
        self._segments = (*self._segments, segment)

    def search(self, q: Floats, k: int, effort: int | None = None) -> Found:
        """As `Segment.search`, over all segments: `min(k, hi - lo)` positions of each query."""
        results = [segment.search(q, k, effort) for segment in self._segments]
        nothing = Found(np.empty((len(q), 0), np.int64), np.empty((len(q), 0), np.float32), 0)
        return merge(results, k) if results else nothing


def merge(found: list[Found], k: int) -> Found:
    """The best `k` of each query among what several segments found, in ascending order of position."""
    if len(found) == 1:
        return found[0]
    positions = np.concatenate([f.positions for f in found], axis=1)
    scores = np.concatenate([f.scores for f in found], axis=1)
    if positions.shape[1] > k:
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        positions, scores = np.take_along_axis(positions, best, 1), np.take_along_axis(scores, best, 1)
    return ascending(positions, scores, sum(f.distances for f in found))


def ascending(positions: Positions, scores: Floats, distances: int) -> Found:
    """`Found` of positions in any order."""
    order, row = np.argsort(positions, axis=1), np.arange(len(positions))[:, None]
    return Found(positions[row, order], scores[row, order], distances)


def check_keys(keys: Floats, lo: int) -> None:
    """Raises ValueError unless keys are float32 `[n, d]`, contiguous, within LARGEST, and n and `lo` make sense."""
    if keys.dtype != np.float32 or keys.ndim != 2 or not keys.flags.c_contiguous:
        raise ValueError(f"keys are {keys.dtype} {list(keys.shape)}; allowed is contiguous float32 [n, d]")
    if not 1 <= len(keys) < 2**31 or not 1 <= keys.shape[1] <= 1024:
        raise ValueError(f"keys are {list(keys.shape)}; allowed are 1 to 2**31 - 1 keys of 1 to 1024 numbers")
    if lo < 0:
        raise ValueError(f"lo is {lo}; allowed is 0 or more")
    good = np.abs(keys) <= LARGEST  # false for NaN
    if not good.all():
        bad, channel = np.argwhere(~good)[0]
        raise ValueError(
            f"the key at position {lo + bad} holds {keys[bad, channel]}; allowed are -{LARGEST:g} to {LARGEST:g}"
        )


def check_queries(q: Floats, d: int, k: int) -> Floats:
    """q, contiguous. Raises ValueError unless it is float32 `[group, d]` within LARGEST, and `k` 1 or more."""
    if q.dtype != np.float32 or q.ndim != 2 or q.shape[1] != d:
        raise ValueError(f"q is {q.dtype} {list(q.shape)}; allowed is float32 [group, {d}]")
    if k < 1:
        raise ValueError(f"k is {k}; allowed is 1 or more")
    if not (np.abs(q) <= LARGEST).all():
        raise ValueError(f"q holds numbers beyond {LARGEST:g} or NaN; allowed are -{LARGEST:g} to {LARGEST:g}")
    return np.ascontiguousarray(q)
