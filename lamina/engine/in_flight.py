"""The batches under way, one a lane: which one goes on next, and how batches are given up."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from lamina.engine.batch import Batch
from lamina.engine.observers import EngineStats
from lamina.kv.request import PlannedRow
from lamina_workers.model_worker.interface import Workers
from lamina_workers.parallel.peers import Peer


class InFlight:
    """The lanes in use. `full`: no further batch can be planned before the state changes."""

    def __init__(self, worker: Workers[Peer], stats: EngineStats) -> None:
        self.full = False
        self._worker = worker
        self._stats = stats
        self._batches: deque[Batch] = deque()  # the one that went on last is the last

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Batch) -> None:
        self._batches.append(batch)

    @property
    def holders(self) -> frozenset[int]:
        return frozenset(number for batch in self._batches for number in batch.step.batches)

    def rows(self, numbers: Collection[int] | None = None) -> list[PlannedRow]:
        """The rows of every batch that concerns one of these holders (None: of every batch)."""
        return [
            row
            for batch in self._batches
            if numbers is None or any(number in batch.step.batches for number in numbers)
            for row in batch.step.rows
        ]

    def next(self) -> Batch:
        """The batch to go on with: the first whose reply has come, or the one that has waited longest."""
        batches = self._batches
        batch = next((batch for batch in batches if batch.waiting is None or batch.waiting.over()), batches[0])
        batches.remove(batch)
        batches.append(batch)
        return batch

    def over(self, batch: Batch) -> None:
        self._batches.remove(batch)
        self.full = False

    def drop(self, batch: Batch) -> None:
        """A batch has failed. Nothing of it counts; it is planned again."""
        self._stats.failed_batches += 1
        self.over(batch)
        batch.step.dropped()

    def abandon(self) -> None:
        """Give up every batch. None of them counts; they are planned again."""
        self._stats.failed_batches += len(self._batches)
        self.close()
        for batch in self._batches:
            batch.step.dropped()
        self._batches.clear()
        self.full = False
        self._worker.next_epoch()

    def close(self) -> None:
        """End every batch where it is; the scheduler is not notified."""
        for batch in self._batches:
            batch.run.close()
