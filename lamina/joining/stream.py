"""The connection between a machine and a server: TLS 1.3 over TCP, on it JSON objects, one a line, bounded in bytes and
seconds. For one thread, but for `close`.

The server's certificate is its own. Who connects compares its fingerprint with the one it knows, or has people compare
a code.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import Any

from lamina.errors import LaminaError
from lamina_protocols.channels.channels import (
    ChannelClosed,
    Credentials,
    handshake,
    join_address,
    peer_certificate,
    server_context,
    unchecked_context,
)
from lamina_protocols.errors import ProtocolError

MAX_MESSAGE = 16 << 10  # bytes
HANDSHAKE_S = 10.0  # seconds
SEND_S = 5.0
HELLO_S = 10.0  # for each message before a machine is known
ALIVE_S = 5.0  # between two signs of life
REACH_S = 3.0  # for a worker to be reached
SILENT_S = 20.0  # without one, after which the other side is gone


class MessageStream:
    """Messages over one connection, `certificate` the server's in DER; `here` and `there` are the addresses of the two
    ends, `port` that of the other. Close it, or use it in `with`."""

    def __init__(self, sock: socket.socket, certificate: bytes) -> None:
        self.certificate = certificate
        self.here, self.there = (_host(name) for name in (sock.getsockname(), sock.getpeername()))
        self.port: int = sock.getpeername()[1]
        self._sock = sock
        self._arrived = bytearray()

    def __enter__(self) -> MessageStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Do the handshake. Raises ChannelClosed."""
        try:
            self._sock.settimeout(HANDSHAKE_S)  # for all of it
            handshake(self._sock)
        except (OSError, ValueError) as error:
            raise ChannelClosed(f"no TLS: {error}") from error

    def send(self, kind: str, **fields: Any) -> None:
        """Raises ChannelClosed where the other side is gone, or does not read it in `SEND_S`."""
        try:
            self._sock.settimeout(SEND_S)
            self._sock.sendall(json.dumps({"type": kind, **fields}).encode() + b"\n")
        except (OSError, ValueError) as error:
            raise ChannelClosed(f"the connection broke: {error}") from error

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, None where none is complete within `seconds`. Raises ChannelClosed, ProtocolError."""
        end = time.monotonic() + seconds
        while (cut := self._arrived.find(b"\n")) < 0:
            if len(self._arrived) > MAX_MESSAGE:
                raise ProtocolError(f"a message has more than {MAX_MESSAGE} bytes, which are allowed")
            remaining = end - time.monotonic()
            if remaining <= 0:
                return None
            try:
                self._sock.settimeout(remaining)
                piece = self._sock.recv(MAX_MESSAGE)
            except TimeoutError:
                return None
            except (OSError, ValueError) as error:
                raise ChannelClosed(f"the connection broke: {error}") from error
            if not piece:
                raise ChannelClosed("the other side has closed the connection")
            self._arrived += piece
        line = bytes(self._arrived[:cut])
        del self._arrived[: cut + 1]
        return _message(line)

    def expect(self, *kinds: str, seconds: float) -> dict[str, Any]:
        """The next message, which must be of one of these types. Raises ChannelClosed, ProtocolError, and JoinRefused
        with what the other side says where it refuses."""
        message = self.receive(seconds)
        if message is None:
            raise ChannelClosed(f"no {' or '.join(kinds)} came within {seconds:g} s")
        if message["type"] == "refused":
            raise JoinRefused(printable(message.get("why")))
        if message["type"] not in kinds:
            raise ProtocolError(f"a message is of type {message['type']!r:.40}; allowed is {' or '.join(kinds)}")
        return message

    def close(self) -> None:
        """End the connection. For any thread; may be called again."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class JoinRefused(LaminaError):
    """The server does not want this machine, and says why."""


class JoinFailed(LaminaError):
    """This machine cannot join: no server is there, several are, it was refused, or the codes differ."""


def printable(why: object) -> str:
    """A reason that came from the network, as people may see it at a terminal."""
    return "".join(letter for letter in str(why)[:300] if letter.isprintable())


class JoinListener:
    """A listening socket whose connections speak TLS with `credentials`, `certificate` their own in DER. Raises OSError
    where the address cannot be listened on, or the certificate cannot be used."""

    def __init__(self, host: str, port: int, credentials: Credentials, certificate: bytes) -> None:
        self._context = server_context(credentials, mutual=False)
        self._certificate = certificate
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        dual_stack = host == "::" and socket.has_dualstack_ipv6()  # as a worker that listens there takes IPv4 too
        self._sock = socket.create_server((host, port), family=family, dualstack_ipv6=dual_stack)
        self.port: int = self._sock.getsockname()[1]

    def accept(self) -> MessageStream | None:
        """The next connection, of which nothing was read yet: `open` comes first. None once the listener is closed; a
        system without room for a connection is waited for."""
        while True:
            try:
                sock = self._sock.accept()[0]
                return MessageStream(
                    self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), self._certificate
                )
            except (OSError, ValueError):
                if self._sock.fileno() < 0:
                    return None
                time.sleep(0.05)  # out of descriptors, say

    def close(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._sock.close()


def connect(host: str, port: int, seconds: float = HANDSHAKE_S) -> MessageStream:
    """A connection to a server, of which only the caller can say whether it is the right one. Raises ChannelClosed."""
    try:
        sock = socket.create_connection((host, port), timeout=seconds)
    except (OSError, OverflowError, UnicodeError) as error:
        refused = isinstance(error, ConnectionRefusedError)
        hint = "; is `lamina serve --allow-join` running there? Its port is 7717 by default" if refused else ""
        raise ChannelClosed(f"cannot connect to {join_address(host, port)}: {error}{hint}") from error
    try:
        wrapped = unchecked_context().wrap_socket(sock)  # within the same timeout
    except (OSError, ValueError) as error:
        sock.close()
        raise ChannelClosed(f"no TLS with {join_address(host, port)}: {error}") from error
    return MessageStream(wrapped, peer_certificate(wrapped))


def reachable(host: str, port: int) -> str:
    """Why no connection can be made there; empty where one can."""
    try:
        socket.create_connection((host, port), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return ""


def host_name() -> str:
    """This machine's name."""
    return socket.gethostname()


def _host(address: Any) -> str:
    host = str(address[0])
    return host.removeprefix("::ffff:")


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ProtocolError("a message is no JSON object with a type")
    return message
