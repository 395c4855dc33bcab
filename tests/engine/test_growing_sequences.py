"""Sequences go on at holders that join, away from those that are drained or full, and their text stays the same."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine_rig import BytesPort, Rig, one_process
from kv_pools import pool_of
from running_streams import Streams, held

from lamina.kv import relocation
from lamina_protocols.messages.messages import Announcement, Bound, Request

chance = random.Random(3)
PROMPTS = [[chance.randrange(101) for _ in range(n)] for n in (3, 40, 70, 150)]
TOKENS = 150
PAGES = 9  # of 16 tokens of a sequence: three layers, three heads


@pytest.fixture(scope="module")
def expected(decoder: Any) -> list[list[int]]:
    return [sample for (sample,) in one_process(decoder, PROMPTS, max_tokens=TOKENS)]


def stored(rig: Rig, number: int) -> int:
    return rig.workers[number].counters.vectors_stored


@pytest.mark.parametrize(("shard", "lanes"), [("heads", 1), ("sequence", 2), ("heads+sequence", 1)])
def test_running_sequences_go_on_at_a_holder_that_joins_and_no_byte_moves(decoder, expected, shard, lanes, monkeypatch):
    monkeypatch.setattr(relocation, "MIN_TOKENS", TOKENS)  # no move does
    rig = Rig(decoder, shard=shard, weights=(1, 1), lanes=lanes, prefix_cache=True)
    streams = Streams(rig, PROMPTS, TOKENS, 20)
    with held(rig):
        number = rig.join()
    streams.read(40)
    with held(rig):
        before = [stored(rig, old) for old in (1, 2)]
    assert streams.tokens() == expected
    later = [stored(rig, old) - had for old, had in zip((1, 2), before, strict=True)]
    assert stored(rig, number) > max(later)
    assert rig.engine._tiering._migration.tokens == 0
    counters = rig.scheduler.counters
    assert (counters.preempted, counters.rebuilt_tokens) == (0, 0)
    assert [sample for (sample,) in rig.generate(PROMPTS, max_tokens=TOKENS)] == expected  # over cached prefixes
    rig.close()


def test_a_sequence_at_a_full_holder_goes_on_at_another_and_nobody_gives_way(decoder, expected):
    rig = Rig(decoder, shard="heads", weights=(1,), pages=PAGES * 30)  # of which the prompts take 20
    streams = Streams(rig, PROMPTS, TOKENS, 1)
    number = rig.join()
    assert streams.tokens() == expected
    assert rig.scheduler.counters.preempted == 0
    assert stored(rig, number) > 0
    rig.close()


def test_what_a_drained_holder_would_get_goes_elsewhere_at_once(decoder, expected):
    rig = Rig(decoder, shard="heads", weights=(1, 1))
    streams = Streams(rig, PROMPTS, TOKENS, 1)
    with held(rig):
        done = rig.engine.drain("worker-1")
        before = stored(rig, 1)
    assert done.result(timeout=60) > 0
    assert streams.tokens() == expected
    assert stored(rig, 1) <= before + 4 * 16 * 3 * 3  # what was left of their pages
    assert pool_of(rig.workers[1]).store.free_pages == rig.pages
    rig.close()


def test_a_holder_that_cannot_be_told_keeps_what_it_has(decoder, expected, monkeypatch):
    """Of the previous version of the protocol."""
    monkeypatch.setattr(relocation, "MIN_TOKENS", TOKENS)  # no move does
    seen: list[Request] = []
    rig = Rig(decoder, shard="heads", weights=(1,), port=lambda worker: BytesPort(worker, seen.append))
    for holder in rig.placement.holders.values():
        holder.features = frozenset()
    streams = Streams(rig, PROMPTS, TOKENS, 1)
    number = rig.join()
    assert streams.tokens() == expected
    assert stored(rig, number) == 0
    operations = [each for message in seen if isinstance(message, Announcement) for each in message.operations]
    assert not any(isinstance(operation, Bound) for operation in operations)
    rig.close()


def test_old_kv_follows_in_the_background_where_that_pays(decoder):
    rig = Rig(decoder, shard="heads", weights=(1,))
    asked = [prompt * 2 for prompt in PROMPTS[1:]]
    expected = [sample for (sample,) in one_process(decoder, asked, max_tokens=600)]
    streams = Streams(rig, asked, 600, 5)
    rig.join()
    assert streams.tokens() == expected
    assert rig.engine._tiering._migration.sequences > 0
    assert not rig.engine._tiering._balancer.active
    assert rig.scheduler.counters.preempted == 0
    rig.close()
