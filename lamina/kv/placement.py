"""Which holder keeps what of each sequence (`Placement`), and the operations and rows for each holder. Pure.

A sequence has a handle. What a holder keeps of it in one pool is a part with a handle of its own: a holder has one in
each pool, and can have several after a loss. Whatever opens, forks or closes parts goes at once into the outbox of each
holder, and waits there until the holder accepts it. `Routing` makes the rows of a plan for each holder: what the parts
of each sequence read and store in a batch.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from lamina.errors import EngineError
from lamina.kv import kv_shares
from lamina.kv.kv_shares import Handover, Layout, Pages, Part, Place, Share, under
from lamina.kv.request import Plan, PlannedRow
from lamina_protocols.channels.versions import BOUND, FEATURES
from lamina_protocols.frames.bounds import MAX_OPERATIONS
from lamina_protocols.messages.messages import Bound, Close, Fork, Open, Operation, Row, Surveyed
from lamina_protocols.messages.routes import HolderBatch, Route


class Placement:
    """The holders, and the parts of all sequences.

    `heads` has the number of KV heads of each rank, by pool. Layouts number heads through all ranks, messages within
    the rank. `shard` says how new sequences are cut within each rank: "heads", "sequence" or "heads+sequence"; what the
    pools of `states` keep is cut by heads always.

    `local_pools` are the numbers of fused holders in the model workers' processes beside others, one a rank. They have
    local copies of prompts that are being computed; and where there is a `local_tier`, whole sequences too: the layout
    of a sequence has the local pools or other holders, never both. `local_share` is the wanted share of KV in the local
    tier; the tier controller sets it. `indexed` and `samples` as in `Routing`.
    """

    def __init__(
        self,
        holders: Mapping[int, Holder],
        *,
        heads: Sequence[Sequence[int]],
        page_size: int,
        max_model_len: int,
        shard: str = "heads",
        local_pools: Sequence[int] = (),
        local_tier: bool = False,
        states: Container[int] = (),
        indexed: Container[int] = (),
        samples: bool = False,
    ) -> None:
        self.local_share = 1.0 if local_tier else 0.0
        self.holders = dict(holders)
        self._page_size = page_size
        self._end = max_model_len
        self._heads = _numbered(heads)
        self._shard = shard
        self.states = states
        self.local_pools = tuple(local_pools)
        self._local_tier = local_tier
        self._indexed = indexed
        self.samples = samples
        self._routing = Routing(self.holders, self._heads, states, indexed, samples)
        self._turn = 0
        self._last_handle = 0
        self._last_part = 0
        self._layouts: dict[Layout, Layout] = {}  # by heads: equal ones are made once
        self._parts: dict[int, list[Part]] = {}  # by the sequence's handle

    # Layouts.

    @property
    def pages(self) -> Pages:
        return _pages(self.holders.items())

    @property
    def capacity(self) -> Pages:
        """All pages of every holder that takes sequences."""
        return _pages(self._taking())

    def places(self, numbers: Iterable[int]) -> set[Place]:
        return {(number, pool) for number in numbers for pool in range(len(self.holders[number].pages))}

    @property
    def tiers(self) -> bool:
        """Whether there are both a local tier and other holders."""
        return self._local_tier and any(number not in self.local_pools for number, _ in self._taking())

    def keeps(self, number: int) -> bool:
        """Whether a holder keeps sequences, not only copies."""
        return self._local_tier or number not in self.local_pools

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
        alternatives = tuple(layout for layout in (self.layout(length, local=True), self.layout(length)) if layout)
        if len(alternatives) < 2:
            return alternatives
        local, total = self.local_tokens(beside)
        return alternatives if prefers_local(local, total, tokens, self.local_share) else alternatives[::-1]

    def layout(self, length: int, local: bool = False) -> Layout:
        """Shares for a new sequence of up to `length` tokens, in the local tier where `local`. The first holder
        is another once a sequence is `opened`, so that remainders are even over many sequences. Empty where there is no
        holder."""
        if local:
            return self._local_layout() if self._local_tier else ()
        layout: Layout = ()
        for rank, heads in enumerate(self._heads):
            taking = [
                (number, holder.weight) for number, holder in self._taking(rank) if number not in self.local_pools
            ]
            if not taking:
                return ()
            turn = self._turn % len(taking)
            for pool, pool_heads in enumerate(heads):
                shard = "heads" if pool in self.states else self._shard
                shares = kv_shares.layout(
                    shard, taking[turn:] + taking[:turn], pool_heads, length, self._page_size, self._end
                )
                layout += tuple(replace(share, pool=pool) for share in shares) if pool else shares
        return self._layouts.setdefault(layout, layout) if self._shard == "heads" else layout

    def _local_layout(self, lo: int = 0) -> Layout:
        layout = tuple(
            Share(number, heads, lo, self._end, pool)
            for number in self.local_pools
            for pool, heads in enumerate(self._heads_at(number))
        )
        return layout if lo else self._layouts.setdefault(layout, layout)

    def local_copy(self, layout: Layout, lo: int) -> Layout:
        """The shares of a local copy, of positions from `lo` on, of a sequence in this layout. Empty where it is local
        itself, or there are no local pools, or a copy would lack keys that an index chooses among."""
        if self.states or not layout or self.is_local(layout) or (self._indexed and lo):
            return ()
        return under(self._local_layout(lo), layout[0].policy)

    def _heads_at(self, number: int) -> tuple[tuple[int, ...], ...]:
        """The KV heads that a holder can have, by pool."""
        return self._heads[self.holders[number].rank]

    def substitute(self, share: Share, free: Pages) -> Share | None:
        """`share` at the holder of its heads' rank with the most free pages; never a local pool. None where there is no
        such holder."""
        numbers = self.hosts(share)
        if not numbers:
            return None
        best = max(numbers, key=lambda number: free.get((number, share.pool), 0))
        return replace(share, holder=best)

    def hosts(self, share: Share, alike: bool = False) -> tuple[int, ...]:
        """The holders at attention workers that take sequences and could have a share, or a spare of it; `alike`: those
        alone that lay out pages as its holder does."""
        return tuple(
            number
            for number, holder in self._taking()
            if number not in self.local_pools
            and share.heads[0] in self._heads_at(number)[share.pool]
            and not (alike and holder.page_layout != self.holders[share.holder].page_layout)
        )

    def grows(self, share: Share) -> bool:
        """Whether what comes after some position of a share could be at another holder: its keys may be in several
        places, and its holder, which takes part in batches, can be told where its part ends."""
        holder = self.holders.get(share.holder)
        apart = share.pool not in self.states and share.pool not in self._indexed
        return apart and holder is not None and share.holder not in self.local_pools and BOUND in holder.features

    def _taking(self, rank: int | None = None) -> list[tuple[int, Holder]]:
        """The holders that take sequences, of one rank or of all."""
        return [
            (number, holder)
            for number, holder in self.holders.items()
            if self.keeps(number) and not holder.draining and rank in (None, holder.rank)
        ]

    # Holders come and go.

    def joined(self, number: int, holder: Holder) -> None:
        """A holder has joined, empty. Numbers are never reused."""
        if number in self.holders:
            raise EngineError(f"holder {number} joined twice")
        self.holders[number] = holder

    def lost(self, number: int) -> None:
        del self.holders[number]

    def emptied(self, number: int) -> None:
        """A holder has lost its KV and its operations, and goes on under its number."""
        for handle, parts in self._parts.items():
            self._parts[handle] = [part for part in parts if part.share.holder != number]
        self.holders[number].empty()

    @property
    def draining(self) -> frozenset[int]:
        """The holders that get nothing new, since they are to be let go."""
        return frozenset(number for number, holder in self.holders.items() if holder.draining)

    @property
    def pending(self) -> bool:
        """Whether operations wait for a holder."""
        return any(holder.outbox for holder in self.holders.values())

    @property
    def overfull(self) -> bool:
        """Whether more operations wait for a holder than one announcement carries: they go before any rows."""
        return any(len(holder.outbox) > MAX_OPERATIONS for holder in self.holders.values())

    def outgoing(self) -> dict[int, HolderBatch]:
        """The operations that wait, without rows, as many as one announcement carries."""
        return {number: holder.outgoing() for number, holder in self.holders.items() if holder.outbox}

    def first_heads(self, number: int) -> tuple[int, ...]:
        """The first of all KV heads that a holder can have, by pool."""
        return tuple(heads[0] for heads in self._heads_at(number))

    def adopt(self, handle: int, parts: Sequence[Part]) -> None:
        """A sequence has these parts of the previous engine: they are not closed."""
        self._parts[handle] = list(parts)
        for part in parts:
            self.holders[part.share.holder].keep(part.handle)

    def number_from(self, sequence: int, part: int) -> None:
        """Give out no handle of a sequence, or of a part, up to these."""
        self._last_handle, self._last_part = max(self._last_handle, sequence), max(self._last_part, part)

    def parts(self, handle: int) -> tuple[Part, ...]:
        """All parts of a sequence, by its handle."""
        return tuple(self._parts.get(handle, ()))

    # Sequences at holders.

    @property
    def closing(self) -> Pages:
        """The pages that closes free which wait, at least."""
        return Pages(
            {
                (number, pool): pages
                for number, holder in self.holders.items()
                for pool, pages in enumerate(holder.closing)
                if pages
            }
        )

    def open(self, layout: Layout) -> int:
        """Open an empty sequence. Returns its handle, which is never used again."""
        self._turn += not self.is_local(layout)  # the next one elsewhere begins at the next holder
        return self._keep([self._open(share) for share in layout])

    def fork(self, parent: int, length: int, policy: str | None = None) -> int:
        """Make a sequence of the parent's first `length` tokens, of that policy; None: of the parent's. Returns its
        handle."""
        return self._keep(self._fork(self._parts[parent], length, policy))

    def close(self, handle: int, freed: Pages) -> None:
        """Close a sequence, which frees these pages or more."""
        self.close_parts(self._parts.pop(handle), freed)

    def replace(self, handle: int, lost: int, shares: Layout, source: int | None = None, length: int = 0) -> None:
        """Open a lost holder's part of a sequence elsewhere: empty, or as forks of the source's shares."""
        other_parts = [part for part in self._parts[handle] if part.share.holder != lost]
        if source is None:
            self._parts[handle] = other_parts + [self._open(share) for share in shares]
        else:
            parts = [part for part in self._parts[source] if part.share in shares]
            self._parts[handle] = other_parts + self._fork(parts, length)

    def grow(self, handle: int, handovers: Sequence[Handover]) -> None:
        """Have shares of a sequence grow elsewhere: their parts end, or are closed where they have nothing yet."""
        parts: list[Part] = []
        for part in self._parts[handle]:
            handover = next((candidate for candidate in handovers if candidate.share == part.share), None)
            if handover is None:
                parts.append(part)
                continue
            if handover.ended is None:
                self._queue(part.share, Close(part.handle))
            else:
                self._queue(part.share, Bound(part.handle, handover.ended.hi))
                parts.append(Part(part.handle, handover.ended))
            parts.append(self._open(handover.taker))
        self._parts[handle] = parts

    def bound(self, part: Part, at: int) -> Part | None:
        """A part ends at position `at`, above which it has nothing. None where its holder cannot be told."""
        if part.share.hi <= at:
            return part
        holder = self.holders.get(part.share.holder)
        if holder is None or BOUND not in holder.features:
            return None
        self._queue(part.share, Bound(part.handle, at))
        return Part(part.handle, replace(part.share, hi=at))

    def promote(self, handle: int, lost: Share, part: Part | None, share: Share) -> None:
        """`part` takes the place of a sequence's lost part of share `lost`, if there is one; None: an empty one for
        `share` does."""
        others = [other for other in self._parts[handle] if other.share != lost]
        self._parts[handle] = [*others, self._open(share) if part is None else part]

    def fork_part(self, part: Part, length: int, share: Share) -> Part:
        """A part for `share` that has the first `length` tokens of another at its holder. `close_parts` ends it."""
        fork = Part(self._next(), share)
        self._queue(share, Fork(fork.handle, part.handle, length, share.policy))
        return fork

    def check_integrity(self, handles: Sequence[int]) -> None:
        """Raise EngineError unless exactly these sequences, all different, have parts."""
        if len(set(handles)) != len(handles) or self._parts.keys() != set(handles):
            raise EngineError(f"the holders will have handles {sorted(self._parts)}; in use are {sorted(handles)}")

    def _keep(self, parts: list[Part]) -> int:
        self._last_handle += 1
        self._parts[self._last_handle] = parts
        return self._last_handle

    def open_beside(self, shares: Layout) -> tuple[Part, ...]:
        """Open further parts of a sequence; `moved` or `close_parts` ends that."""
        self._turn += not self.is_local(shares)
        return tuple(self._open(share) for share in shares)

    def close_parts(self, parts: Iterable[Part], freed: Pages) -> None:
        """Close parts, which frees these pages or more."""
        freed_pages = dict(freed)
        for part in parts:
            self._queue(part.share, Close(part.handle), freed_pages.pop(part.share.at, 0))

    def moved(self, handle: int, old: Iterable[Part], new: Iterable[Part], freed: Pages) -> None:
        """The `new` parts of a sequence have all tokens of the `old` ones, and take their place; that frees these pages
        or more."""
        old_parts = set(old)
        self._parts[handle] = [part for part in self._parts[handle] if part not in old_parts] + list(new)
        self.close_parts(old_parts, freed)

    # Plans.

    def place(self, plan: Plan, fuses: bool = True) -> dict[int, HolderBatch]:
        """The rows of each holder that the plan concerns, and all operations that wait. `fuses` as in `Routing`."""
        return self._routing.batches(plan, self._parts, fuses)

    def _open(self, share: Share) -> Part:
        part = Part(self._next(), share)
        self._queue(
            share, Open(part.handle, share.pool, self._routing.heads_in(share), share.lo, share.hi, share.policy)
        )
        return part

    def _fork(self, parts: Sequence[Part], length: int, policy: str | None = None) -> list[Part]:
        shares = (
            part.share if policy in (None, part.share.policy) else replace(part.share, policy=policy) for part in parts
        )
        return [self.fork_part(part, length, share) for part, share in zip(parts, shares, strict=True)]

    def _next(self) -> int:
        self._last_part += 1
        return self._last_part

    def _queue(self, share: Share, operation: Operation, freed: int = 0) -> None:
        if share.holder in self.holders:  # not a lost one
            self.holders[share.holder].queue(operation, share.pool, freed)


@dataclass(slots=True)
class Holder:
    """A holder of KV that belongs to one model worker, its `rank`, and has heads of that rank only. `pages` is its
    whole memory, by pool; a holder with a larger `weight` gets more of each sequence. `name` is that of its attention
    worker, "" for a holder in a model worker's process; `page_layout` says how its pages lie.

    `features` are those of `versions` that it has: it gets no operation of another. A `fused` holder attends the rows'
    own tokens too. A `draining` one gets nothing new. Operations wait in the `outbox` until the holder has accepted
    them; `closing` are the pages of each pool that the closes among them free, at least.
    """

    pages: tuple[int, ...]
    weight: int = 1
    fused: bool = False
    rank: int = 0
    name: str = ""
    page_layout: str = ""
    draining: bool = False
    features: frozenset[str] = FEATURES
    outbox: list[Operation] = field(default_factory=list)
    first: int = 0  # the number of the first operation in the outbox
    closing: list[int] = field(default_factory=list)
    _freed: list[tuple[int, int]] = field(default_factory=list)  # by each operation in the outbox: pool, pages

    def __post_init__(self) -> None:
        self.closing = [0] * len(self.pages)

    def queue(self, operation: Operation, pool: int = 0, freed: int = 0) -> None:
        """Have the holder apply an operation, which frees so many pages of a pool or more."""
        self.outbox.append(operation)
        self._freed.append((pool, freed))
        self.closing[pool] += freed

    def outgoing(self, routes: tuple[Route, ...] = ()) -> HolderBatch:
        """These rows and all operations that wait; without rows as many as one announcement carries."""
        return HolderBatch(self.first, tuple(self.outbox if routes else self.outbox[:MAX_OPERATIONS]), routes)

    def keeps(self, kept: Surveyed) -> None:
        """The holder has these parts of the previous engine. They are closed unless placement adopts them."""
        self.empty(kept.next_operation)
        for part in kept.parts:
            self.queue(Close(part.handle))

    def keep(self, handle: int) -> None:
        """Do not close this part of the previous engine."""
        index = self.outbox.index(Close(handle))
        del self.outbox[index], self._freed[index]

    def empty(self, first: int = 0) -> None:
        """The holder has nothing of this engine; its next operation has number `first`."""
        self.outbox.clear()
        self._freed.clear()
        self.first, self.closing = first, [0] * len(self.pages)

    def accepted(self, batch: HolderBatch) -> list[int]:
        """The holder has applied the batch's operations. Returns how many pages of each pool its closes have freed, at
        least."""
        done = max(0, batch.first + len(batch.operations) - self.first)
        freed = [0] * len(self.pages)
        for pool, pages in self._freed[:done]:
            freed[pool] += pages
            self.closing[pool] -= pages
        del self.outbox[:done], self._freed[:done]
        self.first += done
        return freed


@dataclass(frozen=True, slots=True)
class Routing:
    """Makes rows of plans. `holders` by number, which come and go; `heads` has the KV heads of each rank by pool,
    numbered through all ranks.

    What the pools of `states` keep is read before a row and stored after it. `indexed`: the pools where an index of the
    model's own chooses among all keys of a sequence; a part that attends a row there has all of them, the row's too.
    Where policies learn from prompts' queries (`samples`), rows say how long their prompts are, and parts that neither
    read nor store one have a row too, by which they can ask for queries.
    """

    holders: Mapping[int, Holder]
    heads: Sequence[Sequence[tuple[int, ...]]]
    states: Container[int]
    indexed: Container[int]
    samples: bool

    def batches(self, plan: Plan, parts: Mapping[int, Sequence[Part]], fuses: bool) -> dict[int, HolderBatch]:
        """The rows of each holder that the plan concerns, and all operations that wait. `parts` are those of each
        sequence by its handle. With `fuses` decode rows are attended where they are stored, else where the model is,
        which can then send q before it has k and v."""
        routes: dict[int, list[Route]] = {}
        again: dict[int, list[Route]] = {}  # further parts of a sequence come after all first ones
        for source, row in enumerate(plan.rows):
            places = set[Place]()
            for place, route in self._routes(source, row, parts[row.handle], fuses):
                (again if place in places else routes).setdefault(place[0], []).append(route)
                places.add(place)
        for number, more in again.items():
            routes[number] += more
        return {
            number: holder.outgoing(tuple(routes.get(number, ())))
            for number, holder in self.holders.items()
            if holder.outbox or number in routes
        }

    def heads_in(self, share: Share) -> tuple[int, ...]:
        """A share's heads as the holder numbers them: within its rank."""
        if len(self.heads) == 1 or share.holder not in self.holders:
            return share.heads
        first = self.heads[self.holders[share.holder].rank][share.pool][0]
        return tuple(head - first for head in share.heads) if first else share.heads

    def _routes(self, source: int, row: PlannedRow, parts: Sequence[Part], fuses: bool) -> list[tuple[Place, Route]]:
        """A route for every part that reads or stores the row. Each head reads [0, start), or [0, end) where the part
        that stores the row's tokens attends them too: always in a fused holder, and in decode unless q goes first.
        States are read before the row, and stored after it. With an index each part attends them, unless a local copy
        does."""
        start, end = row.start, row.start + row.count
        copy = row.sequence.local_copy
        below = copy[0].share.lo if copy else start
        chooses = row.decodes  # other rows read all
        fuses = fuses and chooses and not copy
        missing = row.sequence.rebuild.missing if row.rebuild and row.sequence.rebuild else ()
        prompt = len(row.sequence.tokens) if self.samples and not chooses else 0
        routes = []
        for part in parts:
            share = part.share
            store = start < share.hi and end > share.lo and (not row.rebuild or share in missing)
            # Decode is attended where it is stored: that spares the model worker its own attention and a merge.
            # What is computed again is not: of the parts that hold it only the lost ones store it.
            fused = self.holders[share.holder].fused or (store and fuses) or (share.pool in self.indexed and not copy)
            fused = fused and share.pool not in self.states
            read_end = min(end if fused else below, share.hi)
            read = (share.lo, read_end) if read_end > share.lo else None
            # What is computed again has been seen by the parts that were not lost.
            sees = prompt if not row.rebuild or share in missing else 0
            if read or store or (sees and start >= share.hi and share.pool not in self.states):
                message = Row(part.handle, start, row.count, read, store, chooses, sees)
                stored = message.stored(share.lo, share.hi)
                routes.append((share.at, Route(source, self.heads_in(share), message, stored, share.pool)))
        for part in copy:
            message, share = Row(part.handle, start, row.count, (below, end), True), part.share
            routes.append((share.at, Route(source, self.heads_in(share), message, (start, end), share.pool)))
        return routes


def prefers_local(local: int, total: int, tokens: int, share: float) -> bool:
    """Whether a sequence of `tokens` tokens should be local so that `share` of all is; `local` of `total` are now."""
    return share > 0 and local + tokens / 2 <= share * (total + tokens)


def _numbered(heads: Sequence[Sequence[int]]) -> list[tuple[tuple[int, ...], ...]]:
    """The KV heads of each rank by pool, numbered through all ranks, from their counts."""
    pools = [list(pairwise(accumulate(counts, initial=0))) for counts in zip(*heads, strict=True)]
    return [tuple(tuple(range(*bounds)) for bounds in rank) for rank in zip(*pools, strict=True)]


def _pages(holders: Iterable[tuple[int, Holder]]) -> Pages:
    return Pages({(number, pool): pages for number, holder in holders for pool, pages in enumerate(holder.pages)})
