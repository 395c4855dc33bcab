"""The link between the HTTP process and an engine's: commands one way, events the other, over a Unix socket.

A connection carries one direction, so each client has two, whose first frames have the same client name. Frames are
those of the data channels, with packed messages as payload. A client sends a secret first; the socket is in a folder
that only its owner can enter.

`EngineLink` is the HTTP process's end for one model: a thread of its own connects to the engine that the supervisor
named last, and connects again when the link breaks. `EngineListener` is the engine's end.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgpack

from lamina.client.input_processor import InputProcessor
from lamina.client.interface import EngineClient
from lamina.client.remote import EngineHost, RemoteEngine, fetch
from lamina.errors import EngineError, LaminaError
from lamina.kv.prefix_nodes import BlocksCleared, PrefixSink
from lamina.messages.engine_messages import (
    Command,
    Event,
    Stopped,
    pack_commands,
    pack_events,
    unpack,
    unpack_commands,
    unpack_events,
)
from lamina.server.frontend import Frontend, Served
from lamina.text.tokenizer import Tokenizer, read_json
from lamina_protocols.channels.channels import Channel, ChannelClosed
from lamina_protocols.channels.sockets import Listener, connect_unix, listen_unix
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames.fields import field_of
from lamina_protocols.frames.frames import PREFIX_SIZE, Prefix, pack_prefix, read_prefix

if TYPE_CHECKING:
    from lamina.text.structured_output import Grammars

logger = logging.getLogger("lamina")

MAX_FRAME = 64 << 20  # bytes: 16 Mi tokens of prompts in one frame
_TAG = 32767  # of a frame with messages
_POLL = 0.5  # seconds
_COLLECT = 0.0003  # seconds from the first of a batch's outputs until all have come
# seconds. An engine that dies closes its sockets, so this is only for one that is busy: while it loads its grammars
# beside other load, none of its threads answers for some seconds.
_CONNECT = 60.0
_PAIRING = 10.0  # seconds for which the first connection of a client waits for the second


class _Hello(NamedTuple):
    """The first message on a connection."""

    direction: Literal["commands", "events"]
    client: str


_HELLO = field_of(_Hello)


def frame(payload: bytes) -> list[bytes | memoryview]:
    """A frame with packed messages, as buffers."""
    return [pack_prefix(Prefix(_TAG, 0, len(payload))), payload]


def payload(frame: memoryview) -> memoryview:
    """The packed messages of a frame. Raises ProtocolError."""
    prefix = read_prefix(frame, MAX_FRAME)
    if prefix.tag != _TAG or prefix.header or prefix.frame != len(frame):
        raise ProtocolError(f"frame of {len(frame)} bytes with tag {prefix.tag} has no messages")
    return frame[PREFIX_SIZE:]


class SocketWire:
    """A connection to the engine behind an `EngineListener`: a `client.interface.Wire`. Raises EngineError."""

    def __init__(self, path: str, secret: bytes, client: str) -> None:
        self._channels: list[Channel] = []
        try:
            for hello in (_Hello("commands", client), _Hello("events", client)):
                channel = connect_unix(path, secret, _CONNECT, MAX_FRAME)
                self._channels.append(channel)
                channel.send(frame(msgpack.packb(hello)))
        except ChannelClosed as error:
            self.close()
            raise EngineError(f"the engine cannot be reached: {error}") from error
        self._commands, self._events = self._channels

    def ask(self, commands: Sequence[Command]) -> None:
        try:
            for packed in pack_commands(commands):
                self._commands.send(frame(packed))
        except LaminaError as error:
            raise EngineError(f"the engine's process is gone: {error}") from error

    def events(self) -> Sequence[Event]:
        try:
            received = self._events.receive()
        except LaminaError as error:
            raise EngineError(f"the engine's process is gone: {error}") from error
        return unpack_events(payload(received))  # what is malformed is no lost connection: nothing connects again

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


class EngineListener:
    """Serves `engine` to clients that connect to the socket `path` with the secret. The requests of a client that is
    gone are ended."""

    def __init__(self, path: str, secret: bytes, engine: EngineClient, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._secret = secret
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[str, Channel, float]] = {}  # by client: the direction that came first, and when
        self._listener = Listener(
            listen_unix(path), self._admit, lambda channel, _: self._accept(channel), max_frame=MAX_FRAME
        )

    def close(self) -> None:
        """Accept no more clients. Connected clients stay until they leave, or the engine stops."""
        self._listener.close()
        with self._lock:
            for _, channel, _ in self._waiting.values():
                channel.close()
            self._waiting.clear()

    def _admit(self, secret: bytes) -> bool:
        return secret == self._secret

    def _accept(self, channel: Channel) -> None:
        """Take a connection, on a thread of its own. Its client is served once both of its connections are there."""
        try:
            direction, client = _HELLO.unpack(unpack(payload(channel.receive(_PAIRING))))
        except (LaminaError, TimeoutError):
            channel.close()
            return
        now = self._clock()
        with self._lock:
            for name in [name for name, (_, _, since) in self._waiting.items() if since < now - _PAIRING]:
                self._waiting.pop(name)[1].close()
            other = self._waiting.pop(client, None)
            if other is None:
                self._waiting[client] = (direction, channel, now)
                return
        pair = dict([(direction, channel), other[:2]])
        if pair.keys() != {"commands", "events"}:
            channel.close()
            other[1].close()
            return
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        host = EngineHost(self._engine, events.put, self._clock)
        departure = threading.Event()
        for serve, args in ((self._receive, (pair["commands"], host)), (self._send, (pair["events"], host, events))):
            threading.Thread(target=serve, args=(*args, departure), name="lamina-link", daemon=True).start()

    def _receive(self, channel: Channel, host: EngineHost, departure: threading.Event) -> None:
        try:
            while not departure.is_set():
                host.ask(unpack_commands(payload(channel.receive())))
        except ProtocolError as error:
            logger.error("a client of the engine sent what it must not: %s", error)
        except LaminaError as error:
            logger.info("a client of the engine is gone: %s", error)
        except Exception:  # a malformed command: this client is not served any more
            logger.exception("a client of the engine sent what it must not")
        finally:
            departure.set()
            host.abandon()
            channel.close()

    def _send(
        self, channel: Channel, host: EngineHost, events: queue.SimpleQueue[Event], departure: threading.Event
    ) -> None:
        try:
            while not departure.is_set():
                host.report()
                if fetched := fetch(events, _POLL, _COLLECT):
                    channel.send(frame(pack_events(fetched)))
                elif not self._engine.alive:
                    channel.send(frame(pack_events([Stopped("the engine has stopped")])))
                    return
        except LaminaError:  # the thread that takes commands notices it too
            departure.set()
        finally:
            channel.close()


_INTERVAL = 0.25  # seconds between two checks of the link, and between two attempts to connect


class EngineLink:
    """Keeps `frontend` connected to the engine that was named last. `connected` is called after each success; `kept`
    gets what happens in the prefix cache."""

    def __init__(
        self, frontend: Frontend, secret: bytes, connected: Callable[[], None], kept: PrefixSink | None = None
    ) -> None:
        self._sink = kept
        self._frontend = frontend
        self._secret = secret
        self._connected = connected
        self._lock = threading.Lock()
        self._facts: dict[str, Any] | None = None  # of the engine to connect to
        self._linked: Mapping[str, Any] | None = None  # of the engine connected to
        self._changed = threading.Event()
        self._wire: SocketWire | None = None
        self._engine: RemoteEngine | None = None
        self._inputs: InputProcessor | None = None
        self._tokenizers: dict[str, Tokenizer] = {}  # by folder: a restarted engine has the same
        self._grammars: dict[Tokenizer, Grammars] = {}
        threading.Thread(target=self._keep, name="lamina-link", daemon=True).start()

    def ready(self, facts: dict[str, Any]) -> None:
        with self._lock:
            self._facts = facts
        self._changed.set()

    def possible(self, tokens: int) -> None:
        with self._lock:
            if self._facts is not None:
                self._facts["possible"] = tokens
            if self._inputs is not None:
                self._inputs.has_room(tokens)

    def dead(self, why: str) -> None:
        with self._lock:
            self._facts = None
        self._frontend.lost(why)
        self._gone()

    def begins(self, loading: str) -> None:
        self._frontend.begins(loading)

    def unloaded(self, why: str) -> None:
        """The engine has ended, and none is started before the model is loaded again."""
        with self._lock:
            self._facts = None
        self._frontend.unloaded(why)
        self._gone()

    def _gone(self) -> None:
        if self._sink is not None:
            self._sink(BlocksCleared())
        self._changed.set()

    def _keep(self) -> None:
        while True:
            self._changed.wait(_INTERVAL)
            self._changed.clear()
            with self._lock:
                facts = self._facts
            if facts is self._linked and (self._engine is None or self._engine.alive):
                continue
            self._cut()
            if facts is not None:
                self._link(facts)

    def _cut(self) -> None:
        """Close the link. Requests under way wait for the next engine, for as long as `recovery_timeout` allows."""
        if self._wire is not None:
            self._wire.close()
        self._wire, self._linked = None, None

    def _link(self, facts: Mapping[str, Any]) -> None:
        """Try to connect once. An error goes to the frontend, and the next check tries again."""
        name = secrets.token_hex(8)
        try:
            tokenizer = self._tokenizer(facts["folder"])
            self._wire = SocketWire(facts["socket"], self._secret, name)
        except LaminaError as error:
            self._failed(facts, str(error))
            return
        if self._engine is None or not self._engine.rejoin(self._wire):
            self._engine = RemoteEngine(self._wire, time.monotonic, patience=facts.get("patience", 0.0))
            if self._sink is not None:
                self._engine.prefix_events(self._sink)
        inputs = InputProcessor(
            tokenizer,
            facts["context"],
            facts["possible"],
            facts["vocab_size"],
            read_json(Path(facts["folder"]) / "generation_config.json"),
            prefix=f"{name[:6]}-",
            grammars=self._grammars.get(tokenizer),
        )
        self._grammars[tokenizer] = inputs.grammars
        inputs.grammars.load()  # before the first request comes: later it would hold up others
        self._linked = facts
        with self._lock:
            self._inputs = inputs
            inputs.has_room(facts["possible"])  # it may have changed meanwhile
            if self._facts is facts:  # else the engine died meanwhile, and the frontend was notified
                served = Served(self._engine, tokenizer, inputs, facts.get("fingerprint"))
                self._frontend.ready(served, facts["restarts"])
                self._connected()

    def _failed(self, facts: Mapping[str, Any], why: str) -> None:
        with self._lock:
            if self._facts is facts:
                logger.info("%s", why)  # no alarm: an engine that is unloaded may be gone before this process hears it
                self._frontend.lost(why)

    def _tokenizer(self, folder: str) -> Tokenizer:
        if folder not in self._tokenizers:
            self._tokenizers[folder] = Tokenizer(folder)
        return self._tokenizers[folder]
