"""The rows of a plan for each holder: what the parts of each sequence read and store in a batch. Pure."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from lamina.scheduling.holder import Holder
from lamina.scheduling.kv_shares import Part, Place, Share
from lamina.scheduling.request import Plan, PlannedRow
from lamina_protocols.messages.messages import Row
from lamina_protocols.messages.routes import HolderBatch, Route


@dataclass(frozen=True, slots=True)
class Routing:
    """Makes rows of plans. `holders` by number, which come and go; `heads` has the KV heads of each rank by pool,
    numbered through all ranks.

    What the pools of `states` keep is read before a row and stored after it. `indexed`: the pools where an index of the
    model's own chooses among all keys of a sequence; whoever attends a row there has all of them, the row's own too.
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
            seen = set[Place]()
            for at, route in self._routes(source, row, parts[row.handle], fuses):
                (again if at in seen else routes).setdefault(at[0], []).append(route)
                seen.add(at)
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
