"""Which models are loaded, and who waits for one: with frontends that have no engine, and a clock of the test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from unobserved import Unobserved

from lamina.server.frontend import DeadlineExceeded, EngineUnavailable, Frontend
from lamina.server.models import TURN, Decision, Models, ModelUse, decide


class Engine:
    alive, halted = True, False


class Served:
    engine = Engine()


class World:
    """Models whose loader is this: it does at once, or when told, what it is asked."""

    def __init__(self, names: str = "ab", max_loaded: int = 1, idle_unload: float | None = None) -> None:
        self.now = 100.0
        self.asked: list[str] = []
        self.fails = ""
        self.slow = False
        self.frontends = {name: Frontend(Unobserved()) for name in names}
        for name in names[1:]:
            self.frontends[name].unloaded()
        self.models = Models(self.frontends, self, max_loaded, idle_unload, lambda: self.now)
        self.frontends[names[0]].ready(Served())  # type: ignore[arg-type]
        self.models.begin()

    def load(self, name: str) -> None:
        self.asked.append(f"+{name}")
        if self.fails:
            self.frontends[name].unloaded(self.fails)
        elif not self.slow:
            self.frontends[name].ready(Served())  # type: ignore[arg-type]

    def unload(self, name: str) -> None:
        self.asked.append(f"-{name}")
        self.frontends[name].unloaded()

    async def take(self, name: str, left: float = 5.0) -> Any:
        return await self.models.take(name, left)

    @property
    def states(self) -> str:
        return " ".join(f"{model.name}:{model.residence}" for model in self.models)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def test_a_model_that_is_wanted_takes_the_place_of_one_that_nobody_uses() -> None:
    async def test() -> None:
        world = World()
        first = await world.take("a")
        world.models.give(first)
        second = await world.take("b")
        assert (world.asked, world.states) == (["-a", "+b"], "a:unloaded b:loaded")
        assert second.loads == 1
        assert world.models.health == "ready"

    run(test)


def test_a_model_with_a_request_under_way_stays_and_others_wait_for_their_turn() -> None:
    async def test() -> None:
        world = World()
        first = await world.take("a")
        waits = asyncio.ensure_future(world.take("b"))
        await settle()
        again = await world.take("a")  # nobody has waited for long
        world.now += TURN
        world.models.tend()
        late = asyncio.ensure_future(world.take("a"))
        await settle()
        assert world.asked == []
        assert not late.done()  # it is the other's turn
        world.models.give(first)
        world.models.give(again)
        second = await waits
        assert world.asked == ["-a", "+b"]
        world.models.give(second)
        assert (await late).name == "a"
        assert world.asked == ["-a", "+b", "-b", "+a"]

    run(test)


def test_the_least_recently_used_one_goes() -> None:
    async def test() -> None:
        world = World("abc", max_loaded=2)
        for name in ("b", "a"):
            world.now += 1
            world.models.give(await world.take(name))
        await world.take("c")
        assert world.asked == ["+b", "-b", "+c"]

    run(test)


def test_an_idle_model_is_unloaded_and_comes_back_when_it_is_wanted() -> None:
    async def test() -> None:
        world = World("a", idle_unload=600.0)
        world.models.give(await world.take("a"))
        world.now += 599
        world.models.tend()
        assert world.states == "a:loaded"
        world.now += 1
        world.models.tend()
        await settle()
        assert (world.states, world.models.health) == ("a:unloaded", "ready")
        assert (await world.take("a")).frontend.state == "ready"

    run(test)


def test_a_request_that_waits_has_its_time_limit_and_may_go() -> None:
    async def test() -> None:
        world = World()
        await world.take("a")
        with pytest.raises(DeadlineExceeded, match="the model b"):
            await world.take("b", 0.01)
        gone = asyncio.ensure_future(world.take("b"))
        await settle()
        gone.cancel()
        await settle()
        assert not world.models["b"].waiting
        assert world.models.active == 0

    run(test)


def test_a_model_that_cannot_be_loaded_fails_those_who_wait_and_is_tried_again() -> None:
    async def test() -> None:
        world = World()
        world.fails = "too little memory"
        with pytest.raises(EngineUnavailable, match="b: the model could not be loaded: too little memory"):
            await world.take("b")
        world.fails = ""
        assert (await world.take("b")).name == "b"

    run(test)


def test_a_server_that_drains_lets_nobody_wait() -> None:
    async def test() -> None:
        world = World()
        await world.take("a")
        waits = asyncio.ensure_future(world.take("b"))
        await settle()
        world.models.drain()
        with pytest.raises(EngineUnavailable, match="about to end"):
            await waits
        assert world.models.health == "draining"

    run(test)


def test_an_operator_unloads_only_what_nobody_uses() -> None:
    async def test() -> None:
        world = World()
        model = await world.take("a")
        assert not world.models.unload("a")
        world.models.give(model)
        assert world.models.unload("a")
        assert world.states == "a:unloaded b:unloaded"
        assert not Models({"m": Frontend(Unobserved())}).unload("m")

    run(test)


def test_decisions_without_a_world() -> None:
    loaded, busy = ModelUse("a", "in", used=1.0), ModelUse("b", "in", users=1, begun=2.0)
    wanted = ModelUse("c", "out", wanted=10.0)
    assert decide([loaded, wanted], 2, None, 10.0) == Decision(load=("c",))
    # Where loading takes longer than a turn, models were unloaded before those who had waited for them got them.
    assert decide([ModelUse("a", "in", begun=9.0, wanted=2.0), wanted], 1, None, 10.0 + TURN - 2) == Decision()
    assert decide([loaded, busy, wanted], 2, None, 10.0) == Decision(unload=("a",))
    assert decide([ModelUse("a", "leaving"), busy, wanted], 2, None, 10.0) == Decision()  # room is on its way
    assert decide([busy, wanted], 1, None, 10.0 + TURN) == Decision(closed=frozenset("b"))
    assert decide([ModelUse("a", "in", settled=False), wanted], 1, 1.0, 99.0) == Decision()  # it has only just begun
