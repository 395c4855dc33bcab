"""Decode steps of two tiers in simulated time, for what chooses lanes, local share and order."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Protocol

from lamina.scheduling.step_tuner import MeasuredBatch


class Chooser(Protocol):
    """What a world asks how to run, and tells how it went."""

    lanes: int
    share: float
    fused: bool

    def completed(self, batch: MeasuredBatch, moving: bool = False) -> None: ...


@dataclass
class World:
    """Sequences of equal length over two tiers. `local` and `remote` are seconds that reading 1,000 tokens of each
    takes them, `fixed` those of having anything remote, `call` the remote tier's for each batch. Dense layers take
    `dense` a batch and `row` for each of its sequences, `first` times as long where q goes first. Where the tiers share
    cores (`shared`) each takes time from the other, and answers come `beside` seconds later. A sequence takes `slow`
    steps to move, each of which takes twice the time. `most` sequences have room in the local tier."""

    local: float
    remote: float
    fixed: float = 0.002
    dense: float = 0.03
    row: float = 0.0
    call: float = 0.0
    first: float = 1.1
    shared: float = 0.0
    beside: float = 0.0
    noise: float = 0.0
    slow: int = 2
    sequences: int = 8
    most: int = 10_000
    replicas: int = 1
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    here: int = 10_000
    moving: int = 0
    tokens: int = 1000
    grows: int = 1
    changes: int = 0
    ran: tuple[int, float, bool] = (1, 1.0, True)

    def __post_init__(self) -> None:
        self.here = min(self.here, self.most, self.sequences)

    def times(self, here: int, lanes: int = 1, fused: bool = True) -> tuple[float, float, float, float]:
        """Seconds that the local tier, the remote tier and its answers take, and a step of all lanes."""
        length = self.tokens / 1000 / self.sequences
        local, remote = self.local * here * length, self.remote * (self.sequences - here) * length
        both = self.shared * min(local, remote)
        local, remote = local + both, remote + both
        dense = (self.dense * lanes + self.row * self.sequences) * (
            1.0 if fused or here == self.sequences else self.first
        )
        if here == self.sequences:
            return local, 0.0, 0.0, dense + local
        remote += self.call * lanes
        fixed = self.fixed + (self.beside if here else 0.0)
        alone = dense / lanes + max(local / lanes, fixed + remote / lanes)
        if lanes == 1:
            return local, remote, fixed + remote, alone
        return local, remote, lanes * fixed + remote, max((dense + local) / self.replicas, remote, alone)

    def step(self, chooser: Chooser) -> float:
        """One step: a batch in each lane. Returns its seconds."""
        lanes, fused = chooser.lanes, chooser.fused
        local, remote, answered, seconds = self.times(self.here, lanes, fused)
        moving = self.moving > 0
        ran = (lanes, round(chooser.share * self.sequences) / self.sequences, fused)
        self.changes += ran != self.ran
        self.ran = ran
        self.tokens += self.grows
        for _ in range(lanes):
            wobble = 1 + self.noise * self.rng.uniform(-1, 1)
            chooser.completed(
                MeasuredBatch(
                    lanes, fused, self.here * self.tokens / lanes, (self.sequences - self.here) * self.tokens / lanes,
                    local * wobble / lanes, remote * wobble / lanes,
                    (max(answered, local) if answered else 0.0) / lanes, max(0.0, answered - local) / lanes,
                    seconds * wobble * (2 if moving else 1) / lanes, self.sequences / lanes, self.sequences,
                ),
                moving,
            )  # fmt: skip
        self._move(chooser.share)
        return seconds

    def _move(self, share: float) -> None:
        if self.moving:
            self.moving -= 1
            if self.moving == 0:
                self.here += self.towards
            return
        if self.moves(share):
            self.towards = 1 if share * self.sequences > self.here else -1
            self.moving = self.slow

    def moves(self, share: float) -> bool:
        """Whether sequences are moving, or will be."""
        off = share * self.sequences - self.here
        return self.moving > 0 or (abs(off) > 0.6 and not (off > 0 and self.here >= self.most))

    def now(self) -> float:
        """Seconds of a step as it runs now."""
        return self.times(self.here, self.ran[0], self.ran[2])[3]

    def best(self, most_lanes: int = 1, orders: tuple[bool, ...] = (True,)) -> float:
        """Seconds of a step at the best fixed choice."""
        return min(
            self.times(here, lanes, fused)[3]
            for here in range(min(self.most, self.sequences) + 1)
            for lanes in range(1, min(most_lanes, self.sequences) + 1)
            for fused in orders
        )

    def run(self, chooser: Chooser, steps: int) -> list[float]:
        return [self.step(chooser) for _ in range(steps)]
