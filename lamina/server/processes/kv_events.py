"""What the engines keep in their prefix caches, published over ZeroMQ in vLLM's format, for routers such as llm-d's and
Dynamo's.

A message has three frames: the topic `kv@NAME@MODEL`, a number that grows by 1, and a batch of events in msgpack:
`[time, [event, ...], rank]`, each event a map whose `type` is BlockStored, BlockRemoved or AllBlocksCleared (vLLM 0.24
and later, vllm/distributed/kv_events.py). Each model has a port of its own, and numbers of its own. A subscriber that
missed a number sends the first one it wants to the replay port, as 8 bytes; it gets what is kept, then the number -1.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgpack

from lamina.errors import InvalidRequest
from lamina.kv.prefix_nodes import BlocksCleared, BlocksRemoved, BlocksStored, PrefixEvent, PrefixSink

logger = logging.getLogger("lamina")

KEPT = 10_000  # batches kept for replay, vLLM's number
KEPT_BYTES = 64 << 20  # of them together, for each model
_END = (-1).to_bytes(8, "big", signed=True)
_QUEUED = 10_000  # batches for a subscriber that does not read; then it misses some
_SUBSCRIPTIONS = 64  # of one connection: the topic is one of its model's port, and libzmq keeps whatever is asked for
_ASKING = 64  # subscriptions that wait to be counted, of one connection
_SO_COOKIE = 57  # of Linux: the number of a socket, which no other ever has; the module `socket` does not name it
_REPLAYS = 8  # clients of a model that get a replay at a time
_REPLAY_QUEUED = 64  # batches for a client that does not read; the others follow as it reads
_STALLED_S = 5.0  # seconds without reading after which it gets no more
_PAUSE_MS = 5  # between two looks at clients that had no room
_LARGEST_REQUEST = 64  # bytes of a request for replay, or of a subscription, unless the topic is longer
_TOGETHER = 512  # events in a batch
_MEDIUM = "CPU"


@dataclass(slots=True)
class _Replay:
    """A replay under way: the next number that its client wants, and since when it has got none."""

    wanted: int
    since: float


@dataclass(eq=False)
class _Stream:
    """The messages of one model, and its sockets."""

    topic: bytes
    port: int
    events: Any
    replay: Any
    number: int = 0
    kept: deque[tuple[int, bytes]] = field(default_factory=deque)
    size: int = 0  # bytes of `kept`
    replays: dict[bytes, _Replay] = field(default_factory=dict)  # by client
    subscriptions: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    """The number of each connection and of its subscriptions, by its descriptor: a later one may get the same."""

    def publish(self, payload: bytes) -> None:
        """Send a batch, and keep it for replay."""
        self.events.send_multipart((self.topic, self.number.to_bytes(8, "big"), payload))
        self.kept.append((self.number, payload))
        self.number += 1
        self.size += len(payload)
        while len(self.kept) > KEPT or (self.size > KEPT_BYTES and len(self.kept) > 1):
            self.size -= len(self.kept.popleft()[1])

    def subscribed(self, frame: Any) -> None:
        """Count a subscription. A connection that makes too many is shut, which libzmq has no limit for."""
        import zmq

        if not frame.bytes.startswith(b"\1"):
            return  # it has ended
        with suppress(OSError, zmq.ZMQError):  # the client has gone
            connection = socket.socket(fileno=frame.get(zmq.SRCFD))
            try:
                self._count(connection)
            finally:
                connection.detach()  # it is libzmq's

    def _count(self, connection: socket.socket) -> None:
        if connection.getsockname()[1] != self.port:
            return  # the client has gone, and something else has got its descriptor
        number = connection.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
        counted, count = self.subscriptions.get(connection.fileno(), (number, 0))
        count = count + 1 if counted == number else 1
        self.subscriptions[connection.fileno()] = number, count
        if count > _SUBSCRIPTIONS:
            connection.shutdown(socket.SHUT_RDWR)

    def asked(self, frames: Sequence[bytes], now: float) -> None:
        """Begin a replay. What is no request for one is ignored, and so is one too many, also of one client."""
        if len(frames) == 3 and len(frames[2]) == 8 and len(self.replays) < _REPLAYS:
            self.replays.setdefault(frames[0], _Replay(int.from_bytes(frames[2], "big"), now))

    def go_on(self, now: float) -> None:
        """Send of each replay what its client has room for. One that reads nothing gets no more."""
        for client, replay in list(self.replays.items()):
            try:
                self._send(client, replay, now)
                over = True
            except BlockingIOError:
                over = now - replay.since > _STALLED_S
            except OSError:  # the client has gone
                over = True
            if over:
                del self.replays[client]

    def _send(self, client: bytes, replay: _Replay, now: float) -> None:
        """Raises BlockingIOError where the client has no room, OSError where it has gone."""
        for number, payload in self.kept:
            if number >= replay.wanted:
                self._put(client, number.to_bytes(8, "big"), payload)
                replay.wanted, replay.since = number + 1, now
        self._put(client, _END, b"")

    def _put(self, client: bytes, number: bytes, payload: bytes) -> None:
        import zmq

        try:
            self.replay.send_multipart((client, b"", number, payload), zmq.NOBLOCK)
        except zmq.Again:
            raise BlockingIOError from None
        except zmq.ZMQError as error:
            raise OSError(str(error)) from None


class KvEventPublisher:
    """Publishes the events of `models`, the first at `endpoint` (tcp://HOST:PORT), each other one a port higher; so it
    is with `replay`. Raises InvalidRequest where an address cannot be bound, or pyzmq is not installed."""

    def __init__(self, endpoint: str, replay: str | None, models: Sequence[str], name: str) -> None:
        try:
            import zmq
        except ImportError as error:
            raise InvalidRequest("kv_events needs pyzmq, which is not installed: pip install pyzmq") from error
        self._zmq = zmq
        self._context = zmq.Context()
        self._reading, self._writing = os.pipe()  # wakes the thread; sockets belong to it alone
        os.set_blocking(self._writing, False)
        self._waiting: deque[tuple[str, PrefixEvent]] = deque()
        self._closed = False
        try:
            self._streams: Mapping[str, _Stream] = {
                model: self._stream(
                    f"kv@{name}@{model}".encode(),
                    _later(endpoint, number),
                    None if replay is None else _later(replay, number),
                )
                for number, model in enumerate(models)
            }
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, name="lamina-kv-events", daemon=True)
        self._thread.start()

    def sink(self, model: str) -> PrefixSink:
        """Takes the events of a model's engine. For any thread."""
        return partial(self._put, model)

    def close(self) -> None:
        """Send what waits, and end."""
        self._closed = True
        self._wake()
        self._thread.join(5.0)

    def _stream(self, topic: bytes, address: str, replay: str | None) -> _Stream:
        zmq, largest = self._zmq, max(_LARGEST_REQUEST, len(topic) + 1)
        # Verbose: it tells of each subscription, also of those that others have made.
        subscribed = {zmq.SNDHWM: _QUEUED, zmq.RCVHWM: _ASKING, zmq.XPUB_VERBOSE: 1, zmq.MAXMSGSIZE: largest}
        events = self._bound(zmq.XPUB, address, subscribed)
        # Mandatory: it says where a client has no room.
        replayed = {zmq.SNDHWM: _REPLAY_QUEUED, zmq.RCVHWM: _REPLAY_QUEUED, zmq.ROUTER_MANDATORY: 1}
        replayed[zmq.MAXMSGSIZE] = _LARGEST_REQUEST
        replays = None if replay is None else self._bound(zmq.ROUTER, replay, replayed)
        return _Stream(topic, int(address.rpartition(":")[2]), events, replays)

    def _bound(self, kind: int, address: str, options: Mapping[int, int]) -> Any:
        bound = self._context.socket(kind)
        for option, value in options.items():
            bound.setsockopt(option, value)
        bound.setsockopt(self._zmq.LINGER, 1000)  # ms
        try:
            bound.bind(address)
        except self._zmq.ZMQError as error:
            raise InvalidRequest(f"kv_events cannot listen at {address}: {error}; choose another address") from error
        return bound

    def _put(self, model: str, event: PrefixEvent) -> bool:
        self._waiting.append((model, event))
        self._wake()
        return not self._closed

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it is awake
            os.write(self._writing, b"\0")

    def _run(self) -> None:
        poller = self._zmq.Poller()
        poller.register(self._reading, self._zmq.POLLIN)
        replaying_at = {stream.replay: stream for stream in self._streams.values() if stream.replay is not None}
        publishing_at = {stream.events: stream for stream in self._streams.values()}
        for bound in (*replaying_at, *publishing_at):
            poller.register(bound, self._zmq.POLLIN)
        while not self._closed or self._waiting:
            replaying = any(stream.replays for stream in self._streams.values())
            for ready, _ in poller.poll(0 if self._waiting else _PAUSE_MS if replaying else None):
                if ready == self._reading:
                    os.read(self._reading, 1 << 16)
                elif ready in publishing_at:
                    publishing_at[ready].subscribed(ready.recv(copy=False))
                else:
                    replaying_at[ready].asked(ready.recv_multipart(), time.monotonic())
            self._publish()
            for stream in replaying_at.values():
                stream.go_on(time.monotonic())
        self._context.destroy()

    def _publish(self) -> None:
        """Publish what waits: the events of one model that came together are one batch."""
        batches: dict[str, list[dict[str, Any]]] = {}
        for _ in range(min(len(self._waiting), _TOGETHER)):
            model, event = self._waiting.popleft()
            batches.setdefault(model, []).append(wire_event(event))
        for model, events in batches.items():
            self._streams[model].publish(msgpack.packb([time.time(), events, 0]))


def wire_event(event: PrefixEvent) -> dict[str, Any]:
    """An event as vLLM writes it."""
    match event:
        case BlocksStored():
            return {
                "type": "BlockStored",
                "block_hashes": list(event.hashes),
                "parent_block_hash": event.parent,
                "token_ids": list(event.tokens),
                "block_size": event.block,
                "lora_id": None,
                "medium": _MEDIUM,
                "lora_name": None,
                "extra_keys": [[event.key] if event.key else None] * len(event.hashes),
            }
        case BlocksRemoved():
            return {"type": "BlockRemoved", "block_hashes": list(event.hashes), "medium": _MEDIUM}
        case BlocksCleared():
            return {"type": "AllBlocksCleared"}


def _later(endpoint: str, number: int) -> str:
    """The endpoint so many ports higher."""
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + number}"
