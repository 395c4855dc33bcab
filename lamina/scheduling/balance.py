"""Which KV is worth moving after a holder has joined, so that a step waits less for the holder that reads most. Pure.

A step takes as long as the holder with the most KV to read. What a sequence has at that one moves to the one that reads
least, where the steps that it will still take pay for the copy. Each move brings the two closer and never past each
other, so moves come to an end and none is taken back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lamina.scheduling.kv_shares import Layouts, Share
from lamina.scheduling.request import ScheduledSequence, SchedulerConfig

PAYS = (
    128  # tokens that a sequence must still be able to get: copying a page takes as long as reading it about 60 times
)
_UNEVEN = 0.25  # of what the busiest holder reads, that the other one must read less


class Kept(NamedTuple):
    """What a sequence has of a share: so many pages, which each of its steps reads."""

    sequence: ScheduledSequence
    share: Share
    pages: int


class Balancing(NamedTuple):
    """Have a share of a sequence move to another holder."""

    sequence: ScheduledSequence
    share: Share
    to: int


def kept(config: SchedulerConfig, sequences: Iterable[ScheduledSequence]) -> list[Kept]:
    """What these sequences have, of pools without states."""
    found = []
    for sequence in sequences:
        for share in sequence.layout:
            if share.pool not in config.states:
                pages = config.held((share,), 0, sequence.computed, sequence.floor).get(share.at, 0)
                found.append(Kept(sequence, share, pages))
    return found


def next_move(every: Sequence[Kept], weights: Mapping[int, int], layouts: Layouts) -> Balancing | None:
    """The move that pays most; None where none pays. `weights` are those of the holders: one with a larger weight reads
    as much more in the same time."""
    read: Counter[int] = Counter()
    for each in every:
        read[each.share.holder] += each.pages
    best: tuple[float, Balancing] | None = None
    for sequence, share, pages in every:
        here = share.holder
        if not pages or here not in weights or not sequence.decodes or sequence.longest - sequence.computed < PAYS:
            continue
        for to in layouts.hosts(share):
            before, after = read[here] / weights[here], (read[to] + pages) / weights[to]
            uneven = read[to] / weights[to] <= (1 - _UNEVEN) * before
            if to != here and uneven and after <= before - pages / weights[here]:
                gain = before - after
                if best is None or gain * pages > best[0]:
                    best = gain * pages, Balancing(sequence, share, to)
    return None if best is None else best[1]
