"""How much KV the holders of an engine have room for, counted in tokens. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.kv_shares import Pages


@dataclass(frozen=True, slots=True)
class KvLoad:
    """Tokens of sequences, at the holders that take sequences.

    `workers` has what each attention worker keeps, by its name, `worker` what the largest has room for; `total` is the
    room of all holders, the engine's own included, and `left` what is left of it: prefixes that nobody uses count as
    left, and it is negative where running sequences lack room. `queued` are the tokens of requests that wait for room;
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
        held = Counter[int]()
        for (number, pool), count in pages.items():
            if (number, pool) in capacity and names in (None, placement.holders[number].name):
                held[pool] += count
        return min(held[pool] * config.page_size // each for pool, each in block.items())

    running = scheduler.running
    total, headroom, whole, left = tokens(capacity), running.headroom(), Counter[int](), Counter[int]()
    for (number, pool), count in capacity.items():
        whole[pool] += count
        left[pool] += headroom.get((number, pool), 0)
    # The scarcest pool counts, records of states included, which no token takes.
    share = min(left[pool] / count for pool, count in whole.items())
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
