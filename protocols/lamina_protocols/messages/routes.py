"""What one batch asks of one holder, before it becomes messages. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lamina_protocols.messages.messages import Operation, Row


class Route(NamedTuple):  # of which a batch makes many: a dataclass takes three times as long
    """A row for one holder: `row` covers the KV heads `heads` of the batch's span number `source`, and stores the
    positions `stored` of it. Its part is in the pool number `pool`. The holder wants a `Sample` of the row, of one
    position in `sampled`; 0: none."""

    source: int
    heads: tuple[int, ...]
    row: Row
    stored: tuple[int, int]
    pool: int = 0
    sampled: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """`count` tokens of one sequence in the batch, from position `start`. A batch is its spans, one after another.

    `policy`: of the sequence, as in `Open`."""

    start: int
    count: int
    policy: str = ""


@dataclass(frozen=True, slots=True)
class HolderBatch:
    """What one batch asks of one holder: operations, numbered from `first`, and rows."""

    first: int
    operations: tuple[Operation, ...]
    routes: tuple[Route, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows as the announcement carries them."""
        return tuple(route.row for route in self.routes)
