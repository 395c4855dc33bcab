"""Which holder keeps what of each sequence, and the operations and rows of a plan for each holder. Pure.

A sequence has a handle. What a holder keeps of it is a part with a handle of its own, so that a holder can have several
parts of one sequence after a loss. Operations wait in an outbox for each holder until it accepts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lamina.errors import EngineError
from lamina.scheduling import kv_layouts
from lamina.scheduling.holder import Holder
from lamina.scheduling.kv_shares import Layout, Pages, Share
from lamina.scheduling.local_share import prefers_local
from lamina.scheduling.request import CloseSequence, ForkSequence, OpenSequence, Plan, PlannedRow, ReplaceShares
from lamina_protocols.messages import Close, Fork, Open, Operation, Row
from lamina_protocols.routes import HolderBatch, Route


@dataclass(frozen=True, slots=True)
class Part:
    """A share, and the handle that it has at its holder."""

    handle: int
    share: Share


@dataclass(slots=True)
class _PrefillParts:
    """Handles of parts in the prefill pools, by the pool's number, while a prompt (or a rebuild) of `length` tokens is
    computed: positions from `lo` on."""

    handles: dict[int, int]
    lo: int
    length: int


class Placement:
    """The holders, and the parts of all sequences.

    `heads` has the number of KV heads of each rank. Layouts number heads through all ranks, messages within the rank.
    `shard` says how new sequences are cut within each rank: "heads", "sequence" or "heads+sequence".

    `prefill_pools` and `local_pools` are the numbers of fused holders in the model workers' processes, one a rank each.
    Prompts that fit are read from the prefill pools until they are computed; no layout names these pools. Local pools
    keep whole sequences: a sequence is in the local pools or at other holders, never in both. `local_share` is the
    wanted share of KV in the local pools; the tier controller sets it. `fuses`: decode rows are attended where they are
    stored, else where the model is, which can then send q before it has k and v; it may change between two batches.
    """

    def __init__(
        self,
        holders: Mapping[int, Holder],
        *,
        heads: Sequence[int],
        page_size: int,
        max_model_len: int,
        layers: int,
        shard: str = "heads",
        prefill_pools: Sequence[int] = (),
        local_pools: Sequence[int] = (),
    ) -> None:
        self.local_share = 1.0 if local_pools else 0.0
        self.fuses = True
        self.holders = dict(holders)
        self._page_size = page_size
        self._end = max_model_len
        firsts = accumulate(heads, initial=0)
        self._heads = [tuple(range(first, first + count)) for first, count in zip(firsts, heads, strict=False)]
        self._layers = layers
        self._shard = shard
        self.prefill_pools = tuple(prefill_pools)
        self.local_pools = tuple(local_pools)
        self._turn = 0
        self._last_part = 0
        self._translated = 0  # operations of plans so far
        self._layouts: dict[Layout, Layout] = {}  # by heads: equal ones are made once
        self._parts: dict[int, list[Part]] = {}  # by the sequence's handle
        self._prefills: dict[int, _PrefillParts] = {}
        self._prefill_used = Pages()

    # Layouts.

    @property
    def capacity(self) -> Pages:
        """All pages of every holder that takes sequences."""
        return Pages({number: holder.pages for number, holder in self._taking()})

    @property
    def tiers(self) -> bool:
        """Whether there are both local pools and other holders."""
        return bool(self.local_pools) and any(not self.in_local_pool(number) for number, _ in self._taking())

    def in_local_pool(self, number: int) -> bool:
        """Whether a holder is a local pool."""
        return number in self.local_pools

    def is_local(self, layout: Layout) -> bool:
        """Whether a layout is in the local pools."""
        return bool(layout) and layout[0].holder in self.local_pools

    def local_tokens(self, kept: Iterable[tuple[Layout, int]]) -> tuple[int, int]:
        """How many tokens are in the local pools, and how many in all, of these layouts and numbers of tokens."""
        local = total = 0
        for layout, tokens in kept:
            local += tokens if self.is_local(layout) else 0
            total += tokens
        return local, total

    def layouts(self, length: int, tokens: int = 0, beside: Iterable[tuple[Layout, int]] = ()) -> tuple[Layout, ...]:
        """The possible layouts of a new sequence of `tokens` tokens that grows up to `length`. The first brings the
        share of local KV closest to `local_share`, given the layouts and tokens of the sequences `beside` it."""
        both = tuple(layout for layout in (self._local_layout(), self.layout(length)) if layout)
        if len(both) < 2:
            return both
        local, total = self.local_tokens(beside)
        return both if prefers_local(local, total, tokens, self.local_share) else both[::-1]

    def layout(self, length: int, local: bool = False) -> Layout:
        """Shares for a new sequence of up to `length` tokens, in the local pools where `local`. The first holder
        is another once a sequence is `opened`, so that remainders are even over many sequences. Empty where there is no
        holder."""
        if local:
            return self._local_layout()
        layout: Layout = ()
        for rank, heads in enumerate(self._heads):
            taking = [
                (number, holder.weight) for number, holder in self._taking(rank) if not self.in_local_pool(number)
            ]
            if not taking:
                return ()
            turn = self._turn % len(taking)
            layout += kv_layouts.layout(
                self._shard, taking[turn:] + taking[:turn], heads, length, self._page_size, self._end
            )
        return self._layouts.setdefault(layout, layout) if self._shard == "heads" else layout

    def opened(self, layout: Layout) -> None:
        """A sequence is opened in this layout: the next one elsewhere begins at the next holder."""
        if not self.is_local(layout):
            self._turn += 1

    def _local_layout(self) -> Layout:
        layout = tuple(Share(number, self._heads_at(number), 0, self._end) for number in self.local_pools)
        return self._layouts.setdefault(layout, layout)

    def reads_locally(self, length: int) -> bool:
        """Whether the prefill pools have room for a prompt of `length` tokens now."""
        left = Pages({number: self.holders[number].pages for number in self.prefill_pools}) - self._prefill_used
        return bool(self.prefill_pools) and left.covers(self._prefill_cost(length))

    def _prefill_cost(self, length: int) -> Pages:
        pages = self._layers * (-(-length // self._page_size) + 1)
        return Pages({number: pages * len(self._heads_at(number)) for number in self.prefill_pools})

    def _heads_at(self, number: int) -> tuple[int, ...]:
        """The KV heads that a holder can have."""
        return self._heads[self.holders[number].rank]

    def substitute(self, share: Share, free: Pages) -> Share | None:
        """`share` at the holder of its heads' rank with the most free pages; never a local pool. None where there is no
        such holder."""
        numbers = [
            number
            for number, _ in self._taking()
            if not self.in_local_pool(number) and share.heads[0] in self._heads_at(number)
        ]
        if not numbers:
            return None
        best = max(numbers, key=lambda number: free.get(number, 0))
        return Share(best, share.heads, share.lo, share.hi)

    def _taking(self, rank: int | None = None) -> list[tuple[int, Holder]]:
        """The holders that take sequences, of one rank or of all."""
        return [
            (number, holder)
            for number, holder in self.holders.items()
            if number not in self.prefill_pools and not holder.draining and rank in (None, holder.rank)
        ]

    # Holders come and go.

    def joined(self, number: int, holder: Holder) -> None:
        """There is one holder more, empty. Numbers are never reused."""
        if number in self.holders:
            raise EngineError(f"holder {number} joined twice")
        self.holders[number] = holder

    def lost(self, number: int) -> None:
        """A holder is gone, with its KV."""
        del self.holders[number]

    def emptied(self, number: int) -> None:
        """A holder has lost its KV and its operations, and goes on under its number. Prompts in the prefill pools are
        read from where they are stored."""
        for handle in list(self._prefills):
            self._drop_prefill(handle)
        for handle, parts in self._parts.items():
            self._parts[handle] = [part for part in parts if part.share.holder != number]
        holder = self.holders[number]
        holder.outbox.clear()
        holder.first = 0

    @property
    def pending(self) -> bool:
        """Whether operations wait for a holder."""
        return any(holder.outbox for holder in self.holders.values())

    def outgoing(self) -> dict[int, HolderBatch]:
        """The operations that wait, without rows."""
        return {number: holder.outgoing() for number, holder in self.holders.items() if holder.outbox}

    def first_head(self, number: int) -> int:
        """The first of all KV heads that a holder can have."""
        return self._heads_at(number)[0]

    def adopt(self, handle: int, parts: Sequence[Part]) -> None:
        """A sequence has these parts of the previous engine: they are not closed."""
        self._parts[handle] = list(parts)
        for part in parts:
            waiting = self.holders[part.share.holder].outbox
            waiting[:] = [operation for operation in waiting if operation != Close(part.handle)]

    def number_parts_from(self, last: int) -> None:
        """Give out no handle of a part up to `last`."""
        self._last_part = max(self._last_part, last)

    def parts(self, handle: int) -> tuple[Part, ...]:
        """All parts of a sequence, by its handle."""
        return tuple(self._parts.get(handle, ()))

    def open_beside(self, shares: Layout) -> tuple[Part, ...]:
        """Open further parts of a sequence; `moved` or `give_up` ends that."""
        self.opened(shares)
        return tuple(self._open(share) for share in shares)

    def give_up(self, new: Iterable[Part]) -> None:
        """Close parts that were opened beside."""
        for part in new:
            self._close(part)

    def moved(self, handle: int, old: Iterable[Part], new: Iterable[Part]) -> None:
        """The `new` parts of a sequence have all tokens of the `old` ones, and take their place."""
        gone = set(old)
        self._parts[handle] = [part for part in self._parts[handle] if part not in gone] + list(new)
        self.give_up(gone)

    # Plans.

    def place(self, plan: Plan) -> dict[int, HolderBatch]:
        """The operations and rows of each holder that the plan concerns."""
        for operation in plan.operations[max(0, self._translated - plan.first) :]:
            self._translate(operation)
        self._translated = max(self._translated, plan.first + len(plan.operations))
        routes: dict[int, list[Route]] = {}
        again: dict[int, list[Route]] = {}  # further parts of a sequence come after all first ones
        for source, row in enumerate(plan.rows):
            seen = set[int]()
            for number, route in self._routes(source, row):
                (again if number in seen else routes).setdefault(number, []).append(route)
                seen.add(number)
        for number, more in again.items():
            routes[number] += more
        return {
            number: holder.outgoing(tuple(routes.get(number, ())))
            for number, holder in self.holders.items()
            if holder.outbox or number in routes
        }

    def recorded(self, plan: Plan) -> None:
        """The batch is complete: prefill pools drop the prompts and rebuilds that have ended."""
        for row in plan.rows:
            rebuilt = row.rebuild and row.sequence.rebuild is None
            if row.sample or rebuilt:
                self._drop_prefill(row.handle)

    def _translate(self, operation: OpenSequence | ForkSequence | CloseSequence | ReplaceShares) -> None:
        match operation:
            case OpenSequence(handle, layout):
                self._parts[handle] = [self._open(share) for share in layout]
            case ForkSequence(handle, parent, length):
                self._parts[handle] = self._fork(self._parts[parent], length)
            case CloseSequence(handle):
                self._drop_prefill(handle)
                for part in self._parts.pop(handle):
                    self._close(part)
            case ReplaceShares(handle, lost, shares, source, length):
                kept = [part for part in self._parts[handle] if part.share.holder != lost]
                if source is None:
                    self._parts[handle] = kept + [self._open(share) for share in shares]
                    return
                parts = [part for part in self._parts[source] if part.share in shares]
                self._parts[handle] = kept + self._fork(parts, length)

    def _open(self, share: Share) -> Part:
        part = Part(self._next(), share)
        self._queue(share.holder, Open(part.handle, self._heads_in(share.holder, share.heads), share.lo, share.hi))
        return part

    def _heads_in(self, number: int, heads: tuple[int, ...]) -> tuple[int, ...]:
        """Heads as a holder numbers them: within its rank."""
        first = self._heads_at(number)[0] if number in self.holders else 0
        return tuple(head - first for head in heads) if first else heads

    def _fork(self, parts: Sequence[Part], length: int) -> list[Part]:
        forks = []
        for part in parts:
            forks.append(Part(self._next(), part.share))
            self._queue(part.share.holder, Fork(forks[-1].handle, part.handle, length))
        return forks

    def _close(self, part: Part) -> None:
        self._queue(part.share.holder, Close(part.handle))

    def _next(self) -> int:
        self._last_part += 1
        return self._last_part

    def _queue(self, number: int, operation: Operation) -> None:
        if number in self.holders:  # not a lost one
            self.holders[number].outbox.append(operation)

    def _routes(self, source: int, row: PlannedRow) -> list[tuple[int, Route]]:
        """A route for every part that reads or stores the row. Each head reads [0, start), or [0, end) where the part
        that stores the row's tokens attends them too: always in a fused holder, and in decode unless q goes first."""
        start, end = row.start, row.start + row.count
        prefill = self._prefill_of(row)
        below = prefill.lo if prefill else start
        chooses = row.count == 1 and row.sample  # decode, or a prompt's last token alone: other rows read all
        fuses = self.fuses and chooses and not row.rebuild and prefill is None
        missing = row.sequence.rebuild.missing if row.rebuild and row.sequence.rebuild else ()
        routes = []
        for part in self._parts[row.handle]:
            share = part.share
            store = start < share.hi and end > share.lo and (not row.rebuild or share in missing)
            # A single token is attended where it is stored: that spares the model worker its own attention and a merge.
            # What is computed again is not: of the parts that hold it only the lost ones store it.
            fused = self.holders[share.holder].fused or (store and fuses)
            read_end = end if fused else min(below, share.hi)
            read = (share.lo, read_end) if read_end > share.lo else None
            if read or store:
                message = Row(part.handle, start, row.count, read, store, chooses)
                heads = self._heads_in(share.holder, share.heads)
                routes.append((share.holder, Route(source, heads, message, message.stored(share.lo, share.hi))))
        if prefill is not None:
            for number, handle in prefill.handles.items():
                message = Row(handle, start, row.count, (prefill.lo, end), True)
                heads = self._heads_in(number, self._heads_at(number))
                routes.append((number, Route(source, heads, message, (start, end))))
        return routes

    def _prefill_of(self, row: PlannedRow) -> _PrefillParts | None:
        """The parts in prefill pools that the row reads, opened where it begins a prompt or a rebuild that fits."""
        if not self.prefill_pools or all(self.in_local_pool(part.share.holder) for part in self._parts[row.handle]):
            return None  # local pools are fused themselves
        prefill = self._prefills.get(row.handle)
        if prefill is not None and prefill.lo <= row.start:
            return prefill
        self._drop_prefill(row.handle)
        left = row.sequence.left
        if left == 1 or not self.reads_locally(left):
            return None
        prefill = _PrefillParts({number: self._next() for number in self.prefill_pools}, row.start, left)
        for number, handle in prefill.handles.items():
            heads = self._heads_in(number, self._heads_at(number))
            self._queue(number, Open(handle, heads, row.start, self._end))
        self._prefills[row.handle] = prefill
        self._prefill_used += self._prefill_cost(left)
        return prefill

    def _drop_prefill(self, handle: int) -> None:
        prefill = self._prefills.pop(handle, None)
        if prefill is not None:
            self._prefill_used -= self._prefill_cost(prefill.length)
            for number, part in prefill.handles.items():
                self._queue(number, Close(part))
