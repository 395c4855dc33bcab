"""Where growth goes: to holders with room, without a gap or an overlap, and only where it pays."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.kv.kv_shares import SHARDS, Layout, Pages, Share
from lamina.kv.pages import PageGroup, PolicyKv
from lamina.kv.placement import Holder, Placement
from lamina.kv.relocation import MAX_RANGES, MIN_GROWTH
from lamina.kv.request import Request, ScheduledSequence, SchedulerConfig
from lamina.scheduling.control_plane import ControlPlane
from lamina_protocols.messages.messages import Bound, Close, Open
from lamina_workers.policies.catalogue import parse

PAGE, END = 16, 4096


@dataclass(frozen=True)
class Case:
    """A control plane with holders 1, 2, ... of these pages."""

    pages: tuple[int, ...] = (1000,)
    shard: str = "heads"
    states: bool = False
    policy: str = ""
    indexed: bool = False

    def control(self) -> ControlPlane:
        pools = 2 if self.states else 1
        placement = Placement(
            {number: Holder((pages,) * pools) for number, pages in enumerate(self.pages, 1)},
            heads=((2,) * pools,),
            page_size=PAGE,
            max_model_len=END,
            shard=self.shard,
            states=(1,) if self.states else (),
            indexed=(0,) if self.indexed else (),
        )
        policy = parse(self.policy) if self.policy else None
        groups = ((PageGroup(1, policy),),) + ((),) * self.states
        config = SchedulerConfig(
            512, 8, END, PAGE, groups, prefix_cache=False, states={1: 1} if self.states else {},
            of_policy=lambda text: PolicyKv(text, groups, chooses=bool(policy and policy.adaptive)),
        )  # fmt: skip
        return ControlPlane(config, placement)


def running(
    control: ControlPlane, computed: int, max_tokens: int = 1000, at: Layout | None = None
) -> ScheduledSequence:
    """A sequence whose first tokens have KV."""
    request = Request(str(len(control.scheduler.running)), (1,) * (computed + 1), max_tokens)
    sequence = ScheduledSequence(request, 0, len(control.scheduler.running), [1] * (computed + 1))
    control.scheduler.running.open(sequence, at or control.placement.layout(sequence.longest))
    sequence.computed = sequence.planned = computed
    control.scheduler.ledger.took(control.scheduler.running.pages(sequence))
    return sequence


def join(control: ControlPlane, *pages: int) -> int:
    numbers = [max(control.placement.holders) + 1 + at for at in range(len(pages))]
    for number, some in zip(numbers, pages, strict=True):
        control.joined(number, Holder((some,) * len(control.placement.holders[1].pages)))
    return control.scheduler.growth.joined(numbers)


def cells(layout: Layout, pool: int = 0) -> list[tuple[int, int]]:
    """Every head and page of positions, as often as a share keeps it."""
    return sorted(
        (head, at)
        for share in layout
        if share.pool == pool
        for head in share.heads
        for at in range(share.lo, share.hi, PAGE)
    )


def test_a_holder_that_joins_gets_what_comes_from_the_next_page_on() -> None:
    control = Case().control()
    sequence = running(control, 100)
    assert join(control, 1000) == 1
    assert sequence.layout == (Share(1, (0, 1), 0, 112), Share(2, (0, 1), 112, END))
    holders = control.placement.holders
    assert holders[1].outbox == [Open(1, 0, (0, 1), 0, END), Bound(1, 112)]
    assert holders[2].outbox == [Open(2, 0, (0, 1), 112, END)]
    control.scheduler.check_integrity()


@pytest.mark.parametrize(("ahead", "at"), [({"planned": 130}, 144), ({"stored": 120}, 128), ({"planned": 112}, 112)])
def test_what_is_planned_or_may_be_stored_stays(ahead: dict[str, int], at: int) -> None:
    """Batches in flight and rejected drafts may have pages above the last token."""
    control = Case().control()
    sequence = running(control, 100)
    for name, value in ahead.items():
        setattr(sequence, name, value)
    join(control, 1000)
    assert {share.hi for share in sequence.layout if share.holder == 1} == {at}


@given(
    shard=st.sampled_from(SHARDS),
    pages=st.lists(st.integers(50, 5000), min_size=1, max_size=4).map(tuple),
    lengths=st.lists(st.integers(0, 900), min_size=1, max_size=6),
    joining=st.lists(st.integers(50, 5000), min_size=1, max_size=3),
    drained=st.integers(0, 6),
)
def test_every_head_and_position_is_kept_once_whoever_joins_and_leaves(
    shard: str, pages: tuple[int, ...], lengths: list[int], joining: list[int], drained: int
) -> None:
    control = Case(pages, shard).control()
    sequences = [running(control, length) for length in lengths]
    whole = cells(sequences[0].layout)
    for some in joining:
        join(control, some)
    if drained in control.placement.holders and len(control.placement.holders) > 1:
        control.drain([drained])
    for sequence in sequences:
        assert cells(sequence.layout) == whole
        assert all(share.lo % PAGE == 0 for share in sequence.layout)
        assert sequence.runs.keys() == set(sequence.layout)
        grown = [share for share in sequence.layout if share.hi > sequence.planned + PAGE]
        assert drained not in {share.holder for share in grown} or len(control.placement.holders) == 1
        handle = sequence.handle
        assert handle is not None
        assert {part.share for part in control.placement.parts(handle)} == set(sequence.layout)
    control.scheduler.check_integrity()


def test_holders_are_left_with_about_the_same_part_of_their_pages() -> None:
    control = Case((4000,)).control()
    sequences = [running(control, 600) for _ in range(8)]
    join(control, 4000)
    taken = [share for sequence in sequences for share in sequence.layout if share.holder == 2]
    assert len(taken) == 6  # of 124 pages each; 608 are in use already
    join(control, 2000)
    third = [share for sequence in sequences for share in sequence.layout if share.holder == 3]
    assert 0 < len(third) <= 4
    assert join(control, 100) == 0  # too small for any


@pytest.mark.parametrize(
    ("case", "max_tokens", "why"),
    [
        (Case(indexed=True), 1000, "an index chooses among all keys"),
        (Case(policy="page_top_k(budget=0.1)"), 1000, "a policy chooses"),
        (Case(policy="streaming(sink=16, recent=64)"), 1000, "it does not grow"),
        (Case(), MIN_GROWTH - 20, "it ends soon"),
    ],
)
def test_a_sequence_grows_where_it_is(case: Case, max_tokens: int, why: str) -> None:
    control = case.control()
    sequence = running(control, 100, max_tokens)
    before = sequence.layout
    assert join(control, 1000) == 0, why
    assert sequence.layout == before


def test_states_stay_and_keys_beside_them_grow_elsewhere() -> None:
    control = Case(states=True).control()
    sequence = running(control, 100)
    before = cells(sequence.layout, 1)
    assert join(control, 1000) == 1
    assert cells(sequence.layout, 1) == before
    assert {share.holder for share in sequence.layout if share.pool == 1} == {1}
    assert {share.holder for share in sequence.layout if share.pool == 0} == {1, 2}


def test_what_has_not_begun_changes_its_place_as_a_whole() -> None:
    """A holder joins, and is drained before anything was stored there."""
    control = Case().control()
    sequence = running(control, 100)
    join(control, 1000)
    control.drain([2])
    assert sequence.layout == (Share(1, (0, 1), 0, 112), Share(1, (0, 1), 112, END))
    assert control.placement.holders[2].outbox == [Open(2, 0, (0, 1), 112, END), Close(2)]


def test_a_sequence_has_a_bounded_number_of_parts() -> None:
    control = Case().control()
    sequence = running(control, 16)
    for _ in range(MAX_RANGES + 4):
        join(control, 4000)
        sequence.tokens += [1] * 32
        sequence.computed = sequence.planned = sequence.computed + 32
    assert len(sequence.layout) == MAX_RANGES


def test_a_sequence_whose_holder_is_full_goes_on_where_there_is_room() -> None:
    control = Case((20, 1000)).control()
    here = (Share(1, (0, 1), 0, END),)
    sequence = running(control, 112, at=here)
    control.scheduler.ledger.free = Pages({(1, 0): 1, (2, 0): 1000})
    growth = control.scheduler.growth
    assert growth.elsewhere(sequence, {(1, 0)})
    assert sequence.layout == (Share(1, (0, 1), 0, 112), Share(2, (0, 1), 112, END))
    inside = running(control, 100, at=here)
    assert not growth.elsewhere(inside, {(1, 0)})  # within a page nothing more is needed
    control.scheduler.ledger.free = Pages({(1, 0): 1, (2, 0): 3})
    assert not growth.elsewhere(running(control, 112, at=here), {(1, 0)})
