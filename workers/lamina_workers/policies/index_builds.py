"""The indexes over the keys of parts' heads: what is known of each, and how one is built beside decode.

A build runs on a background thread that has copies of keys and queries, and computes with numpy, numba and FAISS alone.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from lamina_workers.indexes import faiss_host
from lamina_workers.indexes.graph_index import build_graph
from lamina_workers.indexes.ivf_index import build_ivf
from lamina_workers.indexes.key_index import Floats, KeyIndex, Segment
from lamina_workers.indexes.query_sample import QuerySample

Build = Callable[[Floats, Floats, int], Segment]
"""Keys float32 `[n, d]`, sampled queries float32 `[m, d]`, and the position of the first key."""

STRIDE = 2  # positions from one sampled query to the next
PROMPT, LATER = 3072, 1024  # positions whose queries are kept: of prefill, and of decode for further segments
PAUSE, LONGEST_PAUSE = 16, 1024  # steps in which full scans choose for a head whose index misses too much


def _ivf(keys: Floats, queries: Floats, lo: int) -> Segment:
    return build_ivf(keys, lo)


BUILDS: Mapping[str, Build] = MappingProxyType({"graph": build_graph, "ivf": _ivf})
ASKED = {"graph": 64, "ivf": 0}  # sampled positions without which there is no build


class Job:
    """One build, on a thread of its own that ends with it. It holds copies alone, so it need not be waited for."""

    def __init__(self, build: Build, keys: Floats, queries: Floats, lo: int) -> None:
        self.lo, self.hi = lo, lo + len(keys)
        self.cancelled = False
        self.segment: Segment | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(build, keys, queries, lo), name="lamina-index", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:  # there are too many threads already
            self.error = error

    def _run(self, build: Build, keys: Floats, queries: Floats, lo: int) -> None:
        try:
            faiss_host.set_threads(1)
            self.segment = build(keys, queries, lo)
        except BaseException as error:  # noqa: BLE001  # after any error the head goes on without an index
            self.error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()


@dataclass(slots=True)
class HeadIndex:
    """What is known of one layer and KV head of a part. Positions count from the part's first token."""

    sample: QuerySample | None = None
    shared: bool = False  # whether a fork has the same sample: then it is copied before anything is added
    index: KeyIndex | None = None
    top: int = 0  # keys that each query head asks for
    pause: int = 0  # steps in which full scans choose
    next_pause: int = PAUSE
    failed: bool = False

    @property
    def sampled(self) -> int:
        """Positions whose queries are kept."""
        return 0 if self.sample is None else len(self.sample)

    def offer(self, first: int, q: Floats) -> None:
        """Queries float32 `[t, group, d]` of the positions from `first` on."""
        if self.sample is None:
            self.sample = QuerySample(q.shape[1], q.shape[2], PROMPT if self.index is None else LATER, STRIDE)
        elif self.shared:
            self.sample = copy.deepcopy(self.sample)
        self.shared = False
        self.sample.offer(first, q)

    def cut(self, tokens: int) -> None:
        """All but the first `tokens` tokens may change: segments beyond them are dropped."""
        if self.index is not None:
            self.index = made([segment for segment in self.index.segments if segment.hi <= tokens])


def made(segments: Sequence[Segment]) -> KeyIndex | None:
    """The index of segments that follow one another."""
    if not segments:
        return None
    index = KeyIndex(segments[0].lo)
    for segment in segments:
        index.add(segment)
    return index


@dataclass(slots=True)
class PartIndexes:
    heads: dict[tuple[int, int], HeadIndex] = field(default_factory=dict)  # by layer and KV head
    reach: int = 0  # no index, build or sample of a prefill covers a token from here on
