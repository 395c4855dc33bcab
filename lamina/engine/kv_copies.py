"""Copies KV from parts of a sequence to other parts of it, or of another that has the same tokens, while batches run.

A copy is a run: suspended while it waits for a holder, gone on with between two batches, for a part of a step's time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial

from lamina.kv.kv_shares import Pages, Part
from lamina.scheduling.control_plane import ControlPlane
from lamina_protocols.messages.messages import Row
from lamina_protocols.messages.routes import HolderBatch, Route
from lamina_workers.model_worker.interface import Waiting, Workers
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.parallel.peers import Peer


def nothing() -> None:
    """The `taken` of a copy whose pages were counted before."""


CHUNK = 512  # tokens that are copied at a time, at most

Copying = Generator[Waiting, None, bool]
"""A copy under way; it returns whether there was room. Raises HolderFault. Whoever drops it closes it, before the next
epoch begins."""


class KvCopies:
    """Makes copies, and counts the pages that they take."""

    def __init__(self, worker: Workers[Peer], control: ControlPlane) -> None:
        self._worker = worker
        self._placement = control.placement
        self._scheduler = control.scheduler

    def copy(
        self,
        old: Sequence[Part],
        new: Sequence[Part],
        rows: tuple[int, int, int],
        floor: int,
        prompt: int,
        taken: Callable[[], None] = nothing,
    ) -> Copying:
        """Copy what the old parts have of positions [lo, hi), which no edge of a part divides, to `new` parts that are
        opened already. rows: lo, hi, and where the rows that store it begin. The parts are of a sequence of that floor,
        whose prompt has so many tokens. `taken` is called once the holders have taken the pages."""
        lo, hi, _ = rows
        prompt = prompt if self._placement.samples else 0
        return self._run(_moves(old, new, lo, hi, self._scheduler.config.page_size), new, rows, floor, prompt, taken)

    def combine(self, old: Sequence[Part], new: Part, rows: tuple[int, int, int], taken: Callable[[], None]) -> Copying:
        """As `copy`, of whole pages: the new part gets the XOR of those of the old ones, head by head in their order;
        zeros stand for heads that one has not."""
        lo, hi, _ = rows
        return self._run(_combined(old, new, lo, hi), (new,), rows, 0, 0, taken)

    def _run(
        self,
        every: Iterable[Move],
        new: Sequence[Part],
        rows: tuple[int, int, int],
        floor: int,
        prompt: int,
        taken: Callable[[], None],
    ) -> Copying:
        lo, hi, stored = rows
        config, holders = self._scheduler.config, self._placement.holders
        alike: dict[tuple[int, int], list[Move]] = {}  # by rank and pool
        for move in every:
            alike.setdefault((holders[move.to].rank, move.pool), []).append(move)
        for last, moves in enumerate(alike.values(), 1 - len(alike)):
            routes: dict[int, list[Route]] = {}
            for part in new:
                if any(move.target == part.handle for move in moves):
                    row = Row(part.handle, stored, hi - stored, None, True, prompt=prompt)
                    route = Route(0, part.share.heads, row, (stored, hi), part.share.pool)
                    routes.setdefault(part.share.holder, []).append(route)
            for move in moves:
                if holders[move.origin].outbox:  # it may not have the part yet
                    routes.setdefault(move.origin, [])
            batches = {number: holders[number].outgoing(tuple(rows)) for number, rows in routes.items()}
            fresh = tuple(part.share for part in new if any(move.target == part.handle for move in moves))
            takes = config.held(fresh, lo, hi, 0, floor) + config.records(fresh)
            accepted = partial(self._accepted, batches, takes, nothing if last else taken)
            if not (yield from self._worker.copy(moves, batches, accepted)):
                return False
        return True

    def _accepted(self, batches: Mapping[int, HolderBatch], takes: Pages, taken: Callable[[], None]) -> None:
        """Holders have taken these pages, as their next answers say, too."""
        for number, batch in batches.items():
            takes -= Pages.of(number, self._placement.holders[number].accepted(batch))
        self._scheduler.ledger.took(takes)
        taken()


class CopyPace:
    """Lets a run go on between two batches: until `deadline` by the clock, and no longer than answers are there.

    With `waits` there is nothing else to do: the first answer is waited for.
    """

    def __init__(self, clock: Callable[[], float], seconds: float, waits: bool) -> None:
        self._clock = clock
        self._deadline = clock() + seconds
        self._waits = waits

    @property
    def over(self) -> bool:
        """Whether nothing more is to be begun."""
        return self._clock() > self._deadline

    def lets(self, waiting: Waiting | None) -> bool:
        """Whether a run goes on that is suspended on this; None: on nothing. At least one step of it is always
        allowed where the answer is there."""
        if waiting is None or waiting.over():
            return True
        waits, self._waits = self._waits, False
        return waits


def edge(parts: Iterable[Part], at: int, stop: int) -> int:
    """`stop`, or an edge of a part between `at` and `stop`: no copy crosses one."""
    edges = [edge for part in parts for edge in (part.share.lo, part.share.hi)]
    return min([stop, *(edge for edge in edges if edge > at)])


def _combined(old: Iterable[Part], target: Part, lo: int, hi: int) -> Iterable[Move]:
    """The moves that XOR the old parts' positions [lo, hi), whole pages, into another part."""
    for source in old:
        heads = min(len(source.share.heads), len(target.share.heads))
        yield Move(
            source.share.holder, source.handle, target.share.holder, target.handle, lo, hi, heads,
            len(source.share.heads), 0, len(target.share.heads), 0, True, target.share.pool, True,
        )  # fmt: skip


def _moves(old: Iterable[Part], new: Iterable[Part], lo: int, hi: int, page_size: int) -> Iterable[Move]:
    """The copies by which the new parts get positions [lo, hi), which no edge of a part divides."""
    olds = [part for part in old if part.share.lo <= lo and hi <= part.share.hi]
    for target in new:
        if not (target.share.lo <= lo and hi <= target.share.hi):
            continue
        for source in (part for part in olds if part.share.pool == target.share.pool):
            heads = [head for head in source.share.heads if head in target.share.heads]
            if heads:
                yield Move(
                    origin=source.share.holder,
                    source=source.handle,
                    to=target.share.holder,
                    target=target.handle,
                    lo=lo,
                    hi=hi,
                    heads=len(heads),
                    source_heads=len(source.share.heads),
                    source_first=source.share.heads.index(heads[0]),
                    target_heads=len(target.share.heads),
                    target_first=target.share.heads.index(heads[0]),
                    pool=target.share.pool,
                    paged=(lo - source.share.lo) % page_size == (lo - target.share.lo) % page_size == 0,
                )
