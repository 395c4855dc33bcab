"""Draws a scenario from a seed by swarm testing: each seed turns on some faults and some features and leaves out others
(Groce et al., ISSTA 2012), since what is always on hides what happens without it. How dense faults are is drawn too:
two of three seeds are storms, with a fault every few steps for as long as requests come.

Knows nothing of how a cluster runs or of what is right. The same seed gives the same scenario with the same code.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from scenario import (
    STEP_S,
    Break,
    Cut,
    Delay,
    Disk,
    Drain,
    Event,
    Flip,
    Freeze,
    FreezeEngine,
    Join,
    JumpClock,
    KillEngine,
    KillModelWorker,
    KillServer,
    KillWorker,
    Leave,
    Lose,
    Mode,
    Move,
    Reset,
    ResetLink,
    Scenario,
    Setup,
    Slow,
    Submit,
)

PAGE_SIZE = 16
MOST_PROMPT, MOST_TOKENS = 90, 48
_WORKERS = 1, 2, 2, 3, 4
_POLICIES = ("",) * 6 + ("streaming(sink=4, recent=40)",)
_SPARES = ("replica", "replica(2)")  # each takes a worker more
_LONG = 16  # one seed of so many has long texts and few faults: growth elsewhere, copies and reading back take a while
_LONG_TOKENS = (8, 100, 200)
_FULL = 11  # of each _LONG seeds this one has full pools, and engines that die
_FULL_ROOM, _FULL_PROMPTS = (96, 112, 128, 144, 160), (17, 33, 48)  # tokens
_DEATHS, _LIFE = 4, 80  # of engines over full pools; steps between two
_TURNS = 6  # latencies in a step: there and back for the announcement and each of two layers
_SETTLING = 0.5  # seconds without faults before the end of a "safety" scenario's events, and after the last fault


@dataclass(frozen=True, slots=True)
class Shape:
    """How many pages a token range takes: `layers` times `heads` tables of pages."""

    layers: int
    heads: int

    def pages(self, tokens: int) -> int:
        """Those of one sequence, with a page to grow and one to copy in each table."""
        return self.layers * self.heads * (-(-tokens // PAGE_SIZE) + 2)


class Draw:
    """What is drawn for one seed: its random numbers, what is built, and over how many seconds faults are spread.
    `storm`: how many faults there are in one; 0: it is none."""

    def __init__(self, seed: int, shape: Shape) -> None:
        self.rng = random.Random(seed)
        self.shape = shape
        self.long = seed % _LONG == _LONG - 1
        self.tokens = _LONG_TOKENS if self.long else (1, 8, 24, MOST_TOKENS)
        self.storm = self.rng.choice((0, 0, 100, 300, 600, 600))
        self.restarts = self.rng.random() < 0.25  # of the engine, over KV that stays: what takes most to come about
        self.setup = self._setup()
        self.gap = self.rng.choice((1, 2, 4)) * (STEP_S + _TURNS * self.setup.latency)  # between two faults of a storm
        quiet = (0.2, 1.0) if self.long else (0.05, 0.2, 0.2, 1.0, 3.0)
        self.span = self.storm * self.gap if self.storm else self.rng.choice(quiet)
        self.workers = len(self.setup.workers)
        self.requests = self.rng.choice((8, 16, 32) if self.storm else (1, 3, 6, 10))

    def when(self) -> float:
        """A second in which faults are. Half of them come in bursts, since faults that meet are the hard ones."""
        at, burst = self.rng.random() * self.span, 8 * self.gap if self.storm else self.span / 4
        return round(at if self.rng.random() < 0.5 else at - at % burst + 0.002 * self.rng.random(), 5)

    def seconds(self) -> float:
        """How long something lasts: from one step to beyond every timeout. In a storm mostly until the next faults, or
        nothing would go on in it."""
        if self.storm and self.rng.random() < 0.95:
            return round(self.gap * self.rng.choice((0.25, 1, 4)), 5)
        return self.rng.choice((0.001, 0.005, 0.02, 0.1, 0.5 * self.setup.timeout, 2.5 * self.setup.timeout))

    def back(self, *seconds: float) -> float:
        """After how long something that is dead starts again; in a storm after some more faults."""
        return round(self.gap * self.rng.choice((0.5, 2, 8, 32)), 5) if self.storm else self.rng.choice(seconds)

    def worker(self) -> int:
        """Any worker; those that join come after those of the setup, and may not be there."""
        return self.rng.randrange(max(1, self.workers) + 2 * (self.rng.random() < 0.2))

    def _setup(self) -> Setup:
        rng = self.rng
        least = self.shape.pages(MOST_PROMPT + self.tokens[-1])
        pages = rng.choice((4 * least, 4 * least, least, least + rng.randrange(40)))
        link = self.restarts or rng.random() < 0.5
        timeout = rng.choice((0.02, 0.05, 0.2) if self.storm else (0.05, 0.2, 1.0))
        workers = rng.choice((3, 4, 4) if self.long else (*_WORKERS, *_WORKERS, 0))
        states = rng.random() < 0.2
        eager = rng.random() < 0.5
        parity = workers > 2 and (self.long or eager) and rng.random() < 0.6  # else copies take longer than texts
        spares = ("parity", f"parity({workers - 1})") if parity else ("none", "none")
        model_workers = rng.choice((1, 1, 1, 1, 2, 3)) if workers else 1
        return Setup(
            model_workers=model_workers,
            workers=tuple(pages * rng.choice((1, 1, 1, 2, 3)) for _ in range(workers)),
            redundancy=rng.choice((*spares, *_SPARES[: max(0, workers - 1)])),
            shard=rng.choice(("heads", "heads", "sequence", "heads+sequence")),
            local_pages=rng.choice((0, 40, least, 3 * least)) if workers else 3 * least,
            local_tier=rng.random() < 0.3 and model_workers == 1 and workers > 0,
            lanes=rng.choice((1, 1, 2, 3)),
            query_first=rng.random() < 0.4,
            max_batch_tokens=rng.choice((5, 7, 32, 64, 512)),
            prefix_cache=rng.random() < 0.5,
            drafts=rng.choice((0, 0, 1 if states else 3)),  # of so small states no more inputs are kept
            policy=rng.choice(_POLICIES),
            window=rng.choice((0, 0, 0, 21)),
            states=states,
            eager=eager,
            old_workers=rng.choice((0, 0, 0, 0, 1)),
            wait=rng.choice((30.0,) * 9 + (0.05,)),
            journal=self.restarts or rng.random() < (0.6 if link else 0.2),
            link=link,
            timeout=timeout,
            lease=rng.choice((1.5, 4.0)) * timeout,
            linger=5.0 if self.restarts else rng.choice((0.0, 1.0, 5.0)),
            latency=rng.choice((0.00005, 0.0002, 0.002)),
            again=rng.choice((0.002, 0.02, 0.2)) if self.storm else 0.2,
        )


FAULTS: dict[type[Event], Callable[[Draw], Event]] = {
    KillWorker: lambda d: KillWorker(d.when(), d.worker(), d.back(0.001, 0.01, 0.1, 0.6), d.rng.random() < 0.2),
    KillEngine: lambda d: KillEngine(d.when(), d.back(0.001, 0.05, 0.5), d.rng.choice((0, 0, 3, 40, 400))),
    KillModelWorker: lambda d: KillModelWorker(d.when(), d.rng.randrange(1, 4), d.back(0.01, 0.3)),
    Freeze: lambda d: Freeze(d.when(), d.worker(), d.seconds()),
    FreezeEngine: lambda d: FreezeEngine(d.when(), d.seconds()),
    Slow: lambda d: Slow(d.when(), d.worker(), d.seconds(), d.rng.choice((3.0, 10.0, 100.0))),
    Delay: lambda d: Delay(d.when(), d.worker(), d.seconds(), d.rng.choice((0.0005, 0.005, 0.05))),
    Cut: lambda d: Cut(d.when(), d.worker(), d.seconds(), d.rng.choice(("both", "to worker", "to engine"))),
    Reset: lambda d: Reset(d.when(), d.worker()),
    Flip: lambda d: Flip(d.when(), d.worker(), d.rng.choice(("both", "to worker", "to engine")), d.rng.randrange(4096)),
    Lose: lambda d: Lose(d.when(), d.worker()),
    Break: lambda d: Break(d.when(), d.worker(), d.rng.choice(("before", "after", "settle"))),
    JumpClock: lambda d: JumpClock(d.when(), d.rng.choice((-3600.0, -1.0, 1.0, 3600.0, 1e9))),
    Drain: lambda d: Drain(d.when(), d.worker()),
    Join: lambda d: Join(d.when(), max(d.setup.workers)),
    Move: lambda d: Move(d.when(), d.rng.choice((0.0, 0.3, 0.7, 1.0))),
    Disk: lambda d: Disk(d.when(), d.seconds(), d.rng.choice(("full", "read-only"))),
    KillServer: lambda d: KillServer(d.when()),
    ResetLink: lambda d: ResetLink(d.when()),
    Leave: lambda d: Leave(d.when(), d.rng.randrange(d.requests), d.rng.choice(("abort", "abort", "break")),
                           d.rng.choice((None, None, 0, 1))),
}  # fmt: skip
"""How an event of each kind is drawn."""

_MOST = {
    KillWorker: 24, KillEngine: 6, KillModelWorker: 6, KillServer: 2, ResetLink: 4, Drain: 3, Join: 3, Leave: 4,
    Disk: 3, JumpClock: 3, Lose: 2, Break: 3,
}  # fmt: skip
_USUAL = 10  # the most events of any other kind
# Of others as many as the storm has faults.
_MOST_OF_STORM = {KillEngine: 12, KillServer: 4, Drain: 3, Join: 3, Leave: 8, JumpClock: 6, Disk: 12, Lose: 2}


def possible(kind: type[Event], setup: Setup) -> bool:
    """Whether such an event does anything in this setup."""
    if kind is Join:
        return bool(setup.workers)
    if kind is KillModelWorker:
        return setup.model_workers > 1
    if kind in (KillServer, ResetLink):
        return setup.link
    if kind is Disk:
        return setup.journal
    if kind is Move:
        return setup.local_tier and setup.local_pages > 0
    return True


def drawn(seed: int, shape: Shape, mode: Mode | None = None) -> Scenario:
    """The scenario of a seed, in the given mode or in one that is drawn too."""
    if seed % _LONG == _FULL:
        return _full(seed, shape, mode or "liveness")
    draw = Draw(seed, shape)
    rng = draw.rng
    chosen: Mode = "safety" if rng.random() < 0.25 else "liveness"
    kinds = [kind for kind in FAULTS if possible(kind, draw.setup) and rng.random() < 0.4]
    if draw.restarts and KillEngine not in kinds:
        kinds.append(KillEngine)
    if rng.random() < 0.8 and KillWorker not in kinds:
        kinds.append(KillWorker)  # what most of recovery is about
    events: list[Event] = [*_requests(draw)]
    events += [FAULTS[kind](draw) for kind in (_storm(draw, kinds) if draw.storm else _few(draw, kinds))]
    events += _cuts_before(draw, [event for event in events if isinstance(event, KillEngine)])
    events.sort(key=lambda event: event.at)
    heals = round(draw.span + _SETTLING, 3)
    mode = mode or chosen
    return Scenario(seed, draw.setup, tuple(events), mode, heals, heals if mode == "safety" else 600.0)


def _full(seed: int, shape: Shape, mode: Mode) -> Scenario:
    """Many more texts than there is room for. They are alike and grow together, so for some steps no page is free that
    any needs; engines die then or at other times, and the next one takes up all. No other fault makes room."""
    rng = random.Random(seed)
    setup = Setup(
        workers=(shape.pages(rng.choice(_FULL_ROOM)),) * rng.choice((1, 1, 1, 2)),
        shard=rng.choice(("heads", "sequence", "heads+sequence")),
        local_pages=0,
        lanes=rng.choice((1, 1, 2)),
        query_first=rng.random() < 0.4,
        max_batch_tokens=rng.choice((7, 32, 64, 512)),
        prefix_cache=rng.random() < 0.3,
        drafts=rng.choice((0, 0, 3)),
        journal=True,
        link=True,
        timeout=rng.choice((0.2, 1.0)),
        latency=rng.choice((0.00005, 0.0002)),
    )
    step, prompt = STEP_S + _TURNS * setup.latency, rng.choice(_FULL_PROMPTS)
    submits = [Submit(0.0, number, prompt, MOST_TOKENS) for number in range(rng.choice((12, 16)))]
    deaths = [KillEngine(round((life + rng.random()) * _LIFE * step, 5), 4 * step) for life in range(_DEATHS)]
    heals = round(_DEATHS * _LIFE * step + _SETTLING, 3)
    return Scenario(seed, setup, (*submits, *deaths), mode, heals, heals if mode == "safety" else 600.0)


def _few(draw: Draw, kinds: Iterable[type[Event]]) -> Iterator[type[Event]]:
    """Some faults of each kind."""
    for kind in kinds:
        most = _MOST.get(kind, _USUAL)
        for _ in range(draw.rng.randint(1, min(most, 3) if draw.long else most)):
            yield kind


def _storm(draw: Draw, kinds: Sequence[type[Event]]) -> Iterator[type[Event]]:
    """As many faults as the storm has, some kinds far more often than others."""
    if not kinds:
        return
    often = [draw.rng.choice((1, 3, 9)) for _ in kinds]
    left = {kind: _MOST_OF_STORM.get(kind, draw.storm) for kind in kinds}
    for kind in draw.rng.choices(kinds, often, k=draw.storm):
        if left[kind]:
            left[kind] -= 1
            yield kind


def _cuts_before(draw: Draw, deaths: Iterable[KillEngine]) -> Iterator[Cut]:
    """Cuts in which an engine dies, so that its last messages come when the next one is there."""
    for death in deaths:
        if draw.restarts or draw.rng.random() < 0.4:
            before = draw.rng.choice((0.0005, 0.005, 0.02))
            seconds = before + death.back * draw.rng.uniform(0.5, 1.0)
            yield Cut(round(max(0.0, death.at - before), 5), draw.worker(), round(seconds, 5))


def _requests(draw: Draw) -> Iterator[Submit]:
    rng = draw.rng
    shared = rng.choice((0, 20, 48)) if draw.setup.prefix_cache or rng.random() < 0.2 else 0
    for number in range(draw.requests):
        at = 0.0 if rng.random() < 0.5 else draw.when()
        prompt = rng.choice((1, 2, 15, 16, 17, 33, 48, 75, MOST_PROMPT))
        tokens = rng.choice(draw.tokens)
        samples = rng.choice((1, 1, 1, 3))
        priority = rng.choice((0, 0, 0, 1, 2))
        yield Submit(at, number, prompt, tokens, samples, rng.randrange(2), min(shared, prompt), priority)
