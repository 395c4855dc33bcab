"""Free and cached pages, as the scheduler counts them, are all pages of each holder once nothing runs: the stores' own
counts say so."""

from __future__ import annotations

import random
import time

import pytest
from engine_rig import Restless, Rig, collect, tiny_decoder
from kv_pools import pool_of
from policy_bench import TIGHT, under
from running_streams import Streams, held

from lamina.sampling_params import SamplingParams
from lamina.scheduling.step_tuner import StepTuner

rng = random.Random(1)
SHORT, LONG = ([rng.randrange(101) for _ in range(n)] for n in (10, 300))


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0).with_defaults({})


def check_at_rest(rig: Rig) -> None:
    """Wait until nothing runs, then compare with the stores."""
    deadline = time.monotonic() + 20
    while rig.scheduler.has_work or rig.placement.pending:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ledger, cached = rig.scheduler.ledger, rig.scheduler.running.prefix_cache.evictable
    for number, worker in rig.workers.items():
        if number not in rig.placement.holders:  # it was drained
            continue
        assert ledger.free.get((number, 0), 0) == pool_of(worker).store.free_pages
        assert pool_of(worker).store.free_pages + cached.get((number, 0), 0) == pool_of(worker).store.n_pages
    rig.close()


@pytest.mark.fault("F29")
@pytest.mark.parametrize("weights", [(1,), (1, 1)])
def test_prompt_computed_twice_below_one_prefix_counts_all_its_pages(decoder, weights):
    """A prefix that had no page of its parent's was counted without those that it has of the same tokens."""
    rig = Rig(decoder, max_batch_tokens=64, prefix_cache=True, shard="heads", weights=weights)
    for inbox in [rig.submit(SHORT, greedy(tokens))[1] for tokens in (38, 86)]:
        collect(inbox)
    check_at_rest(rig)


def test_prefix_that_has_moved_to_the_other_tier_counts_all_its_pages(decoder):
    """Pages of a prefix at its parent's positions were not counted, although the parent is at other holders."""
    tuner = StepTuner(share=0.0)
    rig = Rig(
        decoder, max_batch_tokens=64, prefix_cache=True, shard="heads", weights=(1, 1), local_pool=2000,
        local_tier=True, tuner=tuner,
    )  # fmt: skip
    collect(rig.submit(LONG, greedy(40))[1])
    tuner.share = 1.0
    collect(rig.submit(LONG, greedy(400))[1])
    assert rig.engine._tiering._migration.sequences == 1
    check_at_rest(rig)


def test_pages_of_a_range_that_is_full_count_as_its_last_row_left_them(windowed):
    """The window was counted as that of a row behind the range. But the last row that comes to the range begins before
    its end, and no later one lets go of anything there."""
    rig = Rig(windowed, max_batch_tokens=120, prefix_cache=True, shard="sequence", weights=(1, 1))
    collect(rig.submit(LONG, greedy(1))[1])  # the row from 120 on fills the range, the next one is behind it
    check_at_rest(rig)


def test_pages_of_a_full_range_that_has_moved_are_counted(windowed):
    """Another holder gets all pages of a range by a move, and no row comes there that would let some go."""
    rig = Rig(windowed, max_batch_tokens=64, prefix_cache=True, shard="sequence", weights=(1, 1, 1))
    streams = Streams(rig, [LONG], 200)
    with held(rig):
        done = rig.engine.drain("worker-1")
    assert done.result(timeout=60) > 0
    streams.tokens()
    check_at_rest(rig)


@pytest.mark.parametrize("policy", ["streaming", "sharded", "razor"])
def test_pages_that_a_policy_has_let_go_are_not_cached(policy):
    """Those of a policy whose freed pages a mean stands for counted as cached."""
    rig = Rig(under(tiny_decoder(), TIGHT[policy]), max_batch_tokens=64, prefix_cache=True, pages=4000)
    collect(rig.submit(LONG, greedy(60))[1])
    check_at_rest(rig)


@pytest.mark.parametrize("model", ["decoder", "windowed"])
@pytest.mark.parametrize("seed", range(3))
def test_pages_of_many_policies_that_share_prefixes_are_counted(request, model, seed):
    """Forks of one policy's prefixes for another, moves between tiers, preemption, and requests that end early."""
    chance = random.Random(seed)
    beside = {"local_pool": 500, "local_tier": True, "tuner": Restless(seed), "shard": "heads"} if seed else {}
    rig = Rig(
        request.getfixturevalue(model), policy=TIGHT["page_top_k"], max_batch_tokens=64, prefix_cache=True, pages=420,
        weights=(1, 1) if seed == 2 else (1,), **beside,
    )  # fmt: skip
    # Beside layers with a window the floor says less than razor keeps.
    names = ("streaming", "span", "sharded", *(("razor",) if model == "decoder" else ()))
    policies = [None, "full", *(TIGHT[name] for name in names)]
    sent = []
    for _ in range(14):
        asked = {"max_tokens": chance.randint(1, 60), "policy": chance.choice(policies), "n": chance.choice([1, 1, 2])}
        prompt = LONG[: chance.choice([40, 100, 160, 200])] + SHORT[: chance.randint(0, 4)]
        sent.append((*rig.submit(prompt, SamplingParams(temperature=0, **asked).with_defaults({})), asked["n"]))
        time.sleep(chance.random() * 0.03)
    for ticket, inbox, n in sent:
        if chance.random() < 0.2:
            rig.engine.abort(ticket)
        else:
            collect(inbox, n)
    check_at_rest(rig)
