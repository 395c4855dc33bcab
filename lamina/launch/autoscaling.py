"""The number of an engine's attention workers follows its load: a clock asks, `Autoscaler` decides, and workers are
started, or drained and ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from lamina.deploy.worker_events import AttentionWorkers
from lamina.scheduling.autoscaling import Autoscaler, kv_load
from lamina.scheduling.control_plane import ControlPlane

if TYPE_CHECKING:
    from lamina.engine.engine import Engine
    from lamina.engine.stats import EngineStats

logger = logging.getLogger("lamina")
choices = logging.getLogger("lamina.choices")  # what the engine chose and why, for people

PERIOD = 0.5  # seconds between two decisions


class Autoscaling:
    """Runs an `Autoscaler` for an engine, every `PERIOD` seconds from `begin` to `close`. `clock` is in seconds.

    It decides on the engine's thread, between two batches; what it asks of the workers returns at once.
    """

    def __init__(
        self,
        engine: Engine,
        workers: AttentionWorkers,
        autoscaler: Autoscaler,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._autoscaler = autoscaler
        self._clock = clock
        self._closed = threading.Event()
        self._asked = False  # the engine, which may be in a long batch
        self._leaving: set[str] = set()  # workers that are drained; none of them is in the number that is wanted

    def begin(self) -> None:
        """Decide from now on."""
        threading.Thread(target=self._run, name="lamina-autoscaling", daemon=True).start()

    def close(self) -> None:
        """Decide nothing more."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(PERIOD) and self._engine.alive:
            if not self._asked:
                self._asked = True
                self._engine.look(self.decide)

    def decide(self, control: ControlPlane, stats: EngineStats) -> None:
        """Decide, and do what follows. For the engine's thread."""
        self._asked = False
        if self._closed.is_set():
            return
        try:
            self._decide(control, stats)
        except Exception:  # the engine goes on with the workers that it has
            logger.exception("the number of attention workers could not be decided")

    def _decide(self, control: ControlPlane, stats: EngineStats) -> None:
        load = kv_load(control, stats.generation_tokens)
        if load is None:
            return
        decision = self._autoscaler.decide(load, self._clock())
        stats.workers_wanted, stats.kv_full_in = decision.wanted, decision.full_in
        if not decision.reason:
            return
        choices.info("%s", decision.reason)
        if decision.leaves:
            self._drain(decision.leaves)
        else:
            self._grow()

    def _grow(self) -> None:
        self._workers.grow(self._autoscaler.wanted + len(self._leaving))

    def _drain(self, name: str) -> None:
        def over(done: Future[int]) -> None:
            self._leaving.discard(name)
            if (error := done.exception()) is None:
                self._workers.retire(name)
                self._grow()  # more may be wanted by now than there was room for beside the one that goes
            else:
                logger.warning("%s", error)

        self._leaving.add(name)
        self._engine.drain(name).add_done_callback(over)
