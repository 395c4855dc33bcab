"""The batches under way, one a lane: whose turn it is, and how they are given up. Knows nothing of what they do."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass

from lamina.engine.stats import EngineStats
from lamina.scheduling.request import Plan
from lamina.scheduling.scheduler import Scheduler
from lamina_workers.model_worker.attention_merge import Waiting
from lamina_workers.model_worker.interface import Workers
from lamina_workers.parallel.peers import Peer


@dataclass(slots=True)
class Answered:
    """Whether every holder has answered a batch's announcement: from then on all replies are its own."""

    up: bool = False


@dataclass(eq=False, slots=True)
class Lane:
    """A batch under way. `plan` is None where it only carries operations that the scheduler does not know of."""

    plan: Plan | None
    run: Generator[Waiting, None, None]
    answered: Answered
    waiting: Waiting | None = None


class InFlight:
    """`full` is set while nothing more can be planned until something happens."""

    def __init__(self, worker: Workers[Peer], scheduler: Scheduler, tally: EngineStats) -> None:
        self.full = False
        self._worker = worker
        self._scheduler = scheduler
        self._tally = tally
        self._lanes: deque[Lane] = deque()  # whoever went on last stands at the end

    def __len__(self) -> int:
        return len(self._lanes)

    def add(self, lane: Lane) -> None:
        """One batch more has begun."""
        self._lanes.append(lane)

    def next(self) -> Lane:
        """The one to go on with: the first whose reply has come, or that has waited longest where none has."""
        lane = next((lane for lane in self._lanes if lane.waiting is None or lane.waiting.over()), self._lanes[0])
        self._lanes.remove(lane)
        self._lanes.append(lane)
        return lane

    def over(self, lane: Lane) -> None:
        """A batch has ended."""
        self._lanes.remove(lane)
        self.full = False

    def drop(self, lane: Lane) -> None:
        """A batch has failed. Nothing of it counts; it is planned again."""
        self.over(lane)
        if lane.plan is not None:
            self._scheduler.drop(lane.plan)

    def abandon(self) -> None:
        """Give up every one. Nothing of them counts; they are planned again."""
        self._tally.failed_batches += len(self._lanes)
        self.close()
        for lane in self._lanes:
            if lane.plan is not None:
                self._scheduler.drop(lane.plan)
        self._lanes.clear()
        self.full = False
        self._worker.next_epoch()

    def close(self) -> None:
        """End them where they are; the scheduler is not told."""
        for lane in self._lanes:
            lane.run.close()
