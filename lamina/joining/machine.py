"""The machine's side: it pairs with a server once, and gives it an attention worker until it is told to leave. It comes
back by itself when the server, the network or the worker was gone.

One thread does everything, the one that calls `run`; `leave` is for a signal handler too.
"""

from __future__ import annotations

import ipaddress
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from lamina.errors import InvalidRequest
from lamina.joining import pairing
from lamina.joining.book import ID_SIZE, KEY_SIZE, WAITING_S
from lamina.joining.discovery import NoDiscovery, reach
from lamina.joining.records import KnownServer, forget, known_servers, remember
from lamina.joining.stream import ALIVE_S, HELLO_S, SILENT_S, JoinFailed, JoinRefused, MessageStream, printable
from lamina.joining.worker import JoinOptions, MachineWorker
from lamina.version import __version__
from lamina_protocols.channels.channels import ChannelClosed
from lamina_protocols.channels.versions import PROTOCOL_VERSION
from lamina_protocols.errors import ProtocolError

_LOOK_S = 0.5  # between two looks at everything
_AGAIN_S = 10.0  # until an offer is repeated that the server could not use
_LONGEST_S = 15.0  # between two attempts to reach a server
_MOVE_S = 30.0  # for the engine to move the worker's KV elsewhere before it ends


class People(Protocol):
    """Who sits at the machine."""

    def said(self, message: str) -> None:
        """Something to read."""

    def confirmed(self, code: str) -> bool | None:
        """Whether the server shows this code too; None while nobody has said. Called again and again, also after an
        answer, which stays as it is."""


@dataclass(slots=True)
class _Talk:
    """One conversation. `code`: while people compare it. `given`: what the server says who this machine is to it.
    `offer_at`: when to offer the worker; None: it was offered. Times are of the monotonic clock."""

    stream: MessageStream
    you: str  # this machine's address as the server sees it
    code: str = ""
    given: dict[str, str] = field(default_factory=dict)
    offer_at: float | None = 0.0
    since: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    spoke: float = field(default_factory=time.monotonic)

    @property
    def fingerprint(self) -> str:
        """The server's."""
        return pairing.fingerprint(self.stream.certificate)


