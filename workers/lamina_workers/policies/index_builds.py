"""The indexes over the keys of parts' heads: what is known of each, and how one is built beside decode.

A build runs on a background thread that has copies of keys and queries, and computes with numpy, numba and FAISS alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from lamina_workers.indexes import faiss_host
from lamina_workers.indexes.graph_index import build_graph
from lamina_workers.indexes.key_index import Floats, KeyIndex, Segment
from lamina_workers.indexes.query_sample import QuerySample
from lamina_workers.policies.chooser import Holding, Shown

log = logging.getLogger(__name__)

STRIDE = 2  # positions from one decode query that is kept to the next
LATER = 1024  # of their positions, at most
LEAD = 4  # a prompt's indexes begin to be built when one in so many of its tokens is still to come
PAUSE, LONGEST_PAUSE = 16, 1024  # steps in which full scans choose for a head whose index misses too much
ASKED = 64  # sampled positions without which there is no build


class Job:
    """One build, on a thread of its own that ends with it: of keys float32 `[n, d]` from position `lo` on, and sampled
    queries float32 `[m, d]`. It holds copies alone, so it need not be waited for."""

    def __init__(self, keys: Floats, queries: Floats, lo: int) -> None:
        self.lo, self.hi = lo, lo + len(keys)
        self.cancelled = False
        self.segment: Segment | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(keys, queries, lo), name="lamina-index", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # too many threads already
            self.error = error

    def _run(self, keys: Floats, queries: Floats, lo: int) -> None:
        try:
            faiss_host.set_threads(1)
            self.segment = build_graph(keys, queries, lo)
        except BaseException as error:  # noqa: BLE001  # after any error the head goes on without an index
            self.error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()


@dataclass(slots=True)
class HeadIndex:
    """What is known of one layer and KV head of a part. Positions count from the part's first token."""

    later: QuerySample | None = None  # of decode's queries
    index: KeyIndex | None = None
    top: int = 0  # keys that each query head asks for
    pause: int = 0  # steps in which full scans choose
    next_pause: int = PAUSE
    failed: bool = False

    @property
    def end(self) -> int:
        """Up to where keys are indexed."""
        return 0 if self.index is None else self.index.hi

    def offer(self, position: int, q: Floats) -> None:
        """Keep decode's queries `[group, d]` at a position."""
        if self.later is None:
            self.later = QuerySample(1, q.shape[0], q.shape[1], LATER)
        self.later.offer(np.array([position]), torch.from_numpy(q)[None, None])

    def cut(self, tokens: int) -> None:
        """All but the first `tokens` tokens may change: segments and queries beyond them are dropped."""
        if self.later is not None:
            self.later.cut(tokens)
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
    begun: float = 0.0  # when it decoded its first token, by `time.monotonic`; 0: not yet
    reported: bool = False  # whether it was logged when its indexes were ready


class Cell(NamedTuple):
    """A part's KV head in a layer."""

    handle: int
    layer: int
    head: int


class Stretch(NamedTuple):
    """Keys of a part at positions [lo, hi)."""

    lo: int
    hi: int


class BuildParameters(Protocol):
    """The parameters of `retrieval` that decide when an index is built."""

    @property
    def sink(self) -> int: ...
    @property
    def recent(self) -> int: ...
    @property
    def top(self) -> int: ...
    @property
    def least(self) -> int: ...
    @property
    def segment(self) -> int: ...


