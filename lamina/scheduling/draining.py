"""Where the sequences go that have KV at draining holders, and which of them is computed again instead. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from lamina.scheduling.kv_shares import Layout, Pages, under
from lamina.scheduling.placement import Placement
from lamina.scheduling.request import ScheduledSequence


def elsewhere(placement: Placement, layout: Layout, free: Pages) -> list[Layout]:
    """Layouts without draining holders, the best first: their shares at the holders with the most of these free pages
    and the others where they are, or all in the local pools."""
    draining = placement.draining
    others = [placement.substitute(share, free) if share.holder in draining else share for share in layout]
    found = tuple(share for share in others if share is not None)
    layouts = found if len(found) == len(layout) else (), under(placement.layout(0, local=True), layout[0].policy)
    return [each for each in layouts if each]


def to_preempt(
    kept: Iterable[ScheduledSequence], moving: Container[ScheduledSequence], stuck: Sequence[ScheduledSequence]
) -> ScheduledSequence | None:
    """Which of the sequences `kept` at draining holders gives its KV back: the youngest idle one of those that are
    `stuck`, without room elsewhere. None while one of them still moves: its end may give room."""
    if any(sequence in moving for sequence in kept):
        return None
    return next((sequence for sequence in reversed(stuck) if not sequence.in_flight), None)
