"""Which pages of KV are in memory: those that nobody read for long leave it for a file, and come back when read.

Knows when each page was read and written last, in batches, and moves no byte itself. Pages keep their numbers and
addresses, so kernels, forks and moves know nothing of it: what left is read from the file wherever it is touched.
Sketches stay in memory, so policies choose without a page.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import boolean, int32, int64

from lamina_kernels.paged.pages import Pages
from lamina_kernels.paged.rows import Ints
from lamina_protocols.messages.messages import Row
from lamina_workers.attention_worker.paged_reader import Reading
from lamina_workers.errors import KVError
from lamina_workers.kv_pages.cold_file import ColdFile, Run
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.kv_pages.parts import NO_PAGE, Int32

IDLE = 128  # batches that a page was not read in, after which it leaves
LEAST = 16  # the same where there is more in memory than wanted
SWEEP = 16  # batches from one search for such pages to the next
JOB = 16 << 20  # bytes that are written at a time, beside the batches
WHOLE_CHUNK = 0.25  # of a chunk: where less would leave, its huge page is worth more
RETRY = 4096  # batches from a full disk to the next try
_FREED = 64  # chunks given back in one sweep

logger = logging.getLogger("lamina")


@dataclass(frozen=True, slots=True)
class _Job:
    """Pages that are to leave, ascending; what is written for them since `clock`, in chunks that enter and beside."""

    pages: Ints
    clock: int
    entering: tuple[int, ...]
    runs: tuple[Run, ...]
    written: Future[None]


class ColdPages:
    """For one pool and its thread. `folder`: of the file. `limit`: bytes that pages and their sketches, of
    `sketch_bytes` each, should take in memory. Raises KVError where there can be no such file."""

    def __init__(self, folder: str, limit: int, sketch_bytes: int, pages: Pages, store: KVStore) -> None:
        self._file = ColdFile(folder, pages.arena.view(-1), 2 * pages.layout.page_bytes)
        self._folder = folder
        self._limit, self._sketch_bytes = limit, sketch_bytes
        self._size = pages.layout.page_bytes
        self._store = store
        n = pages.n_pages
        self._there = np.zeros(n, np.bool_)  # takes memory
        self._last = np.zeros(n, np.int32)  # batch in which it was read or written last, as far as that is noted,
        self._wrote = np.zeros(n, np.int32)  # in which it was written,
        self._saved = np.zeros(n, np.int32)  # and after which it was saved; 0: never
        self._writing = np.zeros(n, np.int16)  # batches under way that may write it
        self._entered = np.zeros(self._file.chunks, np.bool_)
        self._marks: dict[int, Int32] = {}  # by part: the batch in which a layer's head was read whole, [layers, heads]
        self._cold: dict[int, tuple[int, int]] = {}  # by part: how many pages of it had left, at which sweep
        self._missing = np.zeros(n, np.int32)  # scratch
        self._clock = self._noted = self._swept = self._dropped = self._retry = 0
        self._leaving: Ints = np.empty(0, np.int64)
        self._job: _Job | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lamina-cold")
        _touch_kernel()  # compiled now rather than in the first step

    # Told by the pool.

    def begin(self, rows: Sequence[Row], readings: Iterable[tuple[Sequence[int], Reading]]) -> Int32:
        """A batch begins: what its rows read comes back, unless a policy chooses among it. readings: with the layers
        that are read so. Returns the pages that it may write, until `end`."""
        self._clock += 1
        for layers, reading in readings:
            choosing: dict[int, set[int]] = {}
            for group in reading.groups:
                for cell in group.cells:
                    choosing.setdefault(cell.handle, set()).add(cell.head)
            for row in rows:
                if row.read is not None:
                    heads = range(len(self._store.part(row.handle).heads))
                    chosen = choosing.get(row.handle, ())
                    self.read(row.handle, layers, [head for head in heads if head not in chosen])
        written = self._pages_of(rows)
        self._writing[written] += 1
        self._last[written] = self._clock
        self._there[written] = True
        self._step()
        return written

    def end(self, written: Int32) -> None:
        """A batch that began has ended."""
        self._writing[written] -= 1
        self._wrote[written] = self._last[written] = self._clock

    def read(self, handle: int, layers: Sequence[int], heads: Sequence[int]) -> None:
        """Some heads of a part are read whole, in some layers: what left comes back."""
        if not heads:
            return
        part = self._store.part(handle)
        marks = self._marks.get(handle)
        if marks is None:
            marks = self._marks[handle] = np.zeros(part.table.shape[:2], np.int32)
        cells = np.ix_(list(layers), list(heads))
        if marks[cells].min() <= self._dropped:  # else nothing can have left since
            table = part.table[cells]
            pages = table[table != NO_PAGE]
            self._fetch(pages[~self._there[pages]])
        marks[cells] = self._clock

    def touch(self, pages: Int32, counts: Ints) -> None:
        """The first counts[i] of the pages in row i are read: int32 `[items, most]`, int64 `[items]`."""
        missing = _touch_kernel()(pages, counts, self._last, self._there, self._clock, self._missing)
        if missing:
            self._fetch(self._missing[:missing])

    def forget(self, handle: int) -> None:
        """A part is closed."""
        self._marks.pop(handle, None)
        self._cold.pop(handle, None)

    def resident(self, handle: int, held: int) -> int:
        """How many of the `held` pages of a part are in memory, as of the last search for pages that leave."""
        swept, cold = self._cold.get(handle, (-1, 0))
        if swept != self._swept:
            table = self._store.part(handle).table
            pages = table[table != NO_PAGE]
            cold = len(pages) - int(np.count_nonzero(self._there[pages]))
            self._cold[handle] = self._swept, cold
        return max(0, held - cold)

    def check_integrity(self) -> None:
        """Raise KVError unless what is saved is what memory has, and what left can be read."""
        size = self._size
        for page in np.flatnonzero(self._valid() & (self._store.references > 0)).tolist():
            if not self._file.agrees(page * size, (page + 1) * size):
                raise KVError(f"page {page} was saved, and the file has something else")
        gone = np.flatnonzero(~self._there & (self._store.references > 0))
        if not self._entered[self._chunks(gone)].all():
            raise KVError("a page has left from a chunk that is not the file's")

    # Pages that leave.

    def _step(self) -> None:
        if self._job is not None and self._job.written.done():
            self._finish(self._job)
        if self._clock - self._swept >= SWEEP:
            self._sweep()
        if self._job is None and self._leaving.size:
            self._job = self._begin_job()

    def _sweep(self) -> None:
        """Give back what is free, and find what should leave."""
        self._note()
        self._swept = self._clock
        wanted = max(0, self._limit - self._sketch_bytes * (self._store.n_pages - self._store.free_pages)) // self._size
        self._free(int(np.count_nonzero(self._there)) > wanted)
        self._leaving = np.empty(0, np.int64)
        if self._clock < self._retry:
            return
        there = self._there & (self._writing == 0) & (self._store.references > 0)
        age = self._clock - self._last
        leaves = there & (age > IDLE)
        excess = int(np.count_nonzero(self._there)) - int(np.count_nonzero(leaves)) - wanted
        if excess > 0:
            others = np.flatnonzero(there & ~leaves & (age > LEAST))
            oldest = others if excess >= len(others) else others[np.argpartition(self._last[others], excess)[:excess]]
            leaves[oldest] = True
        pages = np.flatnonzero(leaves)
        chunks = self._chunks(pages)
        often = np.bincount(chunks, minlength=self._file.chunks) * self._size >= WHOLE_CHUNK * self._file.chunk
        self._leaving = pages[(self._entered | often)[chunks]]

    def _note(self) -> None:
        """Note of pages when their heads were read whole."""
        for handle, marks in self._marks.items():
            newer = marks > self._noted
            if newer.any():
                slots = np.where(newer[..., None], self._store.part(handle).table, NO_PAGE)
                held = slots != NO_PAGE
                self._last[slots[held]] = np.broadcast_to(marks[..., None], slots.shape)[held]
        self._noted = self._clock

    def _free(self, every: bool) -> None:
        """Give back, memory and disk, what nobody holds of chunks that have entered, or of `every` chunk."""
        unheld = np.flatnonzero((self._store.references == 0) & (self._there | (self._saved > 0)))
        if not every:
            unheld = unheld[self._entered[self._chunks(unheld)]]
        if not unheld.size:
            return
        chunks, per = self._chunks(unheld), self._file.chunk
        held = np.flatnonzero(self._store.references > 0)
        used = np.zeros(self._file.chunks, np.bool_)
        used[self._chunks(held)] = used[self._chunks(held, last=True)] = True
        for chunk in np.unique(chunks[~used[chunks]])[:_FREED].tolist():
            self._file.leave(chunk)
            self._entered[chunk] = False
            inside = slice(-(-chunk * per // self._size), (chunk + 1) * per // self._size)
            self._there[inside], self._saved[inside] = False, 0
        rest = unheld[self._entered[chunks] & self._entered[self._chunks(unheld, last=True)]]
        for first, end in _runs(rest):
            self._file.discard(first * self._size, end * self._size)
        self._there[rest], self._saved[rest] = False, 0

    def _begin_job(self) -> _Job | None:
        """Begin to write what the next pages need to leave."""
        pages = self._leaving[: max(1, JOB // self._size)]
        entering = np.unique(self._chunks(pages))
        entering = entering[~self._entered[entering]][: max(1, JOB // self._file.chunk)]
        if entering.size:  # pages beyond the last chunk that enters wait
            pages = pages[pages * self._size < (entering[-1] + 1) * self._file.chunk]
        self._leaving = self._leaving[len(pages) :]
        pages = pages[self._there[pages] & (self._writing[pages] == 0)]
        if not pages.size:
            return None
        per, size = self._file.chunk, self._size
        unsaved = pages[~self._valid(pages) & self._entered[self._chunks(pages)]]
        runs = [(chunk * per, min((chunk + 1) * per, self._file.size)) for chunk in entering.tolist()]
        runs += [(first * size, end * size) for first, end in _runs(unsaved)]
        written = self._writer.submit(self._file.save, runs)
        return _Job(pages, self._clock, tuple(entering.tolist()), tuple(runs), written)

    def _finish(self, job: _Job) -> None:
        """What a job has written leaves, unless it was read or written meanwhile."""
        self._job = None
        try:
            job.written.result()
            for first, end in job.runs:
                self._saved[-(-first // self._size) : end // self._size] = job.clock
            for chunk in job.entering:
                self._enter(chunk, job.pages)
        except OSError as error:
            logger.warning("kv_cold: %s: %s; pages of KV stay in memory", self._folder, error.strerror or error)
            self._retry, self._leaving = self._clock + RETRY, np.empty(0, np.int64)
            return
        self._note()
        pages = job.pages
        inside = self._entered[self._chunks(pages)] & self._entered[self._chunks(pages, last=True)]
        pages = pages[inside & self._valid(pages) & self._there[pages] & (self._last[pages] < job.clock)]
        for first, end in _runs(pages):
            self._file.drop(first * self._size, end * self._size)
        self._there[pages] = False
        self._dropped = self._clock

    def _enter(self, chunk: int, leaving: Ints) -> None:
        """Let a chunk be the file's. It was saved a while ago: what was written since is saved now. What is not
        `leaving` comes back at once."""
        per, size = self._file.chunk, self._size
        first, end = chunk * per, min((chunk + 1) * per, self._file.size)
        pages = np.arange(first // size, -(-end // size))
        whole = (pages * size >= first) & ((pages + 1) * size <= end)
        stale = pages[self._there[pages] & ~(whole & self._valid(pages))]
        runs = [(max(first, page * size), min(end, (page + 1) * size)) for page in stale.tolist()]
        self._file.save(runs, wait=False)
        self._file.enter(chunk)
        self._entered[chunk] = True
        for one, last in _runs(np.setdiff1d(pages[self._there[pages]], leaving)):
            self._file.fetch(max(first, one * size), min(end, last * size))

    def _fetch(self, pages: Int32) -> None:
        """Pages that are read left: they come back."""
        for first, end in _runs(np.unique(pages).astype(np.int64)):
            self._file.fetch(first * self._size, end * self._size)
        self._there[pages] = True
        self._last[pages] = self._clock

    def _valid(self, pages: Ints | slice = slice(None)) -> npt.NDArray[np.bool_]:
        """Of pages: whether the file has what they hold."""
        valid: npt.NDArray[np.bool_] = (self._saved[pages] > self._wrote[pages]) & (self._writing[pages] == 0)
        return valid

    def _chunks(self, pages: Ints, last: bool = False) -> Ints:
        """The chunk of each page's first byte, or of its last one."""
        chunks: Ints = (pages * self._size + (self._size - 1 if last else 0)) // self._file.chunk
        return chunks

    def _pages_of(self, rows: Sequence[Row]) -> Int32:
        """The pages that rows store to, in all layers and heads."""
        size, found = self._store.config.page_size, []
        for row in rows:
            part = self._store.part(row.handle)
            first, end = row.stored(part.lo, part.hi)
            if first < end:
                found.append(part.table[:, :, (first - part.lo) // size : -(-(end - part.lo) // size)].reshape(-1))
        pages: Int32 = np.concatenate(found) if found else np.empty(0, np.int32)
        held: Int32 = pages[pages != NO_PAGE]
        return held


def _runs(pages: Ints) -> list[tuple[int, int]]:
    """Ascending numbers as ranges [first, end)."""
    if not pages.size:
        return []
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    firsts, lasts = pages[np.r_[0, cuts]], pages[np.r_[cuts - 1, len(pages) - 1]]
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))


@cache
def _touch_kernel() -> Any:
    """The compiled loop of `ColdPages.touch`: every page that is read passes through it in every layer."""
    signature = int64(int32[:, ::1], int64[::1], int32[::1], boolean[::1], int64, int32[::1])
    return numba.njit(signature, cache=True)(_touch)


def _touch(pages: Any, counts: Any, last: Any, there: Any, clock: Any, missing: Any) -> Any:
    found = 0
    for item in range(len(counts)):
        for place in range(counts[item]):
            page = pages[item, place]
            last[page] = clock
            if not there[page] and found < len(missing):
                there[page] = True
                missing[found] = page
                found += 1
    return found