class IndexBuilds:
    """The indexes of one worker, and which are built next: a few at a time, in the order in which they were wanted.

    An index of a prompt's keys is wanted while the prompt's last quarter comes, of further keys when decode has brought
    enough. Exact neighbours are not kept while a prompt comes: they would take 4 MB a head at 32K tokens.
    """

    def __init__(self, policy: BuildParameters, at: Holding) -> None:
        self._policy = policy
        self._holding = at
        self.parts: dict[int, PartIndexes] = {}
        self.building: dict[Cell, Job] = {}
        self._at_once = max(1, at.threads // 2)
        self._due: dict[Cell, Stretch] = {}
        self._reasons: set[str] = set()
        self.counts = dict.fromkeys(("builds", "failed", "cancelled"), 0)
        self.seconds = 0.0

    def head(self, cell: Cell) -> HeadIndex:
        heads = self.parts.setdefault(cell.handle, PartIndexes()).heads
        return heads.setdefault(cell[1:], HeadIndex())

    def sampled(self, cell: Cell) -> int:
        """At how many positions queries are known."""
        later = self.head(cell).later
        return self._holding.samples.positions(*cell) + (0 if later is None else len(later))

    # What happens to parts.

    def observe(self, shown: Shown) -> None:
        """Queries of a prompt have come, and keys with them."""
        policy, size, cell = self._policy, self._holding.page_size, Cell(shown.handle, shown.layer, shown.head)
        head = self.head(cell)
        lead = max(policy.recent, (shown.lo + shown.tokens + shown.left) // LEAD)
        if shown.left <= lead and shown.whole >= policy.least and head.index is None:
            sinks = -(-policy.sink // size) * size if shown.lo == 0 else 0
            self.want(cell, Stretch(sinks, min(shown.tokens, shown.whole - policy.recent) // size * size))
        self.go_on()

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        """A part is new, and has the first `tokens` of another. It shares the segments that end within them."""
        source = self.parts.get(parent)
        if source is not None:
            part = self.parts[handle] = PartIndexes()
            for key, index_of_head in source.heads.items():
                head = part.heads[key] = HeadIndex(index=index_of_head.index, top=index_of_head.top)
                head.cut(tokens)

    def written(self, handle: int, start: int) -> None:
        """A part's tokens from `start` on are new, or differ from before."""
        self._cancel(handle, start)
        for cell, stretch in list(self._due.items()):
            if cell.handle == handle and stretch.hi > start:
                del self._due[cell]
        part = self.parts.get(handle)
        for head in part.heads.values() if part is not None else ():
            head.cut(start)

    def forget(self, handle: int) -> None:
        self._cancel(handle, 0)
        for cell in [cell for cell in self._due if cell.handle == handle]:
            del self._due[cell]
        self.parts.pop(handle, None)

    def _cancel(self, handle: int, start: int) -> None:
        """Of a part's builds that are under way, those of keys from `start` on are for nothing."""
        for cell, job in self.building.items():
            if cell.handle == handle and job.hi > start:
                job.cancelled = True

    def decodes(self, handle: int) -> None:
        """A part has begun to decode."""
        part = self.parts.setdefault(handle, PartIndexes())
        part.begun = part.begun or time.monotonic()
        self._report(handle, part)

    # Building.

    def want(self, cell: Cell, stretch: Stretch) -> None:
        """Index a head's keys up to the end of that stretch, if enough are new; its begin is where the first index
        begins."""
        head = self.head(cell)
        least = self._policy.segment if head.index is not None else self._holding.page_size
        enough = stretch.hi - max(stretch.lo, head.end) >= least
        if enough and not head.failed and cell not in self.building and self.sampled(cell) >= ASKED:
            self._due[cell] = stretch

    def go_on(self) -> None:
        """Take over the segments of builds that are over, and start the next ones."""
        for cell in [cell for cell, job in self.building.items() if job.done]:
            self._collect(cell, self.building.pop(cell))
        while len(self.building) < self._at_once and self._due:
            cell = next(iter(self._due))
            self._start(cell, self._due.pop(cell))

    def _start(self, cell: Cell, stretch: Stretch) -> None:
        """Keys and queries are copied here, so that the build's thread never reads pages."""
        head, lo = self.head(cell), stretch.lo
        segments = [] if head.index is None else list(head.index.segments)
        if segments:
            lo = segments[-1].hi
        while segments and segments[-1].hi - segments[-1].lo <= stretch.hi - lo:  # so that there are few, uneven ones
            lo = segments.pop().lo
        keys = self._holding.keys(*cell, lo, stretch.hi)
        samples = [self._holding.samples.of(*cell), None if head.later is None else head.later.of(0)]
        queries = [sample for sample in samples if sample is not None] or [np.empty((0, keys.shape[1]), np.float32)]
        self.building[cell] = Job(keys, np.concatenate(queries), lo)

    def _collect(self, cell: Cell, job: Job) -> None:
        if job.cancelled:
            self.counts["cancelled"] += 1
            return
        part = self.parts[cell.handle]
        head = part.heads[cell[1:]]
        if job.segment is None:
            self.counts["failed"] += 1
            head.failed, head.index, head.later = True, None, None
            reason = f"{type(job.error).__name__}: {job.error}"
            if reason not in self._reasons:
                self._reasons.add(reason)
                log.warning("no index for part %d, layer %d, KV head %d, which goes on without: %s", *cell, reason)
        else:
            self.counts["builds"] += 1
            self.seconds += job.segment.build_seconds
            segments = [] if head.index is None else [s for s in head.index.segments if s.hi <= job.lo]
            if head.index is None:
                head.top = self._policy.top
            head.index = made([*segments, job.segment])
        self._report(cell.handle, part)

    def _report(self, handle: int, part: PartIndexes) -> None:
        """Log once how late a part's indexes were."""
        indexed = sum(head.index is not None for head in part.heads.values())
        if part.begun and indexed and not part.reported and not any(cell.handle == handle for cell in self._due):
            part.reported = True
            late = time.monotonic() - part.begun
            log.info("part %d: %d heads have an index, %.1f s after its first decoded token", handle, indexed, late)
