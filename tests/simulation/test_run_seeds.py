"""The runner: what a failing seed prints is small and runs again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import run_seeds
import scenario as vocabulary
from scenario import Answer, Drain, KillWorker, Outcome, Scenario, Submit, reference_text


def toy(broken: bool) -> Any:
    """A cluster that is always right, or leaks a page once a worker dies after a drain."""

    def run(scenario: Scenario) -> Outcome:
        answers, complaints, drained = {}, [], False
        for event in scenario.events:
            if isinstance(event, Submit):
                texts = [list(reference_text(event, sample, scenario.setup.model)) for sample in range(event.samples)]
                answers[event.request] = Answer(event, texts, ["length"] * event.samples)
            drained |= isinstance(event, Drain)
            if drained and isinstance(event, KillWorker) and broken:
                complaints = [f"worker-{event.worker}: a page leaks"]
        counts = Counter(deaths=1, steps=2, KillWorker=1)
        return Outcome(answers, complaints, counts, ["it was fine"], 0.5)

    return run


def test_a_cluster_that_is_right_fails_no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "run", toy(broken=False))
    assert [seed for seed in range(4) if run_seeds.check(seed)[1] is not None] == []
    counts, failure = run_seeds.check(3)
    assert failure is None
    assert (counts["scenarios"], counts["deaths"], counts["milliseconds"]) == (1, 1, 500)
    assert counts["fault events"] == 1


def test_a_failing_seed_prints_a_small_scenario(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vocabulary, "run", toy(broken=True))
    seed, failure = next((seed, found) for seed in range(100) if (found := run_seeds.check(seed)[1]) is not None)
    assert failure.kind == "worker-N: a page leaks"
    run_seeds.show_failure(failure)
    said = capsys.readouterr().out
    small = eval(said[said.index("Scenario(") : said.index("it was fine")], vars(vocabulary))  # noqa: S307
    assert [type(event) for event in small.events] == [Drain, KillWorker]
    assert f"scripts/test --simulation --seed {seed}" in said


def test_an_error_of_the_run_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(scenario: Scenario) -> Outcome:
        raise ValueError("no such thing")

    monkeypatch.setattr(vocabulary, "run", run)
    _, failure = run_seeds.check(1)
    assert failure == run_seeds.Failure(1, "ValueError of the run", ("ValueError: no such thing",))


def test_making_a_failure_small_ends_where_a_smaller_scenario_never_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = toy(broken=True)

    def run(scenario: Scenario) -> Outcome:
        while not any(isinstance(event, Drain) for event in scenario.events):
            pass  # it turns in place
        return whole(scenario)

    monkeypatch.setattr(vocabulary, "run", whole)
    monkeypatch.setattr(run_seeds, "_TRY", 0.1)
    failure = next(found for seed in range(100) if (found := run_seeds.check(seed)[1]) is not None)
    monkeypatch.setattr(vocabulary, "run", run)
    run_seeds.show_failure(failure)
    assert "Drain(" in capsys.readouterr().out
    monkeypatch.setattr(run_seeds, "_SHRINK", 0.0)
    run_seeds.show_failure(failure)
    run_seeds.show_failure(failure._replace(kind="a process ended"))
    assert capsys.readouterr().out.endswith(f"replay: scripts/test --simulation --seed {failure.seed}\n")
