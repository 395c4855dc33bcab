"""What one batch asks of one holder, before it is a message. Nouns only: importing them loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lamina_protocols.messages import Operation, Row


@dataclass(frozen=True, slots=True)
class Route:
    """A row of one holder: `row` concerns the batch's span number `source`, its KV heads `heads`, and stores
    the positions `stored` of it."""

    source: int
    heads: tuple[int, ...]
    row: Row
    stored: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Span:
    """`count` tokens of one sequence in the batch, at positions `start` ...; spans follow each other in the batch."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class HolderBatch:
    """What one batch asks of one holder: operations, the first of which has number `first`, and routed rows."""

    first: int
    operations: tuple[Operation, ...]
    routes: tuple[Route, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows as the announcement carries them."""
        return tuple(route.row for route in self.routes)
