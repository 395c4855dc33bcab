"""A holder as placement sees it: its pool of KV, and the operations that wait for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamina_protocols.messages import Close, Operation, Surveyed
from lamina_protocols.routes import HolderBatch, Route


@dataclass(slots=True)
class Holder:
    """One holder as placement sees it: a pool of KV that belongs to one model worker, its `rank`, and has heads of
    that rank only. `pages` is its whole memory; a larger `weight` gets more of each sequence. `name` is that of its
    attention worker, "" for a pool in a model worker's process.

    A `fused` holder attends the rows' own tokens too. One that is `draining` gets nothing new.
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
        """All that waits, and routes."""
        return HolderBatch(self.first, tuple(self.outbox), routes)

    def waiting(self, applied: int) -> list[Operation]:
        """What waits, for a holder that is known to have applied the operations below number `applied`."""
        return self.outbox[max(0, applied - self.first) :]

    def keeps(self, kept: Surveyed) -> None:
        """It has this from an engine before, which is closed unless it is adopted."""
        self.first = kept.next_operation
        self.outbox = [Close(part.handle) for part in kept.parts]

    def accepted(self, share: HolderBatch) -> None:
        """It has applied the share's operations."""
        done = max(0, share.first + len(share.operations) - self.first)
        del self.outbox[:done]
        self.first += done
