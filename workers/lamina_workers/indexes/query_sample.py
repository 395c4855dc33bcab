"""Queries of some positions, in two bytes a number: what an index is built from.

Decode queries come after the prompt and mostly ask as its last queries do, so the last ones are kept densest: about
half as many of the keys that decode queries ask for go unlinked as with positions drawn evenly.
"""

from __future__ import annotations

import numpy as np
import torch

from lamina_workers.indexes.key_index import Floats, Positions

_LEAST = 64  # positions for which there is room at first


class QuerySample:
    """Queries `[heads, group, d]`, in bfloat16, at each of at most `capacity` positions.

    A sixteenth of the context's positions was measured to be enough. When it is full, every second of the older three
    quarters is dropped, so density falls as 1 / age.
    """

    def __init__(self, heads: int, group: int, d: int, capacity: int = 4096) -> None:
        if min(heads, group, d) < 1 or capacity < 8:
            raise ValueError(
                f"heads, group, d and capacity are {heads}, {group}, {d}, {capacity}; allowed are 1, 1, 1, 8 or more"
            )
        self.capacity = capacity
        self._positions = np.empty(0, np.int64)
        self._queries = _room(0, heads, group, d)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def nbytes(self) -> int:
        return self._positions.nbytes + self._queries.nbytes

    @property
    def positions(self) -> Positions:
        """int64 `[n]`, ascending."""
        return self._positions[: self._n].copy()

    @property
    def last(self) -> int:
        """The last position; -1 where there is none."""
        return int(self._positions[self._n - 1]) if self._n else -1

    @property
    def queries(self) -> torch.Tensor:
        """A view of all that is kept, bfloat16 `[n, heads, group, d]`, by position."""
        return self._queries[: self._n]

    def of(self, head: int) -> Floats:
        """The queries to the head of that number, float32 `[n * group, d]`, by position."""
        queries: Floats = self.queries[:, head].float().flatten(0, 1).numpy()
        return queries

    def offer(self, positions: Positions, q: torch.Tensor) -> int:
        """Keep queries `[t, heads, group, d]` of any float dtype, at ascending positions, int64 `[t]`. Returns how many
        of the first are left out: those that are not above the last one that was kept."""
        if q.shape != (len(positions), *self._queries.shape[1:]):
            shape = ", ".join(map(str, self._queries.shape[1:]))
            raise ValueError(f"q is {list(q.shape)}; allowed is [{len(positions)}, {shape}]")
        old = skipped = int(np.searchsorted(positions, self.last, "right"))
        while skipped < len(positions):
            if self._n == self.capacity:
                self._thin()
            now = min(len(positions) - skipped, self.capacity - self._n)
            self._widen(self._n + now)
            self._positions[self._n : self._n + now] = positions[skipped : skipped + now]
            self._queries[self._n : self._n + now] = q[skipped : skipped + now]
            self._n += now
            skipped += now
        return old

    def cut(self, tokens: int) -> None:
        """Forget the queries from position `tokens` on."""
        self._n = int(np.searchsorted(self._positions[: self._n], tokens))

    def copy(self) -> QuerySample:
        """The same, to be changed apart."""
        _, heads, group, d = self._queries.shape
        copied = QuerySample(heads, group, d, self.capacity)
        copied.offer(self.positions, self.queries)
        return copied

    def _widen(self, n: int) -> None:
        room = len(self._positions)
        if n <= room:
            return
        room = min(self.capacity, max(_LEAST, n, room + room // 2))
        queries = _room(room, *self._queries.shape[1:])
        positions = np.empty(room, np.int64)
        queries[: self._n], positions[: self._n] = self.queries, self._positions[: self._n]
        self._queries, self._positions = queries, positions

    def _thin(self) -> None:
        old = self._n - self._n // 4
        indices = np.concatenate([np.arange(0, old, 2), np.arange(old, self._n)])
        self._positions[: len(indices)] = self._positions[indices]
        self._queries[: len(indices)] = self._queries[torch.from_numpy(indices)]
        self._n = len(indices)


def _room(n: int, heads: int, group: int, d: int) -> torch.Tensor:
    """Memory that is written in any mode: a tensor made in inference mode could not be written outside of it."""
    with torch.inference_mode(False):
        return torch.empty(n, heads, group, d, dtype=torch.bfloat16)
