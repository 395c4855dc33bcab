"""Parts of KV that a holder turns out to lack when a model worker comes back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lamina.engine.holders import Holders
from lamina.scheduling.holder import Holder
from lamina.scheduling.kv_shares import Share
from lamina.scheduling.placement import Part
from lamina_protocols.messages import Fork, Open, PartHeld, Surveyed

SHARE = Share(1, (0,), 0, 100)


def torn(outbox: list[Any], first: int, applied: int, held: dict[int, int], computed: int = 40) -> list[int]:
    """The torn sequences, where holder 1 should have part 7 of a sequence up to `computed`."""
    placement = SimpleNamespace(
        holders={1: Holder(10, outbox=outbox, first=first)}, kept_by=lambda number: {3: [Part(7, SHARE)]}
    )
    running = [SimpleNamespace(handle=3, rebuild=None, computed=computed)]
    control = SimpleNamespace(placement=placement, scheduler=SimpleNamespace(running=running))
    holders = Holders(*cast(Any, (None, control, {1: "a"}, None)))
    parts = tuple(PartHeld(handle, (0,), 0, 100, upto, 0) for handle, upto in held.items())
    return holders.torn({1: Surveyed(1, 1, 1, applied, parts, 0)})


def test_part_is_torn_when_it_lacks_tokens() -> None:
    assert torn([], 5, 5, {7: 40}) == []
    assert torn([], 5, 5, {7: 39}) == [1]
    assert torn([], 5, 5, {}) == [1]


@pytest.mark.parametrize(("parent", "expected"), [(64, []), (40, []), (39, [1])])
def test_unsent_fork_holds_what_its_parent_holds(parent: int, expected: list[int]) -> None:
    fork = Fork(7, 6, 40)
    assert torn([Open(9, (0,), 0, 100), fork], 5, 5, {6: parent}) == expected
    assert torn([Open(9, (0,), 0, 100), fork], 5, 6, {6: parent, 9: 0}) == expected
    assert (
        torn([Open(9, (0,), 0, 100), fork], 5, 7, {6: parent, 9: 0, 7: 40}) == []
    )  # the fork was applied, and its answer was lost


def test_unsent_fork_of_a_fork_holds_what_the_first_parent_holds() -> None:
    assert torn([Fork(8, 6, 64), Fork(7, 8, 40)], 5, 5, {6: 64}) == []
    assert torn([Fork(8, 6, 32), Fork(7, 8, 40)], 5, 5, {6: 64}) == [1]
