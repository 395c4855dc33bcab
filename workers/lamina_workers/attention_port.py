"""The seam to one holder: messages go in, replies come out, in order. Knows nothing of what is in them.

`LocalAttention` calls an attention worker in this process and copies nothing. A port over a transport has the same
two verbs, so the model worker cannot tell which it has.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol, TypeVar

from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_protocols.messages import Announced, Attended, Fault, Fresh, Reply, Request
from lamina_workers.attention_worker import AttentionWorker
from lamina_workers.errors import HolderFault

R = TypeVar("R", Announced, Attended)


class AttentionPort(Protocol):
    """One holder. Every `Announcement` and `Query` gets one reply, in order; a `Fresh` gets none."""

    def send(self, request: Request) -> None:
        """Hand over one message, at once where there is a transport; its tensors may be read until the next reply."""

    def receive(self) -> Reply:
        """The next reply. Whatever went wrong at the holder since the last one comes as a `Fault` in its place."""


def receive(port: AttentionPort, kind: type[R], epoch: int, batch: int, layer: int | None = None) -> R:
    """The reply of that kind to that batch (and layer); what is left of batches that a fault ended is skipped.

    Raises HolderFault for a fault, for any other reply, and where the port itself fails.
    """
    try:
        reply = port.receive()
        while (reply.epoch, reply.batch) < (epoch, batch):
            reply = port.receive()
    except ProtocolError as error:
        raise HolderFault(str(error)) from error
    if isinstance(reply, Fault):
        raise HolderFault(reply.reason)
    same = (reply.epoch, reply.batch) == (epoch, batch) and layer == getattr(reply, "layer", None)
    if not isinstance(reply, kind) or not same:
        raise HolderFault(f"a {kind.__name__} for batch {batch}, layer {layer} was due, got {reply!r:.200}")
    return reply


class LocalAttention:
    """The port to an attention worker in this process. A message is handled while it is sent."""

    def __init__(self, worker: AttentionWorker) -> None:
        self._worker = worker
        self._replies: deque[Reply] = deque()
        self._failure = ""  # why a message since the last reply could not be handled

    def send(self, request: Request) -> None:
        """Let the worker handle the message; keep its reply, or its error as a `Fault`."""
        reply: Reply | None = None
        try:
            reply = self._worker.handle(request)
        except (LaminaError, ValueError) as error:
            self._failure = self._failure or f"{type(error).__name__}: {error}"
        if isinstance(request, Fresh):
            return
        if self._failure or reply is None:
            reply = Fault(request.epoch, request.batch, self._failure or "no reply")
            self._failure = ""
        self._replies.append(reply)

    def receive(self) -> Reply:
        """The oldest reply that was not taken yet. Raises ProtocolError where none is due."""
        if not self._replies:
            raise ProtocolError("no reply is due: nothing that has one was sent")
        return self._replies.popleft()