class JoiningMachine:
    """This machine, joined to one server. `command` is as in `MachineWorker`."""

    def __init__(
        self, options: JoinOptions, people: People, command: Callable[[Sequence[str]], Sequence[str]] | None = None
    ) -> None:
        self._options, self._people = options, people
        self._worker = MachineWorker(options, people.said, command)
        self._leaving = 0  # how often it was told to
        self._leave_by: float | None = None  # when the worker is ended
        self._delay = 1.0  # seconds until the next attempt to reach the server
        self._asking = False  # people compare a code

    def leave(self) -> None:
        """Have `run` return once the worker has moved its KV away; at once the second time."""
        self._leaving += 1

    def run(self) -> None:
        """Until `leave`. Raises JoinFailed, and InvalidRequest where what is remembered cannot be read."""
        try:
            while not self._over:
                try:
                    with reach(self._options.server, self._known, lambda: self._leaving > 0) as stream:
                        self._converse(stream)
                except (ChannelClosed, ProtocolError, NoDiscovery) as error:
                    # A new code is made when people ask for one: else someone in between could go on guessing.
                    if self._asking or not self._known:
                        raise JoinFailed(str(error)) from error
                    if not self._over:
                        self._people.said(f"{error}; tries again in {self._delay:g} s")
                        self._wait(self._delay)
                        self._delay = min(2 * self._delay, _LONGEST_S)
        finally:
            self._worker.close(at_once=self._leaving > 1)

    @property
    def _over(self) -> bool:
        """Whether it was told to leave, and the worker is gone."""
        return self._leaving > 1 or (self._leaving > 0 and not self._worker.runs)

    @property
    def _known(self) -> list[KnownServer]:
        return known_servers(self._options.folder)

    def _wait(self, seconds: float) -> None:
        """The worker goes on meanwhile."""
        end = time.monotonic() + seconds
        while not self._over and time.monotonic() < end:
            self._mind_worker()
            time.sleep(0.1)

    def _mind_worker(self, talk: _Talk | None = None) -> None:
        if self._leaving:
            now = time.monotonic()
            if self._leave_by is None:
                self._leave_by = now
                if talk is not None and self._worker.runs:
                    talk.stream.send("leaving")
                    self._leave_by = now + _MOVE_S
                    self._people.said(f"leaves once what the worker holds is elsewhere, in {_MOVE_S:g} s at most")
            if now >= self._leave_by:
                self._worker.end()
        self._worker.mind()

    # One conversation.

    def _converse(self, stream: MessageStream) -> None:
        """Join or come back, then serve, until the connection or this machine goes."""
        fingerprint = pairing.fingerprint(stream.certificate)
        acquainted = next((server for server in self._known if server.fingerprint == fingerprint), None)
        talk = self._ask(stream) if acquainted is None else self._come_back(stream, acquainted)
        self._delay = 1.0
        while not self._over:
            self._mind_worker(talk)
            self._speak(talk)
            if (message := stream.receive(_LOOK_S)) is not None:
                talk.heard = time.monotonic()
                self._take(talk, message)
            elif time.monotonic() - talk.heard > SILENT_S:
                raise ChannelClosed(f"the server was not heard for {SILENT_S:g} s")
        stream.send("bye")

    def _come_back(self, stream: MessageStream, known: KnownServer) -> _Talk:
        """Raises JoinFailed where the server does not want this machine any more."""
        stream.send("resume", version=__version__, protocol=PROTOCOL_VERSION, id=known.id, key=known.key)
        try:
            answer = stream.expect("resumed", seconds=HELLO_S)
        except JoinRefused as error:
            if str(error) != "unknown":
                raise JoinFailed(f"{known.name} refuses: {error}") from error
            forget(self._options.folder, known.fingerprint)
            raise JoinFailed(
                f"{known.name} does not know this machine any more; `lamina join` asks it again"
            ) from error
        self._people.said(f"{known.name} has this machine again")
        talk = _Talk(stream, _address(answer), given={"name": known.name, "id": known.id, "key": known.key})
        if (known.host, known.port) != (stream.there, stream.port):
            self._remember(talk)
        return talk

    def _ask(self, stream: MessageStream) -> _Talk:
        """Make a code with a server that does not know this machine. Raises JoinFailed where it refuses."""
        offer = pairing.Offer(self._options.name, self._options.memory)
        nonce = secrets.token_bytes(pairing.NONCE_SIZE)
        committed = pairing.commitment(nonce).hex()
        stream.send("pair", version=__version__, protocol=PROTOCOL_VERSION, commitment=committed, **asdict(offer))
        try:
            answer = stream.expect("nonce", seconds=HELLO_S)
        except JoinRefused as error:
            raise JoinFailed(f"the server refuses: {error}") from error
        theirs = pairing.read_bytes(answer.get("nonce"), pairing.NONCE_SIZE)
        name, you = pairing.read_name(answer.get("name")), _address(answer)
        self._asking = True
        stream.send("reveal", nonce=nonce.hex())
        code = pairing.code(stream.certificate, offer, nonce, theirs)
        self._people.said(
            f"asks {name} at {stream.there}. The code is {pairing.spaced(code)}: if the server shows it too, accept "
            f"this machine there, on the page or with: lamina joining accept {code}"
        )
        return _Talk(stream, you, code, {"name": name})

    def _speak(self, talk: _Talk) -> None:
        """Say what is due."""
        now = time.monotonic()
        if now - talk.spoke > ALIVE_S:
            talk.stream.send("alive")
            talk.spoke = now
        if talk.code:
            self._compare(talk)
            return
        if self._worker.ended():
            talk.stream.send("left")
            talk.offer_at = now
        if talk.offer_at is not None and now >= talk.offer_at and not self._leaving:
            offered = self._worker.offer(talk.stream.here, talk.you)
            if offered is not None:
                talk.stream.send("serve", **offered)
                talk.offer_at = None

    def _compare(self, talk: _Talk) -> None:
        """Both sides must agree on the code: go on once they have."""
        says = self._people.confirmed(talk.code)
        if says is False:
            raise JoinFailed("the codes differ, so another machine may be in between; nothing was given to it")
        if time.monotonic() - talk.since > WAITING_S:
            raise JoinFailed(f"the code was not accepted at both ends within {WAITING_S:g} s")
        if says and "key" in talk.given:
            self._remember(talk)
            self._people.said(f"{talk.given['name']} has accepted this machine")
            talk.code, self._asking = "", False

    def _take(self, talk: _Talk, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "accepted" and talk.code:
            for name, size in (("id", ID_SIZE), ("key", KEY_SIZE)):
                talk.given[name] = pairing.read_bytes(message.get(name), size).hex()
        elif kind == "refused":
            forget(self._options.folder, talk.fingerprint)
            raise JoinFailed(f"the server refuses: {printable(message.get('why'))}")
        elif kind == "released":
            self._leave_by = 0.0
        elif kind == "again":
            if not self._leaving:
                self._people.said("the server's engine has given the worker up; another one starts")
                self._worker.end()
        elif kind == "unreachable":
            self._people.said(f"{printable(message.get('why'))}; a firewall may be in between (--port fixes the port)")
            talk.offer_at = time.monotonic() + _AGAIN_S
        elif kind != "alive":
            raise ProtocolError(f"a message of type {kind!r:.40} was not expected")

    def _remember(self, talk: _Talk) -> None:
        stream, identity = talk.stream, talk.given
        server = KnownServer(
            talk.fingerprint, identity["name"], identity["id"], identity["key"], stream.there, stream.port
        )
        try:
            remember(self._options.folder, server)
        except InvalidRequest as error:  # a full disk, or a read-only one
            self._people.said(f"{error}; after its next start this machine is to be accepted anew")


def _address(message: dict[str, Any]) -> str:
    """This machine's address as the server sees it. Raises ProtocolError."""
    try:
        return str(ipaddress.ip_address(str(message.get("you"))))
    except ValueError as error:
        raise ProtocolError(f"{message.get('you')!r:.80} is no IP address") from error
