"""Budgets of heads: what an output is at each share, and how shares are dealt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from evaluate.eviction_budgets import PAGE, RECENT, SHARES, SINK, dealt, outputs, policy, ranked, sampled

from lamina.measure.calibration.capture import Captured
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.compared.heavy_hitter import HeavyHitter

PAGES, GROUP, N, D = 40, 2, 3, 8


@pytest.mark.parametrize("name", ["heavy_hitter", "razor"])
def test_outputs_are_attention_over_what_is_held(name: str) -> None:
    torch.manual_seed(0)
    start = PAGES * PAGE
    context = Captured(
        torch.randn(1, GROUP, len(sampled(start)), D), torch.randn(1, start, D), torch.randn(1, start, D)
    )
    q, k, v = torch.randn(GROUP, N, D), torch.randn(start + N, D), torch.randn(start + N, D)
    ranks = ranked(context, 0, 0.5, name)
    assert sorted(ranks.tolist()) == list(range(PAGES))
    assert ranks[: SINK // PAGE].max() < SINK // PAGE
    assert ranks[-RECENT // PAGE :].max() < (SINK + RECENT) // PAGE
    got = outputs(q, k, v, ranks, 0.5, start, name)
    for share, out in zip(SHARES, got, strict=True):
        held = ranks.repeat_interleave(PAGE) < max(share * PAGES, (SINK + RECENT) / PAGE)
        for at in range(N):
            keys, values = (torch.cat([x[:start][held], x[start : start + at + 1]]) for x in (k, v))
            logits = q[:, at] @ keys.T * 0.5
            if name == "razor" and not held.all():
                gone = ~held
                slot = q[:, at] @ k[:start][gone].mean(0) * 0.5 + math.log(int(gone.sum()))
                logits = torch.cat([logits, slot[:, None]], 1)
                values = torch.cat([values, v[:start][gone].mean(0, keepdim=True)])
            torch.testing.assert_close(out[:, at], logits.softmax(-1) @ values, rtol=1e-4, atol=1e-5)


def test_shares_are_dealt_where_they_save_most() -> None:
    cost = np.zeros((1, 3, len(SHARES)))
    cost[0, 0] = [1.0 - share for share in SHARES]  # each step saves 1 a share
    cost[0, 1, :4] = 5.0  # nothing saves but the fifth
    cost[0, 2] = 0.0
    assert dealt(cost, 0.11).tolist() == [[0.05, SHARES[4], 0.05]]
    assert dealt(cost, 0.43).tolist() == [[1.0, SHARES[4], 0.05]]


@pytest.mark.parametrize("share", SHARES)
def test_a_policy_reads_its_share(share: float) -> None:
    known = parse(policy("heavy_hitter", share, 8192))
    picked = SINK // PAGE + math.ceil(known.budget * 248) if isinstance(known, HeavyHitter) else 248
    assert (picked + RECENT // PAGE) / 256 == pytest.approx(max(share, 10 / 256), abs=0.01)
