"""A failing scenario becomes small and stays failing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shrinking import ddmin, shrunk


@dataclass(frozen=True)
class Toy:
    """What can happen in a toy world."""

    kind: str
    at: float = 0.0
    count: int = 1


@dataclass(frozen=True)
class ToySetup:
    lanes: int = 1
    prefixes: bool = False
    shard: str = "heads"


@dataclass(frozen=True)
class ToyScenario:
    seed: int
    setup: ToySetup
    events: tuple[Toy, ...]


def test_ddmin_keeps_the_fewest_that_fail_together() -> None:
    tried: list[list[int]] = []

    def fails(items: list[int]) -> bool:
        tried.append(items)
        return {3, 17} <= set(items)

    assert ddmin(range(40), fails) == [3, 17]
    assert len(tried) < 100
    assert ddmin([1, 2], lambda _: True) == []
    assert ddmin([1, 2], lambda items: items == [1, 2]) == [1, 2]


def test_a_scenario_loses_events_settings_and_digits() -> None:
    noise = tuple(Toy("delay", 0.1234 * at, at) for at in range(20))
    kill, join = Toy("kill", 0.73912, 6), Toy("join", 1.2345)
    scenario = ToyScenario(7, ToySetup(3, True, "sequence"), (*noise[:9], kill, *noise[9:], join))

    def fails(tried: ToyScenario) -> bool:
        kinds = {event.kind: event for event in tried.events}
        together = {"kill", "join"} <= kinds.keys() and kinds["kill"].at < kinds["join"].at
        return together and kinds["kill"].count > 2 and tried.setup.shard == "sequence"

    small = shrunk(scenario, fails)
    assert small == ToyScenario(7, ToySetup(shard="sequence"), (Toy("kill", 1.0, 3), Toy("join", 1.2)))


def test_shrinking_ends_with_the_best_so_far() -> None:
    scenario = ToyScenario(1, ToySetup(), tuple(Toy("delay", float(at)) for at in range(1000)))
    small = shrunk(scenario, lambda tried: len(tried.events) > 10, tries=5)
    assert len(small.events) < 1000
    assert replace(small, events=()) == replace(scenario, events=())
