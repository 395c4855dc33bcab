"""The batches under way, one a lane: which one goes on next, and how batches are given up."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator
from dataclasses import dataclass, field

from lamina.engine.observers import EngineStats
from lamina.kv.request import PlannedRow
from lamina.scheduling.control_plane import ControlPlane, Step
from lamina_workers.model_worker.interface import Waiting, Workers
from lamina_workers.parallel.peers import Peer


@dataclass(eq=False, slots=True)
class Lane:
    """A batch under way. `run` is the batch as a generator, suspended on `waiting`."""

    step: Step
    run: Generator[Waiting, None, None] = field(init=False)
    waiting: Waiting | None = None


class InFlight:
    """The lanes in use. `full`: no further batch can be planned before the state changes."""

    def __init__(self, worker: Workers[Peer], control: ControlPlane, stats: EngineStats) -> None:
        self.full = False
        self._worker = worker
        self._control = control
        self._stats = stats
        self._lanes: deque[Lane] = deque()  # the one that went on last is the last

    def __len__(self) -> int:
        return len(self._lanes)

    def add(self, lane: Lane) -> None:
        """One batch more has begun."""
        self._lanes.append(lane)

    @property
    def holders(self) -> frozenset[int]:
        """The holders that a batch under way concerns."""
        return frozenset(number for lane in self._lanes for number in lane.step.batches)

    def rows(self, numbers: Collection[int] | None = None) -> list[PlannedRow]:
        """The rows of every batch that concerns one of these holders (None: of every batch)."""
        return [
            row
            for lane in self._lanes
            if numbers is None or any(number in lane.step.batches for number in numbers)
            for row in lane.step.rows
        ]

    def next(self) -> Lane:
        """The batch to go on with: the first whose reply has come, or the one that has waited longest."""
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
        self._stats.failed_batches += 1
        self.over(lane)
        self._control.dropped(lane.step)

    def abandon(self) -> None:
        """Give up every batch. None of them counts; they are planned again."""
        self._stats.failed_batches += len(self._lanes)
        self.close()
        for lane in self._lanes:
            self._control.dropped(lane.step)
        self._lanes.clear()
        self.full = False
        self._worker.next_epoch()

    def close(self) -> None:
        """End every batch where it is; the scheduler is not notified."""
        for lane in self._lanes:
            lane.run.close()
