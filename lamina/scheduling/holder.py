"""A holder as placement sees it: its pool of KV, and the operations that wait for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamina_protocols.messages import Close, Operation, Surveyed
from lamina_protocols.routes import HolderBatch, Route


@dataclass(slots=True)
class Holder:
    """A pool of KV that belongs to one model worker, its `rank`, and has heads of that rank only. `pages` is its whole
    memory; a holder with a larger `weight` gets more of each sequence. `name` is that of its attention worker, "" for a
    pool in a model worker's process.

    A `fused` holder attends the rows' own tokens too. A `draining` one gets nothing new.
    """

    pages: int
    weight: int = 1
    fused: bool = False
    rank: int = 0
    name: str = ""
    draining: bool = False
    outbox: list[Operation] = field(default_factory=list)
    first: int = 0  # the number of the first operation in the outbox

    def outgoing(self, routes: tuple[Route, ...] = ()) -> HolderBatch:
        """All operations that wait, and these rows."""
        return HolderBatch(self.first, tuple(self.outbox), routes)

    def keeps(self, kept: Surveyed) -> None:
        """The holder has these parts of the previous engine. They are closed unless placement adopts them."""
        self.first = kept.next_operation
        self.outbox = [Close(part.handle) for part in kept.parts]

    def accepted(self, batch: HolderBatch) -> None:
        """The holder has applied the batch's operations."""
        done = max(0, batch.first + len(batch.operations) - self.first)
        del self.outbox[:done]
        self.first += done
