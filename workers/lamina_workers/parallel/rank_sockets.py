"""Direct sockets among the ranks of a model, one for each pair: for messages of some kilobytes, 60 and more a step.

A rank sends to all and reads from all in its own thread: gloo hands each message from thread to thread twice, and where
every core computes, each of those waits for a core.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import select
import socket
import time
from collections.abc import Callable, Mapping

from lamina_workers.errors import RankLost

MOST_BYTES = 1 << 16
"""The longest message. Two of them fit into what a socket keeps, so sending never waits for the other's reading."""
_BUFFER = 4 * MOST_BYTES
_SPIN = 1e-4  # seconds of asking again before a thread sleeps: waking it takes longer than most messages
_CARD_BYTES = 256
_TOKEN_BYTES = 16


class Lines:
    """One rank's sockets. `swap` gives its bytes to all other ranks and returns theirs, by rank: how the ranks learn
    each other's ports, and the secrets by which a port knows them.

    `address`: where this rank listens until all are connected. Raises RankLost where one does not come in `timeout`
    seconds, and from then on where one is gone, or silent for that long.
    """

    def __init__(
        self, rank: int, ranks: int, address: str, swap: Callable[[bytes], Mapping[int, bytes]], timeout: float
    ) -> None:
        self._rank, self._ranks, self._timeout = rank, ranks, timeout
        self._sockets: dict[int, socket.socket] = {}
        token = secrets.token_bytes(_TOKEN_BYTES)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family) as listening:
            card = json.dumps([address, listening.getsockname()[1], token.hex()]).encode()
            cards = swap(card.ljust(_CARD_BYTES))
            try:
                self._connect({other: json.loads(each) for other, each in cards.items()})
                self._accept(listening, token)
            except OSError as error:
                self.close()
                raise RankLost(f"rank {rank} of {ranks} could not reach the others: {error}") from error
        for each in self._sockets.values():
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            each.setblocking(False)

    def exchange(self, out: memoryview, into: Mapping[int, memoryview]) -> None:
        """Send `out` to all other ranks and fill what `into` has for each: at most `MOST_BYTES` each."""
        peer = self._rank
        try:
            for peer in into:
                self._send(self._sockets[peer], out)
            for peer, view in into.items():
                self._fill(self._sockets[peer], view)
        except OSError as error:
            self.close()
            raise RankLost(f"rank {self._rank} lost rank {peer} of {self._ranks}: {error}") from error

    def close(self) -> None:
        for each in self._sockets.values():
            each.close()

    def _connect(self, cards: Mapping[int, tuple[str, int, str]]) -> None:
        """Connect to the ranks before this one. They need not accept yet: the system queues connections."""
        for other in range(self._rank):
            host, port, token = cards[other]
            line = socket.create_connection((host, port), self._timeout)
            self._sockets[other] = line
            line.sendall(bytes.fromhex(token) + self._rank.to_bytes(4, "little"))

    def _accept(self, listening: socket.socket, token: bytes) -> None:
        """Accept the ranks after this one. Strangers are turned away, and silent connections are not waited for."""
        deadline = time.monotonic() + self._timeout
        listening.setblocking(False)
        poll = select.poll()
        poll.register(listening, select.POLLIN)
        greeted: dict[int, tuple[socket.socket, bytearray]] = {}  # with their bytes so far, by descriptor
        try:
            while len(self._sockets) < self._ranks - 1:
                left = deadline - time.monotonic()
                events = poll.poll(left * 1e3) if left > 0 else ()
                if not events:
                    raise TimeoutError(f"not all came within {self._timeout:g} s")
                for number, _ in events:
                    if number == listening.fileno():
                        with contextlib.suppress(OSError):  # it has left again
                            line, _ = listening.accept()
                            line.setblocking(False)
                            greeted[line.fileno()] = line, bytearray()
                            poll.register(line, select.POLLIN)
                    elif self._heard(*greeted[number], token):
                        poll.unregister(number)
                        del greeted[number]
        finally:
            for line, _ in greeted.values():
                line.close()

    def _heard(self, line: socket.socket, said: bytearray, token: bytes) -> bool:
        """Whether a connection is identified now: another rank, or a stranger, which is turned away."""
        try:
            part = line.recv(_TOKEN_BYTES + 4 - len(said))
        except BlockingIOError:
            return False
        except OSError:
            part = b""
        said += part
        if part and len(said) < _TOKEN_BYTES + 4:
            return False
        other = int.from_bytes(said[_TOKEN_BYTES:], "little")
        known = secrets.compare_digest(bytes(said[:_TOKEN_BYTES]), token)
        if known and self._rank < other < self._ranks and other not in self._sockets:
            self._sockets[other] = line
        else:
            line.close()
        return True

    def _send(self, line: socket.socket, view: memoryview) -> None:
        while view:
            try:
                view = view[line.send(view) :]
            except BlockingIOError:
                self._wait(line, select.POLLOUT)

    def _fill(self, line: socket.socket, view: memoryview) -> None:
        until = time.perf_counter() + _SPIN
        while view:
            try:
                count = line.recv_into(view)
            except BlockingIOError:
                if time.perf_counter() > until:
                    self._wait(line, select.POLLIN)
                continue
            if not count:
                raise ConnectionError("it closed the connection")
            view = view[count:]

    def _wait(self, line: socket.socket, event: int) -> None:
        poll = select.poll()
        poll.register(line, event)
        if not poll.poll(self._timeout * 1e3):
            raise TimeoutError(f"nothing for {self._timeout:g} s")
