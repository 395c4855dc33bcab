"""Which pages of KV are in memory: pages that were not read for a while leave it for a file, and come back when read.

`ColdPages` knows in which batch each page was last read and written, and moves no byte itself (`ColdFile` does). Pages
keep their numbers and addresses, so kernels, forks and moves do not see the difference: a page that left is read from
the file wherever it is touched. Sketches stay in memory, so policies choose without a page.
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

IDLE_BATCHES = 128  # in which a page was not read, after which it leaves
MIN_IDLE_BATCHES = 16  # the same while more pages are in memory than the limit allows
SWEEP_BATCHES = 16  # from one search for such pages to the next
JOB_BYTES = 16 << 20  # that are written at a time, beside the batches
MIN_PART_OF_CHUNK = 0.25  # where less of a chunk would leave, its huge page is worth more
RETRY_BATCHES = 4096  # from a full disk to the next try
_FREED_CHUNKS = 64  # given back in one sweep, at most

logger = logging.getLogger("lamina")


@dataclass(slots=True)
class _PageStates:
    """What is known of each page, by its number. Times are numbers of batches."""

    in_memory: npt.NDArray[np.bool_]
    last_used: Int32
    """When it was last read or written, as far as that is noted."""
    last_written: Int32
    saved_at: Int32
    """After which batch it was saved; 0: never."""
    writers: npt.NDArray[np.int16]
    """Batches under way that may write it."""

    @classmethod
    def none_in_memory(cls, count: int) -> _PageStates:
        in_memory, writers = np.zeros(count, np.bool_), np.zeros(count, np.int16)
        last_used, last_written, saved_at = (np.zeros(count, np.int32) for _ in range(3))
        return cls(in_memory, last_used, last_written, saved_at, writers)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes [first, end) of the memory, with pages of `page_bytes`."""

    first: int
    end: int
    page_bytes: int

    @property
    def pages(self) -> Ints:
        """The pages with a byte in it."""
        return np.arange(self.first // self.page_bytes, -(-self.end // self.page_bytes))

    @property
    def inner_pages(self) -> slice:
        """The pages that lie in it as a whole."""
        return slice(-(-self.first // self.page_bytes), self.end // self.page_bytes)

    def clipped(self, first_page: int, end_page: int) -> Run:
        """The bytes in it of the pages [first_page, end_page)."""
        return max(self.first, first_page * self.page_bytes), min(self.end, end_page * self.page_bytes)


@dataclass(frozen=True, slots=True)
class _Job:
    """`pages` are to leave, in ascending order. For them `runs` of bytes are written since batch `clock`: the chunks
    `entering` the file as a whole, and pages of chunks that are the file's already."""

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
        self._pages = _PageStates.none_in_memory(pages.n_pages)
        self._file_chunks = np.zeros(self._file.chunks, np.bool_)  # whether a chunk is the file's
        self._head_reads: dict[int, Int32] = {}  # by part: when a layer's head was last read whole, [layers, heads]
        self._cold_counts: dict[
            int, tuple[int, int]
        ] = {}  # by part: the sweep, and how many of its pages had left then
        self._scratch = np.zeros(pages.n_pages, np.int32)
        self._clock = 0  # batches that have begun
        self._noted_at = 0  # up to this batch `last_used` has what `_head_reads` has
        self._swept_at = 0
        self._dropped_at = 0  # when a page left last
        self._retry_at = 0  # before that no page leaves, since the disk was full
        self._queue: Ints = np.empty(0, np.int64)  # pages that are to leave, after those of the job
        self._job: _Job | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lamina-cold")
        _touch_kernel()  # compiled now rather than in the first step

    # Calls of the pool.

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
        self._pages.writers[written] += 1
        self._pages.last_used[written] = self._clock
        self._pages.in_memory[written] = True
        self._step()
        return written

    def end(self, written: Int32) -> None:
        """A batch that began has ended."""
        self._pages.writers[written] -= 1
        self._pages.last_written[written] = self._pages.last_used[written] = self._clock

    def read(self, handle: int, layers: Sequence[int], heads: Sequence[int]) -> None:
        """Some heads of a part are read whole, in some layers: what left comes back."""
        if not heads:
            return
        part = self._store.part(handle)
        reads = self._head_reads.get(handle)
        if reads is None:
            reads = self._head_reads[handle] = np.zeros(part.table.shape[:2], np.int32)
        cells = np.ix_(list(layers), list(heads))
        if reads[cells].min() <= self._dropped_at:  # else nothing can have left since
            table = part.table[cells]
            pages = table[table != NO_PAGE]
            self._fetch(pages[~self._pages.in_memory[pages]])
        reads[cells] = self._clock

    def touch(self, pages: Int32, counts: Ints) -> None:
        """The first counts[i] of the pages in row i are read: int32 `[items, most]`, int64 `[items]`."""
        missing = _touch_kernel()(
            pages, counts, self._pages.last_used, self._pages.in_memory, self._clock, self._scratch
        )
        if missing:
            self._fetch(self._scratch[:missing])

    def forget(self, handle: int) -> None:
        """A part is closed."""
        self._head_reads.pop(handle, None)
        self._cold_counts.pop(handle, None)

    def resident(self, handle: int, held: int) -> int:
        """How many of the `held` pages of a part are in memory, as of the last search for pages that leave."""
        swept, cold = self._cold_counts.get(handle, (-1, 0))
        if swept != self._swept_at:
            table = self._store.part(handle).table
            pages = table[table != NO_PAGE]
            cold = len(pages) - int(np.count_nonzero(self._pages.in_memory[pages]))
            self._cold_counts[handle] = self._swept_at, cold
        return max(0, held - cold)

    def check_integrity(self) -> None:
        """Raise KVError unless what is saved is what memory has, and what left can be read."""
        size = self._size
        for page in np.flatnonzero(self._valid() & (self._store.references > 0)).tolist():
            if not self._file.agrees(page * size, (page + 1) * size):
                raise KVError(f"page {page} was saved, and the file has something else")
        dropped = np.flatnonzero(~self._pages.in_memory & (self._store.references > 0))
        if not self._file_chunks[self._chunks(dropped)].all():
            raise KVError("a page has left from a chunk that is not the file's")

    # Pages that leave.

    def _step(self) -> None:
        if self._job is not None and self._job.written.done():
            self._finish(self._job)
        if self._clock - self._swept_at >= SWEEP_BATCHES:
            self._sweep()
        if self._job is None and self._queue.size:
            self._job = self._begin_job()

    def _sweep(self) -> None:
        """Give back what is free, and find what should leave."""
        self._note()
        self._swept_at = self._clock
        target = max(0, self._limit - self._sketch_bytes * (self._store.n_pages - self._store.free_pages)) // self._size
        self._free(int(np.count_nonzero(self._pages.in_memory)) > target)
        self._queue = np.empty(0, np.int64)
        if self._clock < self._retry_at:
            return
        candidates = self._pages.in_memory & (self._pages.writers == 0) & (self._store.references > 0)
        age = self._clock - self._pages.last_used
        leaves = candidates & (age > IDLE_BATCHES)
        excess = int(np.count_nonzero(self._pages.in_memory)) - int(np.count_nonzero(leaves)) - target
        if excess > 0:
            others = np.flatnonzero(candidates & ~leaves & (age > MIN_IDLE_BATCHES))
            oldest = (
                others
                if excess >= len(others)
                else others[np.argpartition(self._pages.last_used[others], excess)[:excess]]
            )
            leaves[oldest] = True
        pages = np.flatnonzero(leaves)
        chunks = self._chunks(pages)
        often = np.bincount(chunks, minlength=self._file.chunks) * self._size >= MIN_PART_OF_CHUNK * self._file.chunk
        self._queue = pages[(self._file_chunks | often)[chunks]]

    def _note(self) -> None:
        """Note of pages when their heads were read whole."""
        for handle, reads in self._head_reads.items():
            newer = reads > self._noted_at
            if newer.any():
                slots = np.where(newer[..., None], self._store.part(handle).table, NO_PAGE)
                occupied = slots != NO_PAGE
                self._pages.last_used[slots[occupied]] = np.broadcast_to(reads[..., None], slots.shape)[occupied]
        self._noted_at = self._clock

    def _free(self, every: bool) -> None:
        """Give back the memory and disk of pages that no part holds, in chunks of the file, or in `every` chunk."""
        unheld = np.flatnonzero((self._store.references == 0) & (self._pages.in_memory | (self._pages.saved_at > 0)))
        if not every:
            unheld = unheld[self._file_chunks[self._chunks(unheld)]]
        if not unheld.size:
            return
        chunks = self._chunks(unheld)
        referenced = np.flatnonzero(self._store.references > 0)
        used = np.zeros(self._file.chunks, np.bool_)
        used[self._chunks(referenced)] = used[self._chunks(referenced, last=True)] = True
        for chunk in np.unique(chunks[~used[chunks]])[:_FREED_CHUNKS].tolist():
            self._file.leave(chunk)
            self._file_chunks[chunk] = False
            inside = self._chunk(chunk).inner_pages
            self._pages.in_memory[inside], self._pages.saved_at[inside] = False, 0
        discarded = unheld[self._file_chunks[chunks] & self._file_chunks[self._chunks(unheld, last=True)]]
        for first, end in _runs(discarded):
            self._file.discard(first * self._size, end * self._size)
        self._pages.in_memory[discarded], self._pages.saved_at[discarded] = False, 0

    def _begin_job(self) -> _Job | None:
        """Begin to write what the next pages need to leave."""
        pages = self._queue[: max(1, JOB_BYTES // self._size)]
        entering = np.unique(self._chunks(pages))
        entering = entering[~self._file_chunks[entering]][: max(1, JOB_BYTES // self._file.chunk)]
        if entering.size:  # pages beyond the last chunk that enters wait
            pages = pages[pages * self._size < (entering[-1] + 1) * self._file.chunk]
        self._queue = self._queue[len(pages) :]
        pages = pages[self._pages.in_memory[pages] & (self._pages.writers[pages] == 0)]
        if not pages.size:
            return None
        unsaved = pages[~self._valid(pages) & self._file_chunks[self._chunks(pages)]]
        chunks = [self._chunk(number) for number in entering.tolist()]
        runs = [(chunk.first, chunk.end) for chunk in chunks]
        runs += [(first * self._size, end * self._size) for first, end in _runs(unsaved)]
        written = self._writer.submit(self._file.save, runs)
        return _Job(pages, self._clock, tuple(entering.tolist()), tuple(runs), written)

    def _finish(self, job: _Job) -> None:
        """What a job has written leaves, unless it was read or written meanwhile."""
        self._job = None
        try:
            job.written.result()
            for first, end in job.runs:
                self._pages.saved_at[-(-first // self._size) : end // self._size] = job.clock
            for chunk in job.entering:
                self._enter(chunk, job.pages)
        except OSError as error:
            logger.warning("kv_cold: %s: %s; pages of KV stay in memory", self._folder, error.strerror or error)
            self._retry_at, self._queue = self._clock + RETRY_BATCHES, np.empty(0, np.int64)
            return
        self._note()
        pages = job.pages
        inside = self._file_chunks[self._chunks(pages)] & self._file_chunks[self._chunks(pages, last=True)]
        pages = pages[
            inside & self._valid(pages) & self._pages.in_memory[pages] & (self._pages.last_used[pages] < job.clock)
        ]
        for first, end in _runs(pages):
            self._file.drop(first * self._size, end * self._size)
        self._pages.in_memory[pages] = False
        self._dropped_at = self._clock

    def _enter(self, number: int, leaving: Ints) -> None:
        """Let a chunk be the file's. It was saved a while ago: what was written since is saved now. Pages of it that
        are not `leaving` come back at once."""
        chunk = self._chunk(number)
        pages, inner = chunk.pages, chunk.inner_pages
        inside = (pages >= inner.start) & (pages < inner.stop)
        stale = pages[self._pages.in_memory[pages] & ~(inside & self._valid(pages))]
        self._file.save([chunk.clipped(page, page + 1) for page in stale.tolist()], wait=False)
        self._file.enter(number)
        self._file_chunks[number] = True
        for first, end in _runs(np.setdiff1d(pages[self._pages.in_memory[pages]], leaving)):
            self._file.fetch(*chunk.clipped(first, end))

    def _fetch(self, pages: Int32) -> None:
        """Pages that are read left: they come back."""
        for first, end in _runs(np.unique(pages).astype(np.int64)):
            self._file.fetch(first * self._size, end * self._size)
        self._pages.in_memory[pages] = True
        self._pages.last_used[pages] = self._clock

    def _valid(self, pages: Ints | slice = slice(None)) -> npt.NDArray[np.bool_]:
        """Of pages: whether the file has what they hold."""
        valid: npt.NDArray[np.bool_] = (self._pages.saved_at[pages] > self._pages.last_written[pages]) & (
            self._pages.writers[pages] == 0
        )
        return valid

    def _chunk(self, number: int) -> _Chunk:
        first = number * self._file.chunk
        return _Chunk(first, min(first + self._file.chunk, self._file.size), self._size)

    def _chunks(self, pages: Ints, last: bool = False) -> Ints:
        """The chunk of each page's first byte, or of its last one."""
        chunks: Ints = (pages * self._size + (self._size - 1 if last else 0)) // self._file.chunk
        return chunks

    def _pages_of(self, rows: Sequence[Row]) -> Int32:
        """The pages that rows store to, in all layers and heads."""
        size, tables = self._store.config.page_size, []
        for row in rows:
            part = self._store.part(row.handle)
            first, end = row.stored(part.lo, part.hi)
            if first < end:
                tables.append(part.table[:, :, (first - part.lo) // size : -(-(end - part.lo) // size)].reshape(-1))
        pages: Int32 = np.concatenate(tables) if tables else np.empty(0, np.int32)
        occupied: Int32 = pages[pages != NO_PAGE]
        return occupied


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


def _touch(pages: Any, counts: Any, last_used: Any, in_memory: Any, clock: Any, missing: Any) -> Any:
    count = 0
    for item in range(len(counts)):
        for place in range(counts[item]):
            page = pages[item, place]
            last_used[page] = clock
            if not in_memory[page] and count < len(missing):
                in_memory[page] = True
                missing[count] = page
                count += 1
    return count
