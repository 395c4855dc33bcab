"""Bugs that the simulation has found, each as the small scenario that showed it. All are mended."""

from __future__ import annotations

import pytest
from oracle import violations
from planted_bugs import PLANTS
from scenario import Delay, KillEngine, KillWorker, Leave, Reset, Scenario, Setup, Submit, run

FOUND = {
    # A request that came while a worker was away was told that the KV memory could never hold it, though the worker
    # was about to come back.
    "room of a worker that comes back": Scenario(
        setup=Setup(workers=(88,), local_pages=40, local_tier=True, timeout=0.2),
        events=(
            Submit(0.0, request=0, prompt=17, tokens=8),
            KillWorker(0.05, worker=0, back=0.8),
            Submit(0.5, request=1, prompt=90, tokens=48),
        ),
        heals=0.9,
    ),
    # A sample that its client ended while there was no engine was ended a second time by the next one.
    "abort between two engines": Scenario(
        setup=Setup(journal=True, link=True),
        events=(
            Submit(0.0, request=3, prompt=1, tokens=1, samples=3),
            Delay(0.00029, worker=0, seconds=0.02, extra=0.1),
            KillEngine(0.03838, back=0.0, torn=1),
            Leave(0.03865, request=3, sample=0),
        ),
        heals=0.6,
    ),
    # All channels to a worker broke. A replica of the model was there again before the engine, took a new seat, and
    # asked for a batch that the seat had never seen: an honest worker was blamed.
    "replica before the engine": Scenario(
        seed=319440182297,
        setup=Setup(
            workers=(352, 352), local_pages=88, lanes=2, query_first=True, max_batch_tokens=512, model_workers=3,
            journal=True, latency=0.002, again=0.002,
        ),
        events=(
            Submit(0.0, request=0, prompt=4, tokens=1, priority=1),
            Submit(0.0, request=1, prompt=48, tokens=1, family=1),
            Submit(0.0, request=2, prompt=75, tokens=8, priority=1),
            Submit(0.0, request=5, prompt=1, tokens=12),
            KillWorker(0.0, worker=1, back=0.2),
            Reset(0.02452, worker=0),
            Reset(0.06, worker=2),
            Reset(0.16854, worker=0),
            Reset(0.19413, worker=0),
        ),
        heals=0.27,
    ),
    # Rows of a rebuild wrote pages of their own, which the books had as shared.
    "a rebuild writes pages of its own": Scenario(
        seed=52,
        setup=Setup(workers=(200, 200, 200, 200), prefix_cache=True, eager=True, redundancy="parity(3)"),
        events=(
            Submit(0.0, request=1, prompt=24, tokens=24, samples=2, shared=1),
            KillWorker(0.0, worker=3, back=0.3),
            KillWorker(0.01544, worker=2, back=0.0),
            KillWorker(0.03415, worker=1, back=0.0),
        ),
        heals=0.3,
    ),
    # So they did where a prefix was forked off a share that was read back, and that such rows were about to write.
    "a fork of what is to be written again": Scenario(
        setup=Setup(workers=(200, 200, 200, 200), prefix_cache=True, redundancy="parity(3)"),
        events=(
            Submit(0.0, request=1, prompt=48, tokens=24, shared=1),
            KillWorker(0.01, worker=3, back=0.0),
            KillWorker(0.03, worker=1, back=0.0),
        ),
        heals=0.3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found_bug_stays_mended(name: str) -> None:
    outcome = run(FOUND[name])
    assert violations(FOUND[name], outcome) == [], outcome.log[-30:]


def test_a_bug_that_seeds_seldom_find_is_found_by_its_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTS["rebuild_writes_pages_that_count_as_shared"](monkeypatch)
    scenario = FOUND["a rebuild writes pages of its own"]
    assert violations(scenario, run(scenario))
