"""Runs that wait for replies: suspended, so that one thread can drive several."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from lamina_protocols.channels.channels import Channel

R = TypeVar("R")


class Replying(Protocol):
    """A source of replies to batches: a port's `Replies`, a process that computes for this one, or a feeder of runs."""

    @property
    def channel(self) -> Channel | None:
        """What replies come over; None where they come from this process."""

    def ready(self, batch: int) -> bool:
        """Whether a reply to that batch is there, or will never come."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a run is suspended: a reply of `replies` to `batch` is not there yet. A run that is resumed earlier waits."""

    replies: Replying
    batch: int

    def over(self) -> bool:
        """Whether the run would go on at once."""
        return self.replies.ready(self.batch)


def result(run: Generator[Waiting, None, R]) -> R:
    """What a run returns, each of its waits waited out."""
    try:
        while True:
            next(run)
    except StopIteration as stop:
        returned: R = stop.value
        return returned


Suspended = Generator[Waiting, None, torch.Tensor]
