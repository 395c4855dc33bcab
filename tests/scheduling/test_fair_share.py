"""Tenants share batches, places and KV: none waits for the backlog of another."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_world import World, config, prompt

from lamina.scheduling.admission import BEFORE, BESIDE, REMEMBERED, FairShare, even

WANTED = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 300), min_size=1)


@given(WANTED, st.integers(1, 600))
def test_even_is_max_min_fair(wanted: dict[str, int], total: int) -> None:
    dealt = even(wanted, total)
    assert dealt.keys() == wanted.keys()
    assert all(1 <= dealt[each] <= wanted[each] for each in wanted)
    assert sum(dealt.values()) == min(max(total, len(wanted)), sum(wanted.values()))
    most = max(dealt.values())
    assert all(dealt[each] >= most - 1 for each in wanted if dealt[each] < wanted[each])


@given(WANTED, st.floats(0.1, 100.0), st.integers(2, 600))
def test_nobody_waits_much_longer_than_alone(wanted: dict[str, int], knee: float, most: int) -> None:
    """Where a batch takes a fixed time and one for each token, and sizes were measured."""
    share = FairShare()
    for tokens in range(1, 601):
        share.took(tokens, knee + tokens)
    dealt = share.deal(wanted, most)
    if len(wanted) < 2:
        assert dealt is None
        return
    assert dealt is not None
    least = min(wanted.values())
    together = knee + sum(dealt.values())
    # A mean over sizes of the same bit length stands for all of them: it errs by a factor below 2.
    assert together <= 2 * BESIDE * (knee + least) or sum(dealt.values()) == len(wanted)


def test_a_batch_stays_short_while_another_may_come_back() -> None:
    share = FairShare()
    for tokens in (1, 256):
        share.took(tokens, 10.0 + tokens)
    assert share.deal({"a": 256}, 1024) is None
    assert share.deal({"a": 256, "b": 1}, 1024) is not None
    dealt = share.deal({"a": 256}, 1024)
    assert dealt is not None
    assert dealt["a"] < BEFORE * 11
    for _ in range(REMEMBERED):
        dealt = share.deal({"a": 256}, 1024)
    assert dealt is None


@pytest.mark.fault("F11")
@settings(max_examples=30, deadline=None)
@given(
    backlog=st.integers(1, 6), samples=st.integers(1, 8), memory=st.sampled_from([40, 80, 400]), rows=st.integers(2, 8)
)
def test_a_newcomer_does_not_wait_for_the_backlog_of_another(
    backlog: int, samples: int, memory: int, rows: int
) -> None:
    """However much one has waiting, another's request of three tokens is over after so many batches."""
    world = World(config(max_sequences=rows, prefix_cache=False), memory)
    for at in range(backlog):
        world.add(prompt(9, at), max_tokens=40, n=samples, tenant="a")
    for _ in range(20):
        world.step()
    (sequence,) = world.add(prompt(5, 99), max_tokens=3, tenant="b")
    steps = 0
    while sequence.finish_reason is None:
        assert world.step()
        steps += 1
        assert steps <= 12
    world.finish()
    world.check_end()


@settings(max_examples=30, deadline=None)
@given(waiting=st.lists(st.sampled_from("abc"), min_size=4, max_size=24), rows=st.integers(3, 8))
def test_each_tenant_decodes_its_share_of_the_rows(waiting: list[str], rows: int) -> None:
    world = World(config(max_sequences=rows, max_batch_tokens=rows, prefix_cache=False), 4000)
    for at, tenant in enumerate(waiting):
        world.add(prompt(1, at), max_tokens=60, tenant=tenant)
    for _ in range(10):  # until all are admitted that can be
        world.step()
    decoded = dict.fromkeys(waiting, 0)
    batches = 12
    for _ in range(batches):
        world.step()
        for row in world.batches[-1].rows:
            decoded[row.sequence.request.tenant] += 1
    most = max(decoded.values())
    for tenant, count in decoded.items():  # in each batch one at least, and all or one less than another at most
        assert count >= max(batches, min(batches * waiting.count(tenant), most - batches)), decoded
    world.finish()
    world.check_end()


@pytest.mark.fault("F11")
@pytest.mark.parametrize("others", [1, 8, 12])
def test_stream_goes_on_while_a_prompt_of_its_own_tenant_is_read(others: int) -> None:
    """With a share of one token a batch, a tenant's streams stood still until its prompt was computed."""
    world = World(config(max_sequences=64, max_batch_tokens=64, prefix_cache=False), 4000)
    for at in range(others):
        world.add(prompt(3, at), max_tokens=60, tenant=str(at))
    (stream,) = world.add(prompt(3, 90), max_tokens=60, tenant="x")
    while len(stream.tokens) < 5:
        world.step()
    (late,) = world.add(prompt(50, 91), max_tokens=2, tenant="x")
    for _ in range(40):
        tokens, computed = len(stream.tokens), late.computed
        world.step()
        assert len(stream.tokens) == tokens + 1
        assert late.computed > computed or late.finish_reason is not None


def test_preemption_for_another_tenant_stops_at_its_share() -> None:
    """One has all pages; the other gets half of them at most, and neither is preempted in turn."""
    world = World(config(max_sequences=64, max_batch_tokens=64, prefix_cache=False), 200)
    for at in range(24):
        world.add(prompt(12, at), max_tokens=40, tenant="a")
    for _ in range(4):
        world.step()
    for at in range(24):
        world.add(prompt(12, 50 + at), max_tokens=40, tenant="b")
    for _ in range(12):
        world.step()
    tokens = world.scheduler.running.tokens_by_tenant()
    assert tokens["a"] / 2 < tokens["b"] < tokens["a"] * 2
    world.finish()
    world.check_end()
    preempted = [sequence.preemptions for sequence in world.samples]
    assert max(preempted) <= 8, preempted
