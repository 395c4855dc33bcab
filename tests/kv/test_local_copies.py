"""Local copies: prompts are read beside the model while nobody else needs those pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import LAYERS, LOCAL, World

from lamina.kv.kv_shares import Share
from lamina.kv.local_copies import LocalCopies
from lamina.kv.request import ScheduledSequence

TOKEN = LAYERS  # pages of 4 tokens, 4 heads: what a token takes of a pool, on average


def prompt(length: int, salt: int = 0) -> list[int]:
    return [100 * salt + at for at in range(length)]


def step(world: World) -> None:
    assert world.begin()
    if world.in_flight:
        world.finish()


def remote(world: World, *prompts: int, max_tokens: int = 4) -> list[ScheduledSequence]:
    """Sequences with such prompts at the holders that are not local."""
    world.control.placement.local_share = 0.0
    return [world.add(prompt(length, at), max_tokens)[0] for at, length in enumerate(prompts, 1)]


def local(world: World, length: int, max_tokens: int = 4) -> ScheduledSequence:
    """A sequence in the local tier, which has its first token."""
    world.control.placement.local_share = 1.0
    (sequence,) = world.add(prompt(length, 9), max_tokens)
    step(world)
    assert sequence.layout[0].holder == LOCAL
    return sequence


@pytest.mark.parametrize(("pages", "copied"), [(40 * TOKEN, True), (40 * TOKEN - 1, False)])
def test_copy_is_made_where_the_whole_prompt_fits(pages: int, copied: bool) -> None:
    world = World((400,), local=pages)
    (sequence,) = remote(world, 40)
    step(world)
    assert bool(sequence.local_copy) == copied
    assert bool(world.pools[LOCAL].parts) == copied
    world.run()
    world.check_end()


def test_second_prompt_is_read_at_its_holders_while_the_first_fills_the_pool() -> None:
    world = World((400,), local=60 * TOKEN, batch=24)
    one, two = remote(world, 40, 40)
    step(world)
    step(world)
    assert world.plans[-1] == [("0", 24, 16), ("1", 0, 8)]
    assert (bool(one.local_copy), bool(two.local_copy)) == (False, False)  # the first is computed
    step(world)
    assert two.local_copy[0].share == Share(LOCAL, (0, 1, 2, 3), 8, 64)  # the rest of the second fits now
    world.run()
    world.check_end()


def test_prompt_in_the_local_tier_is_not_copied() -> None:
    world = World((400,), local=200, tier=True, batch=8)
    world.add(prompt(20))
    step(world)
    assert len(world.pools[LOCAL].parts) == 1
    world.run()
    world.check_end()


def test_copy_is_closed_for_a_sequence_that_grows() -> None:
    world = World((400,), local=52 * TOKEN, tier=True, batch=8)
    grows = local(world, 3, max_tokens=20)
    (copied,) = remote(world, 40)
    for _ in range(5):
        step(world)
        assert copied.local_copy
    while copied.local_copy and copied.computed < 40:
        step(world)
    world.run()
    assert world.control.scheduler.counters.preempted == 0
    assert len(grows.tokens) == 23
    world.check_end()


def test_copy_is_closed_for_a_new_sequence() -> None:
    world = World((400,), local=56 * TOKEN, tier=True, batch=40)
    (copied,) = remote(world, 56)
    step(world)
    assert copied.local_copy
    world.control.placement.local_share = 1.0
    (new,) = world.add(prompt(30, 9))
    world.begin()
    assert world.plans[-1] == [("0", 40, 16), ("1", 0, 24)]  # with the copy it would have 16
    assert new.layout[0].holder == LOCAL
    assert copied.local_copy[0].share.lo == 40  # another one, of the rest
    world.run()
    assert world.control.scheduler.counters.preempted == 0
    world.check_end()


def test_cached_prefixes_make_room_for_a_copy() -> None:
    world = World((400,), local=48 * TOKEN, tier=True, batch=40, prefix_cache=True)
    local(world, 20)
    world.run()
    cached = world.control.scheduler.running.prefix_cache
    assert cached.evictable[LOCAL, 0] >= 20 * TOKEN
    (copied,) = remote(world, 40)
    world.begin()
    assert copied.local_copy
    assert cached.evictable.get((LOCAL, 0), 0) + 40 * TOKEN <= 48 * TOKEN
    world.run()
    world.check_end()


def test_refusal_of_the_local_pool_closes_copies_and_preempts_nobody() -> None:
    world = World((400,), local=200, tier=True, batch=8)
    local(world, 5, max_tokens=20)
    (copied,) = remote(world, 40)
    step(world)
    assert copied.local_copy
    world.pools[LOCAL].refuses = True
    planned = world.control.plan()
    assert planned is not None
    planned.refused(world.announce(planned))  # it is not asked whether that can be
    assert not copied.local_copy
    step(world)
    assert not copied.local_copy  # none is made before a plan was accepted
    step(world)
    assert copied.local_copy
    assert copied.local_copy[0].share.lo == 14
    world.run()
    assert world.control.scheduler.counters.preempted == 0
    world.check_end()


def test_new_sequence_waits_for_no_more_than_the_batch_that_reads_a_copy() -> None:
    """With two lanes a copy may be read when another lane needs its pages."""
    world = World((400,), local=40 * TOKEN, tier=True, batch=40, lanes=2)
    (copied,) = remote(world, 40)
    world.begin()
    assert world.pools[LOCAL].free == 0
    world.control.placement.local_share = 1.0
    (new,) = world.add(prompt(30, 9))
    assert not world.begin()  # nor is a row planned that the pool would refuse
    assert new.layout[0].holder == LOCAL
    world.finish()
    assert not copied.local_copy
    assert world.begin()
    assert world.begin()
    assert world.plans[-1] == [("1", 0, 30)]
    world.run()
    world.check_end()


@settings(max_examples=150, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.integers(1, 45), st.integers(1, 16), st.booleans(), st.integers(0, 4)), min_size=2, max_size=10
    ),
    pages=st.sampled_from([128, 200, 400]),
    pool=st.integers(120, 260),
    batch=st.sampled_from([4, 16, 30, 60]),
)
def test_no_sequence_waits_or_is_preempted_for_a_copy(
    asked: list[tuple[int, int, bool, int]], pages: int, pool: int, batch: int
) -> None:
    """With copies the batches have the rows that they have without."""

    def run(copies: bool) -> World:
        world = World((pages,), local=pool, tier=True, batch=batch)
        with pytest.MonkeyPatch.context() as patch:
            if not copies:
                patch.setattr(LocalCopies, "fit", lambda *_, **__: None)
            for at, (length, max_tokens, here, steps) in enumerate(asked):
                world.control.placement.local_share = float(here)
                world.add(prompt(length, at), max_tokens)
                for _ in range(steps):
                    world.begin()
                    if world.in_flight:
                        world.finish()
                    world.check()
            world.run()
            world.check_end()
        return world

    assert run(copies=True).plans == run(copies=False).plans
