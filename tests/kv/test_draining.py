"""Where sequences go that have KV at draining holders, and which of them is computed again instead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import ContextTooLong
from lamina.kv.kv_shares import SHARDS, Layout, Pages
from lamina.kv.pages import PageGroup
from lamina.kv.placement import Holder, Placement
from lamina.kv.relocation import elsewhere, to_preempt
from lamina.kv.request import Request, SchedulerConfig
from lamina.scheduling.control_plane import ControlPlane

LENGTH = 512
HERE = (100, 101)


def placement(ranks: int, workers: int, shard: str = "heads", local: bool = False) -> Placement:
    """Each worker has a holder for each rank: worker 2 of two ranks has holders 4 and 5."""
    holders = {worker * ranks + rank: Holder((1000,), rank=rank) for worker in range(workers) for rank in range(ranks)}
    pools = HERE[:ranks] if local else ()
    holders |= {number: Holder((1000,), fused=True, rank=rank) for rank, number in enumerate(pools)}
    return Placement(
        holders,
        heads=((3,),) * ranks,
        page_size=16,
        max_model_len=LENGTH,
        shard=shard,
        local_pools=pools,
        local_tier=local,
    )


def cells(layout: Layout) -> list[tuple[int, int]]:
    """Every head and page of positions, as often as a share keeps it."""
    return sorted((head, at) for share in layout for head in share.heads for at in range(share.lo, share.hi, 16))


@given(
    ranks=st.integers(1, 2),
    workers=st.integers(2, 5),
    shard=st.sampled_from(SHARDS),
    local=st.booleans(),
    length=st.integers(1, LENGTH),
    data=st.data(),
)
def test_only_shares_at_draining_holders_move_and_every_head_and_position_stays_kept(
    ranks: int, workers: int, shard: str, local: bool, length: int, data: st.DataObject
) -> None:
    place = placement(ranks, workers, shard, local)
    layout = place.layout(length)
    drained = data.draw(st.sets(st.integers(0, workers - 1), min_size=1, max_size=workers))
    for worker in drained:
        for number in range(worker * ranks, (worker + 1) * ranks):
            place.holders[number].draining = True
    pools = [(number, 0) for number in place.holders]
    free = Pages(data.draw(st.dictionaries(st.sampled_from(pools), st.integers(1, 1000))))
    found = elsewhere(place, layout, free)
    assert len(found) == (len(drained) < workers) + local
    for new in found:
        assert cells(new) == cells(layout)
        assert all(not place.holders[share.holder].draining for share in new)
        assert all(place.holders[share.holder].rank == share.heads[0] // 3 for share in new)
    if len(drained) < workers:
        stays = [share for share in layout if not place.holders[share.holder].draining]
        assert [share for share in found[0] if share in layout] == stays
        others = {share.holder for share in found[0] if share not in layout}
        assert all(
            free.get((number, 0), 0) == max(free.get((n, 0), 0) for n, h in place.holders.items() if n not in HERE
                                       and not h.draining and h.rank == place.holders[number].rank)
            for number in others
        )  # fmt: skip
    if local:
        assert {share.holder for share in found[-1]} == set(HERE[:ranks])


@pytest.mark.parametrize(
    ("kept", "moving", "stuck", "in_flight", "victim"),
    [
        ("", "", "", "", None),
        ("abc", "", "", "", None),  # in prefill, say
        ("abc", "", "ab", "", "b"),
        ("abc", "", "ab", "b", "a"),
        ("abc", "", "ab", "ab", None),
        ("abc", "c", "ab", "", None),  # its move may give room
        ("abc", "z", "ab", "", "b"),  # it moves for another reason
    ],
)
def test_the_youngest_idle_one_of_those_without_room_is_computed_again_once_nothing_moves_any_more(
    kept: str, moving: str, stuck: str, in_flight: str, victim: str | None
) -> None:
    made = {name: SimpleNamespace(name=name, in_flight=name in in_flight) for name in "abc"}
    them: Any = [[made[name] for name in names] for names in (kept, stuck)]
    found = to_preempt(them[0], cast(Any, [made.get(name) for name in moving]), them[1])
    assert (found and cast(Any, found).name) == victim


def test_what_fits_with_a_lost_holder_is_waited_for_until_one_is_gone_for_good() -> None:
    place = placement(1, 3)
    place.holders |= {1: Holder((30,)), 2: Holder((30,))}
    limits = SchedulerConfig(
        max_batch_tokens=64, max_sequences=8, max_model_len=LENGTH, page_size=16, page_groups=((PageGroup(1),),)
    )
    control = ControlPlane(limits, place)
    asked = Request("1", (1,) * 400, 10)
    control.scheduler.validate(asked)
    control.lost([0])
    control.scheduler.validate(asked)
    control.left(1)
    with pytest.raises(ContextTooLong):
        control.scheduler.validate(asked)
