"""Ports of a rig at which something goes wrong at chosen messages."""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from engine_rig import BytesPort

from lamina_protocols.messages.messages import Attended, Reply, Request
from lamina_workers.attention_worker.attention_worker import AttentionWorker


class FaultyPorts:
    """Makes the ports of a rig. At the messages `at` something `happens`, before the message reaches its worker: an
    error is raised, a function is called with the port. Messages are counted from 1 over all ports together, those that
    `counts` picks: its types, or those of which it is true. `struck` has the ports, in the order of what happened.
    """

    def __init__(
        self,
        at: int | Container[int],
        happens: Exception | Callable[[BytesPort], None],
        counts: type | tuple[type, ...] | Callable[[Request], bool] = object,
    ) -> None:
        self._at = (at,) if isinstance(at, int) else at
        self._happens = happens
        self._counts = counts
        self.seen = 0
        self.struck: list[BytesPort] = []

    def __call__(self, worker: AttentionWorker) -> BytesPort:
        port = BytesPort(worker, lambda request: self._before(port, request))
        return port

    def _before(self, port: BytesPort, request: Request) -> None:
        if isinstance(self._counts, type | tuple):
            counts = isinstance(request, self._counts)
        else:
            counts = self._counts(request)
        self.seen += counts
        if counts and self.seen in self._at:
            self.struck.append(port)
            if isinstance(self._happens, Exception):
                raise self._happens
            self._happens(port)


class SpoiltPorts:
    """Makes the ports of a rig. While this is `on`, the vectors that `which` picks of an answer are not numbers."""

    def __init__(self, which: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._which = which
        self.on = False

    def __call__(self, worker: AttentionWorker) -> BytesPort:
        return BytesPort(worker, bend=self._bend)

    def _bend(self, reply: Reply) -> Reply:
        if self.on and isinstance(reply, Attended):
            self._which(reply.out)[:] = torch.nan
        return reply
