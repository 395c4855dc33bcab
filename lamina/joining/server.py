"""The server's side: a listener to which machines come, the operator's decisions, and the attention workers of accepted
machines as `WorkerAddress`es.

Each connection has a thread. What has shown neither a code nor a key is bounded: `_MOST_UNKNOWN` connections, of which
the oldest makes room, a few seconds and 16 KiB each.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import InvalidRequest, LaminaError
from lamina.joining import pairing
from lamina.joining.book import ID_SIZE, KEY_SIZE, WAITING_S, MachineBook, NoRoom
from lamina.joining.discovery import Announcement, NoDiscovery
from lamina.joining.records import ServerRecords
from lamina.joining.stream import HELLO_S, SILENT_S, JoinListener, MessageStream, host_name, reachable
from lamina_protocols.channels.channels import ChannelClosed, Credentials, certificate_bytes, join_address
from lamina_protocols.channels.versions import PREVIOUS, PROTOCOL_VERSION, VersionMismatch, check_neighbours
from lamina_protocols.errors import ProtocolError

logger = logging.getLogger("lamina")

_LOOK_S = 0.5  # between two looks for orders
_MOST_UNKNOWN = 16
_PAUSE_S = 0.02  # between two connections, where a handshake takes a millisecond of a core, and between two messages
_MOST_TOKEN, _MOST_CA = 512, 8 << 10  # characters


class JoinEvents(Protocol):
    """Is notified, on threads of the server's."""

    def joined(self, worker: WorkerAddress) -> None:
        """An accepted machine's worker can be connected to."""

    def left(self, name: str) -> None:
        """A worker is gone."""

    def leaving(self, name: str) -> None:
        """A worker wants to go: what it holds should move elsewhere, then `released` lets it."""

    def changed(self, machines: list[dict[str, Any]]) -> None:
        """The machines as the operator sees them."""

    def said(self, message: str) -> None:
        """Something for the operator to read."""


@dataclass(eq=False, slots=True)
class _Link:
    """A machine's connection. `confirmed`: the people at the machine have agreed, too."""

    stream: MessageStream
    orders: queue.SimpleQueue[tuple[str, dict[str, Any]]] = field(default_factory=queue.SimpleQueue)
    confirmed: bool = False
    heard: float = 0.0  # when, of the monotonic clock


