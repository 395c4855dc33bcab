"""Drawn scenarios through the real engine and real attention workers: no request's text, finish reason or log
probabilities depend on what ran beside it, where its KV was, or what happened meanwhile.

`LAMINA_SCENARIOS=first:end` runs the seeds from `first` on instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from drawn_scenarios import KINDS, MEMORY, Scenario, draw
from scenario_run import Fleet, Plain, run

RANGE = os.environ.get("LAMINA_SCENARIOS")
FEW = () if RANGE else (0, 13, 24, 34, 62)  # models that take turns, drafts, faults, packed weights, replicas, ranks
MORE = range(*map(int, RANGE.split(":"))) if RANGE else [seed for seed in range(100) if seed not in FEW]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    plain = Plain(tmp_path_factory.mktemp("models"))
    yield plain
    plain.close()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.mark.real
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", FEW)
def test_a_drawn_scenario_gives_each_request_the_text_that_it_has_alone(seed: int, plain: Plain, fleet: Fleet) -> None:
    run(draw(seed), plain, fleet)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", MORE)
def test_more_drawn_scenarios(seed: int, plain: Plain, fleet: Fleet) -> None:
    run(draw(seed), plain, fleet)


def test_every_value_of_a_scenario_is_drawn() -> None:
    scenarios = [draw(seed) for seed in range(400)]
    assert scenarios[7] == draw(7)
    turns = [turn for scenario in scenarios for turn in scenario.turns]

    def values(name: str) -> set[object]:
        return {turn.options.get(name) for turn in turns}

    assert {scenario.workers for scenario in scenarios} == {0, 1, 2, 3}
    assert {scenario.memory for scenario in scenarios} == set(MEMORY)
    assert {len(scenario.turns) for scenario in scenarios} == {1, 2}
    assert {turn.kind for turn in turns} == set(KINDS)
    assert {event.what for turn in turns for event in turn.events} == {"kill", "stop", "drain"}
    assert values("shard") == {None, "heads", "sequence", "heads+sequence"}
    assert values("redundancy") == {None, "replica", "replica(2)", "parity"}
    assert values("quantize") == {None, "int4", "int8"}
    assert values("model_parallel") == {None, "replicas"}
    assert values("model_workers") == {None, 2}
    assert values("speculate") == {None, "ngram"}
    assert max(map(_tokens, scenarios)) > 1000


def _tokens(scenario: Scenario) -> int:
    return sum(len(client.prompt) for turn in scenario.turns for client in turn.clients)
