"""The models of one server (`Models`): which are loaded, which are unloaded for others, and which requests wait for one
meanwhile.

The supervisor starts and ends engines. What it is to start and end is decided here, by `decide`, from the requests that
use a model or wait for it. `decide` is pure, without clocks or threads. All else is for the event loop's thread, unless
it says otherwise.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lamina.messages.snapshot import Snapshot
from lamina.server.frontend import DeadlineExceeded, EngineUnavailable, Frontend, State

TURN = 5.0
"""Seconds that a request waits while all loaded models are in use; then one of them takes no new requests, and is
unloaded once those under way have ended. Less would swap models back and forth, more would keep others out."""


@dataclass(frozen=True, slots=True)
class ModelUse:
    """One model at one moment. `place`: it has memory ("in"), is giving it back ("leaving"), or has none ("out");
    `settled`: it is in, and loaded. `users` requests have it, the last one left at `used`; it came in at `begun`;
    a request waits for it since `wanted`. Times are seconds of one clock."""

    name: str
    place: Literal["in", "leaving", "out"]
    settled: bool = True
    users: int = 0
    used: float = 0.0
    begun: float = 0.0
    wanted: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to happen: models to load, models to unload, and `closed` ones, whose new requests wait."""

    load: tuple[str, ...] = ()
    unload: tuple[str, ...] = ()
    closed: frozenset[str] = frozenset()


def decide(uses: Sequence[ModelUse], max_loaded: int, idle_unload: float | None, now: float) -> Decision:
    """The model that is waited for longest comes first. Idle models are unloaded for it, the least recently used one
    first. Where all are used and the wait is longer than `TURN`, the model that was loaded first, and is loaded for as
    long, is unloaded once it is free."""
    waiting = sorted((use for use in uses if use.place == "out" and use.wanted is not None), key=_since)
    room = max_loaded - sum(use.place != "out" for use in uses)
    load, others = waiting[: max(0, room)], waiting[max(0, room) :]
    missing = len(others) - sum(use.place == "leaving" for use in uses)
    settled = [use for use in uses if use.place == "in" and use.settled]
    unload: list[ModelUse] = []
    closed: list[ModelUse] = []
    if missing > 0:
        overdue = sum(now - _since(use) >= TURN for use in others)
        had_turn = [use for use in settled if now - use.begun >= TURN]
        closed = sorted(had_turn, key=lambda use: use.begun)[: min(missing, overdue)]
        idle = [use for use in settled if not use.users and (use.wanted is None or use in closed)]
        unload = sorted(idle, key=lambda use: use.used)[:missing]
    if idle_unload is not None:
        unload += [
            use
            for use in settled
            if use not in unload and not use.users and use.wanted is None and now - use.used >= idle_unload
        ]
    return Decision(
        tuple(use.name for use in load), tuple(use.name for use in unload), frozenset(use.name for use in closed)
    )


def _since(use: ModelUse) -> float:
    return use.wanted if use.wanted is not None else float("inf")


Residence = Literal["loaded", "loading", "unloaded"]

_INTERVAL = 0.5  # seconds between two looks at the time


