"""Which of a prefill's queries an index is built from: a bounded number, the later the denser.

Decode queries come after the prompt and mostly ask as its last queries do, so the last ones are kept densest: about
half as many of the keys that decode queries ask for go unlinked as with positions drawn evenly.
"""

from __future__ import annotations

import numpy as np

from lamina_workers.indexes.key_index import Floats, Positions


class QuerySample:
    """Queries of all heads that share a KV head, taken at a number of positions of at most `capacity`.

    A sixteenth of the context's positions was measured to be enough; each takes `group * d * 4` bytes.
    When it is full, every second of the older three quarters is dropped, so density falls as 1 / age.
    """

    def __init__(self, group: int, d: int, capacity: int = 2048, stride: int = 2) -> None:
        if min(group, d, stride) < 1 or capacity < 8:
            raise ValueError(
                f"group, d, capacity and stride are {group}, {d}, {capacity}, {stride}; allowed are 1, 1, 8, 1 or more"
            )
        self._stride = stride
        self._queries = np.empty((capacity, group, d), np.float32)
        self._positions = np.empty(capacity, np.int64)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def positions(self) -> Positions:
        """int64 `[n]`, ascending."""
        return self._positions[: self._n].copy()

    @property
    def queries(self) -> Floats:
        """A copy of the kept queries, float32 `[n * group, d]`, by position."""
        return self._queries[: self._n].reshape(-1, self._queries.shape[2]).copy()

    def offer(self, first: int, q: Floats) -> None:
        """Keep some of the queries at positions first, first + 1, ... q: any float dtype `[t, group, d]`.

        Positions must come in ascending order; one that is not above the last one kept is skipped.
        """
        if q.ndim != 3 or q.shape[1:] != self._queries.shape[1:]:
            raise ValueError(f"q is {list(q.shape)}; allowed is [t, {', '.join(map(str, self._queries.shape[1:]))}]")
        last = int(self._positions[self._n - 1]) if self._n else -1
        wanted = np.arange(first, first + len(q))
        wanted = wanted[(wanted % self._stride == 0) & (wanted > last)]
        while len(wanted):
            room = len(self._positions) - self._n
            if not room:
                self._thin()
                continue
            now, wanted = wanted[:room], wanted[room:]
            at = slice(self._n, self._n + len(now))
            self._positions[at], self._queries[at] = now, q[now - first]
            self._n += len(now)

    def _thin(self) -> None:
        old = self._n - self._n // 4
        kept = np.concatenate([np.arange(0, old, 2), np.arange(old, self._n)])
        self._positions[: len(kept)], self._queries[: len(kept)] = self._positions[kept], self._queries[kept]
        self._n = len(kept)