class JoinServer:
    """Takes machines at `host` and `port` (0: any) from `start` to `close`; `folder` is where it remembers them;
    `options` are those with which `lamina joining` finds this server. Raises InvalidRequest where it cannot."""

    def __init__(self, host: str, port: int, folder: Path, events: JoinEvents, options: str = "") -> None:
        self._host, self._events, self._options = host, events, options
        self._records = ServerRecords(folder)
        self._book = MachineBook(self._records.machines)
        self._lock = threading.Lock()
        self._links: dict[str, _Link] = {}  # by machine
        self._unknown: list[MessageStream] = []
        self._closed = False
        self._announcement: Announcement | None = None
        credentials = self._records.credentials
        try:
            self._certificate = certificate_bytes(credentials.cert)
            self._listener = JoinListener(host, port, credentials, self._certificate)
        except (OSError, ValueError) as error:
            self._records.close()
            raise InvalidRequest(
                f"cannot take machines at {host}:{port}: {error}; --join-address chooses another place, port 0 a free "
                f"one, and {folder} has the certificate"
            ) from error

    @property
    def address(self) -> str:
        """Where it listens."""
        return join_address(self._host, self._listener.port)

    @property
    def machines(self) -> list[dict[str, Any]]:
        """The machines as the operator sees them."""
        with self._lock:
            return [machine.shown for machine in self._book.machines]

    def start(self) -> None:
        """Take machines from now on."""
        threading.Thread(target=self._accept, name="lamina-joining", daemon=True).start()
        threading.Thread(target=self._announce, name="lamina-announcing", daemon=True).start()

    def close(self) -> None:
        """Take no more; the machines come back to the next server with this folder. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            streams = [*self._unknown, *(link.stream for link in self._links.values())]
        self._listener.close()
        for stream in streams:
            stream.close()
        if self._announcement is not None:
            self._announcement.close()
        self._records.close()

    def decide(self, id: str, accept: bool) -> None:
        """The operator takes a machine that waits, or no longer wants one. No effect for what is not there. Raises
        InvalidRequest where it cannot be remembered."""
        now = time.time()
        name: str | None = None
        try:
            with self._lock:
                if id not in self._book or (accept and self._book[id].state != "waiting"):
                    return
                link = self._links.get(id)
                if accept:
                    key = secrets.token_bytes(KEY_SIZE)
                    self._book.accept(id, key, now)
                    order: tuple[str, dict[str, Any]] = ("accepted", {"id": id, "key": key.hex()})
                else:
                    name = self._book.lost(id, now)
                    self._book.remove(id)
                    order = ("refused", {"why": "the server's operator does not want this machine"})
                if link is not None:
                    link.orders.put(order)
                self._records.write(self._book.accepted)
        finally:
            self._left(name)

    def lost(self, name: str) -> None:
        """The engine has given a worker up; its machine starts another one. No effect for other workers."""
        with self._lock:
            if (id := self._book.of_worker(name)) is None:
                return
            self._book.lost(id, time.time())
            if (link := self._links.get(id)) is not None:
                link.orders.put(("again", {}))
        self._changed()

    def released(self, name: str) -> None:
        """Nothing that counts is left at a worker that wants to go. No effect for other workers."""
        with self._lock:
            id = self._book.of_worker(name)
            link = None if id is None else self._links.get(id)
        if link is not None:
            link.orders.put(("released", {}))

    # The server's own threads.

    def _announce(self) -> None:
        name = pairing.plain_name(host_name())
        try:
            announcement = Announcement(name, self._host, self._listener.port, pairing.fingerprint(self._certificate))
        except NoDiscovery as error:
            self._events.said(f"{error}; machines join with `lamina join --server HOST:{self._listener.port}`")
            return
        with self._lock:
            self._announcement = announcement
            closed = self._closed
        if closed:
            announcement.close()

    def _accept(self) -> None:
        while (stream := self._listener.accept()) is not None:
            with self._lock:
                self._unknown.append(stream)
                oldest = self._unknown.pop(0) if len(self._unknown) > _MOST_UNKNOWN else None
            if oldest is not None:
                oldest.close()
            threading.Thread(target=self._serve, args=(stream,), name="lamina-machine", daemon=True).start()
            time.sleep(_PAUSE_S)

    def _serve(self, stream: MessageStream) -> None:
        """One connection, from its first byte to its last."""
        try:
            stream.open()
            hello = stream.expect("pair", "resume", seconds=HELLO_S)
            check_neighbours(PROTOCOL_VERSION, hello.get("protocol", PREVIOUS))  # which that one does not name
            if hello["type"] == "pair":
                self._pair(stream, hello)
            else:
                self._resume(stream, hello)
        except (NoRoom, VersionMismatch) as refusal:
            self._refuse(stream, str(refusal))
        except LaminaError as error:  # what comes from outside ends its own connection
            logger.info("a machine at %s: %s", stream.there, error)
        finally:
            self._known(stream)
            stream.close()

    @staticmethod
    def _refuse(stream: MessageStream, why: str) -> None:
        try:
            stream.send("refused", why=why)
        except ChannelClosed as error:
            logger.debug("%s", error)

    def _known(self, stream: MessageStream) -> None:
        """The connection does not count among strangers' any more."""
        with self._lock:
            if stream in self._unknown:
                self._unknown.remove(stream)

    def _pair(self, stream: MessageStream, hello: dict[str, Any]) -> None:
        offer = pairing.read_offer(hello)
        committed = pairing.read_bytes(hello.get("commitment"), pairing.NONCE_SIZE)
        with self._lock:
            self._book.begin_code(stream.there, time.monotonic())
        nonce = secrets.token_bytes(pairing.NONCE_SIZE)
        stream.send("nonce", nonce=nonce.hex(), name=pairing.plain_name(host_name()), you=stream.there)
        revealed = stream.expect("reveal", seconds=HELLO_S).get("nonce")
        theirs = pairing.read_bytes(revealed, pairing.NONCE_SIZE)
        if not pairing.opens(committed, theirs):
            raise ProtocolError("the nonce is not the one that was committed to")
        code = pairing.code(self._certificate, offer, theirs, nonce)
        id, link = secrets.token_hex(ID_SIZE), _Link(stream)
        with self._lock:
            machine = self._book.wait(id, offer, code, stream.there, time.time())
            self._links[id] = link
        self._known(stream)
        self._changed()
        self._events.said(
            f"{machine.name} at {stream.there} asks to join with {offer.memory / 2**30:.1f} GiB. If it shows "
            f"{pairing.spaced(code)}, accept it on the page, or with: lamina joining accept {code}{self._options}"
        )
        self._follow(id, link, time.monotonic() + WAITING_S)

    def _resume(self, stream: MessageStream, hello: dict[str, Any]) -> None:
        with self._lock:
            id = self._book.comes_back(hello.get("id"), hello.get("key"))
            if id is None:
                raise NoRoom("unknown")
            link, before = _Link(stream, confirmed=True), self._links.get(id)
            self._links[id] = link
            name = self._book.lost(id, time.time())
            self._book.connected(id, stream.there, time.time())
        if before is not None:
            before.stream.close()
        self._known(stream)
        self._left(name)
        stream.send("resumed", you=stream.there)
        self._follow(id, link, None)

    def _follow(self, id: str, link: _Link, deadline: float | None) -> None:
        """A machine with a code or a key, until it goes. It is accepted by `deadline`, if there is one."""
        link.heard = time.monotonic()
        try:
            while self._obey(link):
                now = time.monotonic()
                with self._lock:
                    waits = id in self._book and self._book[id].state == "waiting"
                if waits and deadline is not None and now > deadline:
                    self._refuse(link.stream, f"nobody has accepted this machine within {WAITING_S:g} s")
                    return
                if (message := link.stream.receive(_LOOK_S)) is not None:
                    link.heard = now
                    if not self._take(id, link, message, waits):
                        return
                    time.sleep(_PAUSE_S)  # whoever speaks without end has no more than that of a core
                elif now - link.heard > SILENT_S:
                    raise ChannelClosed(f"nothing was heard for {SILENT_S:g} s")
        finally:
            self._gone(id, link)

    def _obey(self, link: _Link) -> bool:
        """Pass on what was decided. Whether the machine stays."""
        while not link.orders.empty():
            kind, fields = link.orders.get_nowait()
            link.stream.send(kind, **fields)
            if kind == "refused":
                return False
        return True

    def _take(self, id: str, link: _Link, message: dict[str, Any], waits: bool) -> bool:
        """Take a machine's message. Whether it stays."""
        kind = message["type"]
        if kind == "bye":
            return False
        if kind == "alive":
            link.stream.send("alive")
        elif kind == "serve" and not waits:
            self._worker(id, link, message)
        elif kind == "left" and not waits:
            self._ended(id, link)
        elif kind == "leaving":
            self._leaving(id, link)
        else:
            raise ProtocolError(f"a message of type {kind!r:.40} was not expected")
        return True

    def _worker(self, id: str, link: _Link, message: dict[str, Any]) -> None:
        """A machine's worker is up. Its address is the one that the machine comes from: it can name no other."""
        port, memory = message.get("port"), pairing.read_memory(message.get("memory"))
        if type(port) is not int or not 0 < port < 65536:
            raise ProtocolError(f"port is {port!r:.40}; allowed are 1 to 65535")
        token, ca = _text(message, "token", _MOST_TOKEN), _text(message, "ca", _MOST_CA)
        link.confirmed = True
        host = link.stream.there
        if why := reachable(host, port):
            link.stream.send("unreachable", why=f"the server cannot connect to {host}:{port}: {why}"[:300])
            return
        address = join_address(host, port)
        with self._lock:
            if id not in self._book or self._links.get(id) is not link:
                return
            before = self._book.lost(id, time.time())
            name = self._book.serves(id, address, memory, time.time())
        self._left(before)
        self._events.joined(WorkerAddress(name, address, Credentials(ca=ca.encode(), token=token), memory, id))

    def _leaving(self, id: str, link: _Link) -> None:
        """A machine is about to go."""
        with self._lock:
            name = self._book.serving(id)
        if name is not None:
            self._events.leaving(name)
        else:
            link.orders.put(("released", {}))

    def _ended(self, id: str, link: _Link) -> None:
        """A machine's worker has ended; the machine is still there."""
        with self._lock:
            if id not in self._book or self._links.get(id) is not link:
                return
            name = self._book.lost(id, time.time())
            self._book.connected(id, link.stream.there, time.time())
        self._left(name)

    def _gone(self, id: str, link: _Link) -> None:
        """A machine's connection is over."""
        with self._lock:
            if self._links.get(id) is not link:
                return  # it is back already
            del self._links[id]
            name = self._book.lost(id, time.time())
            if not link.confirmed and id in self._book:
                self._book.remove(id)
                try:
                    self._records.write(self._book.accepted)
                except InvalidRequest as error:  # a full disk: the machine is gone all the same
                    self._events.said(str(error))
        self._left(name)

    def _left(self, name: str | None) -> None:
        if name is not None:
            self._events.left(name)
        self._changed()

    def _changed(self) -> None:
        if not self._closed:
            self._events.changed(self.machines)


def _text(message: dict[str, Any], name: str, most: int) -> str:
    value = message.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= most or not value.isascii():
        raise ProtocolError(f"{name} has no 1 to {most} characters of ASCII")
    return value
