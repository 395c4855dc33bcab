"""How many attention workers an engine should have (`Autoscaler`), by the growth of its KV (`KvLoad`). Pure.

One more worker is wanted so early that it has joined before the holders are full. One fewer is wanted once the others
have had ample room for a while. Room is counted in tokens.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from lamina.kv.kv_shares import Pages
from lamina.scheduling.control_plane import ControlPlane

START = 3.0  # seconds that a worker is expected to need before the first one was measured
PATIENCE = 60.0  # seconds for which a worker was not needed before it goes
_WINDOW = 10.0  # seconds over which growth is measured
_AHEAD = 1.5  # of the seconds that a worker needs: it is wanted this early
_AHEAD_SECONDS = 5.0  # and these besides: the next one may not be as quick as the last
_AMPLE = 3.0  # as often as that, the growth must fit at the others for one to go
_FREE = 0.25  # of the others' room must be left, too


class Autoscaler:
    """Decides for one engine between `least` and `most` workers. `start_seconds` is how long a worker needs, from being
    wanted until it is there: measured each time, `start_seconds` at first. Times are seconds of any steady clock."""

    def __init__(self, least: int, most: int, start_seconds: float = START, patience: float = PATIENCE) -> None:
        self.least = least
        self.most = most
        self.start_seconds = start_seconds
        self.wanted = least
        self._patience = patience
        self._samples: deque[tuple[float, int, int]] = deque()  # time, tokens generated, headroom; of the last seconds
        self._workers = 0  # workers, as those were seen
        self._request: tuple[float, int] | None = None  # when more were asked for, and how many were there
        self._ample: float | None = None  # since when a worker is not needed

    def decide(self, load: KvLoad, now: float) -> Decision:
        """The decision at `now`. A worker that was lost is expected back."""
        workers = len(load.workers)
        if workers != self._workers:
            self._samples.clear()  # the room is another one
            self._workers = workers
        self._arrived(workers, now)
        self.wanted = max(self.wanted, min(workers, self.most))
        coming = max(0, self.wanted - workers)
        headroom, growth = load.left - load.queued, self._growth(load, now)
        full_in = max(0.0, headroom / growth) if growth > 0 else None if headroom >= 0 else 0.0
        ahead = _AHEAD * self.start_seconds + _AHEAD_SECONDS
        short = growth * ahead - headroom - coming * load.worker
        more = max(math.ceil(short / max(1, load.worker)), load.stranded and not coming)
        before, leaves = self.wanted, ""
        if more > 0:
            self._ample = None
            self.wanted = min(self.most, self.wanted + more)
        elif self._one_too_many(load, workers, coming, growth * ahead * _AMPLE, now):
            leaves = min(load.workers, key=lambda name: load.workers[name])
            self.wanted -= 1
        if self.wanted == before:
            return Decision(before, full_in)
        if not leaves:
            self._request = self._request or (now, workers)
        when = "KV does not grow" if full_in is None else f"KV is full in {full_in:.1f} s"
        reason = (
            f"attention workers {before} -> {self.wanted} of {self.least} to {self.most}: {when}, {load.left} of "
            f"{load.total} tokens left, {load.queued} queued, {growth:.0f} more a second; a worker has {load.worker} "
            f"and needs {self.start_seconds:.1f} s"
        )
        return Decision(self.wanted, full_in, leaves, reason)

    def _growth(self, load: KvLoad, now: float) -> float:
        """Tokens a second by which KV grows: what running sequences generate, or more where room has shrunk faster."""
        headroom = load.left - load.queued
        self._samples.append((now, load.generated, headroom))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _WINDOW:
            self._samples.popleft()
        since, generated, _ = self._samples[0]
        seconds = now - since
        generating = (load.generated - generated) / seconds if seconds > 0 else 0.0
        losses = [before - after for (_, _, before), (_, _, after) in pairwise(self._samples)]
        trend = sum(losses) - max(losses, default=0)  # a lone burst of prompts is no trend
        return max(generating, trend / _WINDOW)

    def _arrived(self, there: int, now: float) -> None:
        """Measure how long a worker that was asked for has taken."""
        if self._request is None:
            return
        request_time, before = self._request
        if there > before:
            took = now - request_time
            self.start_seconds = max(took, (self.start_seconds + took) / 2)
            self._request = (request_time, there) if there < self.wanted else None

    def _one_too_many(self, load: KvLoad, there: int, coming: int, growth: float, now: float) -> bool:
        """Whether the others have had ample room for a while: for so much growth, and a share of theirs besides."""
        room = load.left - load.queued - load.worker
        ample = room >= max(growth, _FREE * (load.total - load.worker))
        if there <= self.least or coming or load.stranded or not ample:
            self._ample = None
            return False
        self._ample = now if self._ample is None else self._ample
        if now - self._ample < self._patience:
            return False
        self._ample = None
        return True


@dataclass(frozen=True, slots=True)
class Decision:
    """`wanted` attention workers. `full_in`: seconds until the holders are full as KV grows now, None where it does not
    grow. `leaves` is the worker that is to be drained and ended, "" for none; `reason` says why the number has changed,
    "" where it has not."""

    wanted: int
    full_in: float | None = None
    leaves: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class KvLoad:
    """Tokens of sequences, at the holders that take sequences.

    `workers` has what each attention worker keeps, by its name, `worker` what the largest has room for; `total` is the
    room of all holders, the engine's own included, and `left` what is left of it: unused prefixes count as left, and it
    is negative where running sequences lack room. `queued` are the tokens of requests that wait for room;
    `stranded`: one of these is too long for all holders together. `generated` counts tokens since the start.
    """

    workers: Mapping[str, int]
    worker: int
    total: int
    left: int
    queued: int
    stranded: bool
    generated: int


def kv_load(control: ControlPlane, generated: int) -> KvLoad | None:
    """The load of an engine that has generated so many tokens; None where no holder keeps KV by the token."""
    placement, scheduler = control.placement, control.scheduler
    capacity, config = placement.capacity, scheduler.config
    layout = placement.layout(1) or placement.layout(1, local=True)
    block = Counter[int]()  # pages of `page_size` tokens, by pool
    for (_, pool), pages in config.page_set(layout, 0).items():
        block[pool] += pages
    if not block:
        return None

    def tokens(pages: Pages, names: str | None = None) -> int:
        pages_by_pool = Counter[int]()
        for (number, pool), count in pages.items():
            if (number, pool) in capacity and names in (None, placement.holders[number].name):
                pages_by_pool[pool] += count
        return min(pages_by_pool[pool] * config.page_size // pages_of_block for pool, pages_of_block in block.items())

    running = scheduler.running
    total, headroom, pages_of_pool, free_of_pool = tokens(capacity), running.headroom(), Counter[int](), Counter[int]()
    for (number, pool), count in capacity.items():
        pages_of_pool[pool] += count
        free_of_pool[pool] += headroom.get((number, pool), 0)
    # The scarcest pool counts, records of states included, which no token takes.
    share = min(free_of_pool[pool] / count for pool, count in pages_of_pool.items())
    names = dict.fromkeys(placement.holders[number].name for number, _ in capacity)
    rooms = {name: tokens(capacity, name) for name in names if name}
    free = scheduler.ledger.free
    return KvLoad(
        {name: room - tokens(free, name) for name, room in rooms.items()},
        max(rooms.values(), default=total),  # alone the engine's own: all holders have the same memory
        total,
        int(share * total),
        scheduler.admission.queued_tokens,
        bool(scheduler.admission.stranded),
        generated,
    )
