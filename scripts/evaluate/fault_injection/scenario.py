"""One scenario: what is started, what happens while clients stream, and what must hold; and how it is run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .checks import Check, NoneLost, NothingLeft, Recovered, SameTexts
from .events import Event
from .load import Load
from .result import Result
from .world import Setup, World

USUAL: tuple[Check, ...] = (NoneLost(), SameTexts(), Recovered(), NothingLeft())
SETUP, LOAD = Setup(), Load()
LOOK = 0.05  # seconds between two looks at the service
STAYS = 1.0  # seconds: a loss that nobody has noticed yet is none that was recovered from
LEFT = 15.0  # seconds within which an idle server's pages are free


@dataclass(frozen=True, slots=True)
class Scenario:
    """`events` happen one after the other, once clients have streamed for some seconds. `failure` says them in words.
    `ends`: the server is gone afterwards."""

    name: str
    failure: str
    events: tuple[Event, ...] = ()
    setup: Setup = SETUP
    checks: tuple[Check, ...] = USUAL
    load: Load = LOAD
    ends: bool = False


Texts = Callable[[Load, set[int]], dict[int, str]]
"""The texts of an undisturbed engine, by the numbers of prompts."""


def run(
    scenario: Scenario, model: str, folder: Path, texts: Texts, previous: Path | None = None, seconds: float = 8.0
) -> Result:
    """Start the service, let clients stream for `seconds`, have the events happen, wait until it has recovered (twice
    the time that it may take at most), and let them stream on for `seconds`. Raises RuntimeError or OSError where the
    service does not start, or an event cannot happen."""
    most = 2 * max((check.seconds for check in scenario.checks if isinstance(check, Recovered)), default=60.0)
    with World(scenario.setup, scenario.load, model, folder, previous) as world:
        with world.clients:
            time.sleep(seconds)
            began = time.monotonic()
            for event in scenario.events:
                event.happen(world)
            whole, counters, left, status = None, {}, "", None
            if not scenario.ends:
                whole = _recovered(world, time.monotonic(), most)
                time.sleep(seconds)
                counters = world.snapshot()
        if scenario.ends:
            status = world.server.process.wait(most)
        else:
            left = _left(world)
        answers, start, log = tuple(world.clients.answers), world.start, world.server.log
    known = texts(scenario.load, {answer.prompt for answer in answers if answer.text})
    return Result(answers, start, began, whole, known, counters, left, log, status)


def _recovered(world: World, since: float, most: float) -> float | None:
    """When the service became whole, with a token for each client since, and stayed so."""
    whole = None
    while whole is not None or time.monotonic() < since + most:
        if not (world.clients.served_since(since) and world.whole()):
            whole = None
        elif whole is None:
            whole = time.monotonic()
        elif time.monotonic() >= whole + STAYS:
            return whole
        time.sleep(LOOK)
    return None


def _left(world: World) -> str:
    end = time.monotonic() + LEFT
    while not world.idle():
        if time.monotonic() > end:
            return f"{LEFT:g} s after the last request the engine says {world.snapshot()}"[:500]
        time.sleep(LOOK)
    return ""
