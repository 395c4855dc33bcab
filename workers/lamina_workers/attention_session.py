"""One engine's session at an attention worker: from its handshake to the end of its data channel.

Knows the worker and a channel, but neither gRPC nor sockets. The worker lives and dies with the session, on the thread
that calls `run`; everything else may be called from any thread.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from lamina_protocols import codec
from lamina_protocols.channels import Channel, ChannelClosed
from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_protocols.messages import (
    Announcement,
    Exchange,
    Fault,
    Fetch,
    Fresh,
    HolderConfig,
    Query,
    answered,
)
from lamina_workers.attention_port import LocalAttention
from lamina_workers.attention_worker import AttentionWorker, Counters

logger = logging.getLogger("lamina")

FAREWELL = (0, 0)  # the epoch and batch of a Fault that ends the session; no batch has them
_REQUESTS = (Announcement, Query, Fresh, Exchange, Fetch)


@dataclass(slots=True)
class Traffic:
    """What a session has moved and worked: bytes, and seconds spent on messages."""

    bytes_in: int = 0
    bytes_out: int = 0
    busy: float = 0.0


class Session:
    """`id` names it; `secret` opens its socket channels; `clock` gives seconds."""

    def __init__(self, id_: str, secret: bytes, model: str, lease: float, clock: Callable[[], float]) -> None:
        self.id = id_
        self.model = model
        self.opened_at = clock()
        self.built: Future[None] = Future()  # done when the worker stands, or could not be made
        self.channel_kind = ""
        self.traffic = Traffic()
        self._secret = secret
        self._lease = lease
        self._clock = clock
        self._heard_at = self.opened_at
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._arrived: queue.SimpleQueue[Channel | None] = queue.SimpleQueue()
        self._end_reason = ""
        self._worker: AttentionWorker | None = None

    @property
    def ended(self) -> str:
        """Why the session ended; empty while it lives."""
        return self._end_reason

    @property
    def worker(self) -> AttentionWorker | None:
        """The worker, while it stands. For reading counts only: it belongs to the thread in `run`."""
        return self._worker

    def heard(self) -> None:
        """The engine gave a sign of life."""
        self._heard_at = self._clock()

    def overdue(self) -> bool:
        """Whether the lease ran out."""
        return self._clock() - self._heard_at > self._lease

    def admits(self, secret: bytes) -> bool:
        """Whether the secret is this session's, which has no channel yet."""
        return hmac.compare_digest(secret, self._secret) and self._channel is None and not self._end_reason

    def attach(self, channel: Channel, kind: str) -> None:
        """Take the data channel. Raises ProtocolError where there is one already, or the session is over."""
        with self._lock:
            if self._channel is not None or self._end_reason:
                raise ProtocolError(f"session {self.id:.8} " + (self._end_reason or "has a data channel already"))
            self._channel, self.channel_kind = channel, kind
        self.heard()
        logger.info("session %.8s: data over %s", self.id, kind)
        self._arrived.put(channel)

    def end(self, reason: str) -> None:
        """End the session, whoever finds first that it is over; what waits for its channel wakes."""
        with self._lock:
            if self._end_reason:
                return
            self._end_reason = reason
            channel = self._channel
        logger.info("session %.8s ended: %s", self.id, reason)
        self._arrived.put(None)
        if channel is not None:
            channel.close()

    def run(self, config: HolderConfig, threads: int, name: str) -> Counters:
        """Build the worker, serve the session until it ends, let the worker go. What the worker did."""
        if not self.built.set_running_or_notify_cancel():
            self.end("the engine did not wait")
            return Counters()
        try:
            self._worker = worker = AttentionWorker(config, threads)
        except Exception as error:  # noqa: BLE001  # whatever it is, the engine is told and the server lives on
            self.end(f"no worker could be made: {error}")
            self.built.set_exception(error)
            return Counters()
        self.built.set_result(None)
        try:
            channel = self._arrived.get()
            if channel is not None:
                self._serve(channel, LocalAttention(worker, name))
        finally:
            self._worker = None
        return worker.counters

    def _serve(self, channel: Channel, port: LocalAttention) -> None:
        try:
            while True:
                self._step(channel, port)
        except ChannelClosed as error:
            self.end(str(error))
        except ProtocolError as error:
            self._part(channel, str(error))
        except Exception as error:  # the engine learns its kind, the log the rest
            logger.exception("session %.8s failed", self.id)
            self._part(channel, type(error).__name__)

    def _step(self, channel: Channel, port: LocalAttention) -> None:
        """One message: handle, answer, and only then do what was put off."""
        frame = channel.receive()
        begun = self._clock()
        self._heard_at = begun
        request = codec.decode(frame)
        if not isinstance(request, _REQUESTS):
            raise ProtocolError(f"an engine sends requests, got a {type(request).__name__}")
        port.send(request)
        if answered(request):
            channel.send(codec.encode(port.receive()))
        port.settle()
        traffic = self.traffic
        traffic.busy += self._clock() - begun
        traffic.bytes_in, traffic.bytes_out = channel.bytes_received, channel.bytes_sent

    def _part(self, channel: Channel, reason: str) -> None:
        """Tell the engine why, then end."""
        with contextlib.suppress(LaminaError):
            channel.send(codec.encode(Fault(*FAREWELL, reason)))
        self.end(reason)