class Loader(Protocol):
    """What starts and ends engines. Returns at once; the model's `Frontend` learns what follows."""

    def load(self, name: str) -> None: ...

    def unload(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model at one moment, for metrics. `snapshot` is its engine's newest, `restarts` counts that engine's."""

    snapshot: Snapshot | None
    state: State
    restarts: int = 0
    residence: Residence | None = None
    loads: int = 0  # on demand
    waiting: int = 0  # requests that wait for it to be loaded


@dataclass(eq=False)
class ServedModel:
    """One model. `users`: requests that have it, under way or being prepared; while there are any it stays."""

    name: str
    frontend: Frontend
    users: int = 0
    loads: int = 0  # on demand
    waiting: deque[tuple[float, asyncio.Future[None]]] = field(default_factory=deque)  # requests, and since when
    used: float = 0.0  # when its last user left
    begun: float = 0.0  # when it came
    leaving: bool = False  # it is being unloaded
    seen: bool = False  # it was loaded at the last look

    @property
    def residence(self) -> Residence:
        """As clients see it. An engine that died is started again, so its model is loading."""
        state = self.frontend.state
        if self.leaving or state == "unloaded":
            return "unloaded"
        return "loading" if state in ("loading", "dead") else "loaded"

    async def now(self, seconds: float) -> ModelState:
        """Its state; its engine has so many seconds to answer."""
        frontend = self.frontend
        snapshot = await frontend.snapshot(seconds)
        return ModelState(snapshot, frontend.state, frontend.restarts, self.residence, self.loads, len(self.waiting))

    def use(self) -> ModelUse:
        """What decides whether it stays."""
        residence = self.residence
        return ModelUse(
            self.name,
            place="leaving" if self.leaving else "out" if residence == "unloaded" else "in",
            settled=residence == "loaded",
            users=self.users,
            used=self.used,
            begun=self.begun,
            wanted=self.waiting[0][0] if self.waiting else None,
        )


class Models:
    """All models; requests that name none get the first. Without a `loader` no model comes or goes.

    At most `max_loaded` are loaded; one that was not used for `idle_unload` seconds is unloaded. A request whose model
    is not there waits for it, within its own time limit.
    """

    def __init__(
        self,
        frontends: Mapping[str, Frontend],
        loader: Loader | None = None,
        max_loaded: int = 1,
        idle_unload: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = {name: ServedModel(name, frontend) for name, frontend in frontends.items()}
        self._loader = loader
        self._max_loaded = max_loaded
        self._idle_unload = idle_unload
        self._clock = clock
        self._closed: frozenset[str] = frozenset()  # whose new requests wait, because others had no turn yet
        self._loop: asyncio.AbstractEventLoop | None = None
        self._served = False  # a model has been loaded
        for model in self._models.values():
            model.frontend.changed = lambda model=model: self._changed(model)  # type: ignore[misc]

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def __getitem__(self, name: str) -> ServedModel:
        return self._models[name]

    @property
    def first(self) -> ServedModel:
        """The model of requests that name none."""
        return next(iter(self))

    @property
    def on_demand(self) -> bool:
        """Whether models come and go."""
        return self._loader is not None

    @property
    def active(self) -> int:
        """Samples under way or waiting, of all models, and requests that wait for a model."""
        return sum(model.frontend.active + len(model.waiting) for model in self)

    @property
    def health(self) -> State:
        """The best state of a model. A server that has loaded one before, and can load what a request wants, is "ready"
        without a model too."""
        if not self.on_demand:
            return self.first.frontend.state
        if self.first.frontend.draining:
            return "draining"
        states = [model.frontend.state for model in self]
        order: tuple[State, ...] = ("ready", "halted", "loading", "unloaded", "dead")
        best = min(states, key=order.index)
        return "ready" if self._served and best in ("loading", "unloaded") else best

    @property
    def shown(self) -> ServedModel:
        """The model that a page shows by itself: the first that is loaded, else the first that is being loaded."""
        order: tuple[Residence, ...] = ("loaded", "loading", "unloaded")
        return min(self, key=lambda model: order.index(model.residence))

    async def now(self, seconds: float) -> dict[str, ModelState]:
        """The states of all models, by name; their engines have so many seconds to answer."""
        states = await asyncio.gather(*(model.now(seconds) for model in self))
        return {model.name: state for model, state in zip(self, states, strict=True)}

    async def take(self, name: str, left: float) -> ServedModel:
        """The model of that name, loaded if it was not within `left` seconds. It stays until `give`. Raises
        EngineUnavailable where it cannot be loaded, DeadlineExceeded."""
        model = self._models[name]
        if not self._waits(model):
            model.users += 1
            return model
        self._loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = self._loop.create_future()
        entry = (self._clock(), turn)
        model.waiting.append(entry)
        self.tend()
        try:
            await asyncio.wait({turn}, timeout=left)  # not `wait_for`, which may return though it was cancelled
        except asyncio.CancelledError:
            self._leave(model, entry)
            raise
        if not turn.done():
            self._leave(model, entry)
            raise DeadlineExceeded(f"the model {name} was not loaded within the request's time")
        turn.result()
        return model

    def _leave(self, model: ServedModel, entry: tuple[float, asyncio.Future[None]]) -> None:
        """A request does not wait any longer."""
        _, turn = entry
        if turn.done():
            if turn.exception() is None:  # it got the model at the same moment
                self.give(model)
        else:
            turn.cancel()
            model.waiting.remove(entry)

    def give(self, model: ServedModel) -> None:
        """A request does not need the model any more."""
        model.users -= 1
        model.used = self._clock()
        if not model.users:
            self.tend()

    def unload(self, name: str) -> bool:
        """Unload a model. False where requests use it or wait for it, or no model goes."""
        model = self._models[name]
        if self._loader is None or model.users or model.waiting or model.residence == "loading":
            return False
        if model.residence == "loaded":
            self._unload(self._loader, model)
        return True

    def begin(self) -> None:
        """Look at the time now and then from now on. Called once."""
        self._loop = asyncio.get_running_loop()
        if self._loader is not None:
            self._tick()

    def drain(self) -> None:
        """Take no new requests, from any thread; those that wait for a model fail."""
        for model in self:
            model.frontend.draining = True
        self._changed(self.first)

    def tend(self) -> None:
        """Let requests go on whose model is there, and load and unload what is due."""
        loader, now = self._loader, self._clock()
        if loader is None:
            return
        for model in self:
            is_loaded = model.residence == "loaded"
            if is_loaded and not model.seen:
                self._served, model.used, model.begun = True, now, now
                if not model.frontend.draining:  # waiting requests get it before it may be unloaded
                    self._admit(model)
            model.seen = is_loaded
        decision = decide([model.use() for model in self], self._max_loaded, self._idle_unload, now)
        self._closed = decision.closed
        for name in decision.unload:
            self._unload(loader, self._models[name])
        for name in decision.load:
            model = self._models[name]
            model.loads += 1
            model.frontend.begins()
            loader.load(name)
        for model in self:
            if model.frontend.draining:
                self._refuse(model)
            elif not self._waits(model):
                self._admit(model)

    def _unload(self, loader: Loader, model: ServedModel) -> None:
        model.leaving = True
        loader.unload(model.name)

    def _waits(self, model: ServedModel) -> bool:
        """Whether a request that comes now waits for the model. None waits for an engine that has died: its clients
        come back once it is started again."""
        if self._loader is None:
            return False
        return model.leaving or model.frontend.state in ("unloaded", "loading") or model.name in self._closed

    def _admit(self, model: ServedModel) -> None:
        while model.waiting:
            _, turn = model.waiting.popleft()
            model.users += 1
            turn.set_result(None)

    def _changed(self, model: ServedModel) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._look, model)

    def _look(self, model: ServedModel) -> None:
        """Something happened to a model."""
        if model.frontend.state == "unloaded":
            model.leaving = False
            if model.frontend.why:  # it could not be loaded
                self._refuse(model)
        self.tend()

    def _refuse(self, model: ServedModel) -> None:
        """The requests that wait for a model fail."""
        while model.waiting:
            _, turn = model.waiting.popleft()
            turn.set_exception(EngineUnavailable(f"{model.name}: {model.frontend.unavailable}; try again later"))

    def _tick(self) -> None:
        self.tend()
        if self._loop is not None:
            self._loop.call_later(_INTERVAL, self._tick)
