"""Free and cached pages, as the scheduler counts them, are all pages of each holder once nothing runs: the stores' own
counts say so."""

from __future__ import annotations

import random
import time

import pytest
from engine_rig import Rig, collect, tiny_decoder
from kv_pools import pool_of
from policy_bench import TIGHT, under

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
        assert ledger.free.get((number, 0), 0) == pool_of(worker).store.free_pages
        assert pool_of(worker).store.free_pages + cached.get((number, 0), 0) == pool_of(worker).store.n_pages
    rig.close()


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


@pytest.mark.parametrize("policy", ["streaming", "razor"])
def test_pages_that_a_policy_has_let_go_are_not_cached(policy):
    """Those of a policy whose freed pages a mean stands for counted as cached."""
    rig = Rig(under(tiny_decoder(), TIGHT[policy]), max_batch_tokens=64, prefix_cache=True, pages=4000)
    collect(rig.submit(LONG, greedy(60))[1])
    check_at_rest(rig)
