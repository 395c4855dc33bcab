"""A holder as placement sees it: its pool of KV, and the operations that wait for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamina_protocols.channels.versions import FEATURES
from lamina_protocols.messages.messages import Close, Operation, Surveyed
from lamina_protocols.messages.routes import HolderBatch, Route


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
        """All operations that wait, and these rows."""
        return HolderBatch(self.first, tuple(self.outbox), routes)

    def keeps(self, kept: Surveyed) -> None:
        """The holder has these parts of the previous engine. They are closed unless placement adopts them."""
        self.empty(kept.next_operation)
        for part in kept.parts:
            self.queue(Close(part.handle))

    def keep(self, handle: int) -> None:
        """Do not close this part of the previous engine."""
        at = self.outbox.index(Close(handle))
        del self.outbox[at], self._freed[at]

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
