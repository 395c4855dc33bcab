"""Which holder has which heads and positions, and what each of them is told of a plan. Pure: makes messages only."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.errors import EngineError
from lamina.request import ForkSequence, OpenSequence, Plan, PlannedRow, SequenceOperation
from lamina_protocols.messages import Close, Fork, Open, Operation, Row
from lamina_workers.resolver import Route


@dataclass(frozen=True, slots=True)
class Share:
    """What one holder keeps of every sequence: KV heads `heads` at positions [lo, hi).

    A `fused` holder attends the rows' own tokens too, so it must have all positions of its heads.
    """

    heads: tuple[int, ...]
    lo: int
    hi: int
    fused: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """The shares of all holders. For every head their ranges are disjoint and begin at 0 without a gap.

    Either all are fused or none: a batch's own tokens are attended by the holders or by the model worker, never both.
    """

    shares: tuple[Share, ...]

    def __post_init__(self) -> None:
        if not self.shares:
            raise EngineError("no holder keeps anything")
        ends: dict[int, int] = {}
        for share in sorted(self.shares, key=lambda share: share.lo):
            if not share.heads:
                raise EngineError(f"a holder of [{share.lo}, {share.hi}) keeps no heads")
            for head in share.heads:
                if share.lo != ends.get(head, 0) or share.hi <= share.lo:
                    raise EngineError(
                        f"head {head} is placed at [{share.lo}, {share.hi}); its next range must begin at "
                        f"{ends.get(head, 0)} and not be empty"
                    )
                ends[head] = share.hi
        if len(set(ends.values())) > 1:
            raise EngineError(f"heads are placed up to different positions: {ends}")
        if any(share.fused and (share.lo, share.hi) != (0, ends[share.heads[0]]) for share in self.shares):
            raise EngineError("a fused holder must have all positions of its heads")
        fused = sum(share.fused for share in self.shares)
        if fused not in (0, len(self.shares)):
            raise EngineError(f"{fused} of {len(self.shares)} holders are fused; allowed is all or none")

    def place(self, plan: Plan) -> list[tuple[tuple[Operation, ...], tuple[Route, ...]]]:
        """For each holder its operations, numbered as in the plan, and the rows that read or store there."""
        return [
            (
                tuple(_operation(operation, share) for operation in plan.operations),
                tuple(
                    Route(source, share.heads, row, row.stored(share.lo, share.hi))
                    for source, planned in enumerate(plan.rows)
                    if (row := _row(planned, share))
                ),
            )
            for share in self.shares
        ]


def _operation(operation: SequenceOperation, share: Share) -> Operation:
    if isinstance(operation, OpenSequence):
        return Open(operation.handle, share.heads, share.lo, share.hi)
    if isinstance(operation, ForkSequence):
        return Fork(operation.handle, operation.parent, operation.length)
    return Close(operation.handle)


def _row(planned: PlannedRow, share: Share) -> Row | None:
    """None where the holder has no key that the row reads, and no place for its tokens."""
    start, end = planned.start, planned.start + planned.count
    store = start < share.hi and end > share.lo
    read_end = end if share.fused else min(start, share.hi)
    read = (share.lo, read_end) if read_end > share.lo else None
    return Row(planned.handle, start, planned.count, read, store) if read or store else None
