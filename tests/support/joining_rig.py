"""A server that takes machines and a machine that joins it, on loopback, with workers that only listen."""

from __future__ import annotations

import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import LaminaError
from lamina.joining import pairing
from lamina.joining.machine import JoiningMachine
from lamina.joining.server import JoinServer
from lamina.joining.stream import JoinListener, MessageStream, connect
from lamina.joining.worker import JoinOptions
from lamina.version import __version__
from lamina_protocols.channels.channels import certificate_bytes
from lamina_workers.process.credentials import create_credentials

PATIENCE = 20.0
LISTENS = """
import socket, signal, sys
sock = socket.create_server(("127.0.0.1", 0))
print(f"listening 127.0.0.1:{sock.getsockname()[1]}", flush=True)
signal.pause()
"""


def until(true: Callable[[], Any]) -> Any:
    """What it gives, once that is true."""
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
    return found


class Server:
    """A `JoinServer` and what it reports."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.workers: dict[str, WorkerAddress] = {}
        self.names: list[str] = []  # of all workers that ever joined
        self.said_lines: list[str] = []
        self.asked: list[str] = []  # names of workers that wanted to go
        self.served = JoinServer("127.0.0.1", port, folder, self)
        self.served.start()

    @property
    def port(self) -> int:
        return int(self.served.address.rpartition(":")[2])

    @property
    def machines(self) -> list[dict[str, Any]]:
        return self.served.machines

    def state(self) -> list[str]:
        return [machine["state"] for machine in self.machines]

    def waiting(self) -> dict[str, Any]:
        return until(lambda: [each for each in self.machines if each["state"] == "waiting"])[0]

    def joined(self, worker: WorkerAddress) -> None:
        self.names.append(worker.name)
        self.workers[worker.name] = worker

    def left(self, name: str) -> None:
        self.workers.pop(name, None)

    def leaving(self, name: str) -> None:
        self.asked.append(name)
        self.served.released(name)

    def changed(self, machines: list[dict[str, Any]]) -> None: ...

    def said(self, message: str) -> None:
        self.said_lines.append(message)


class Joiner:
    """A machine that joins on a thread; `agree` says what the people there say."""

    def __init__(self, folder: Path, port: int, agree: bool | None = True, name: str = "den") -> None:
        self.lines: list[str] = []
        self.code = ""
        self.agree = agree
        self.failure: Exception | None = None
        options = JoinOptions(name=name, memory=1 << 20, threads=1, folder=folder, server=f"127.0.0.1:{port}")
        self.machine = JoiningMachine(options, self, self._command)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @staticmethod
    def _command(arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", LISTENS]

    def _run(self) -> None:
        try:
            self.machine.run()
        except Exception as error:  # noqa: BLE001  # looked at by the test
            self.failure = error

    def said(self, message: str) -> None:
        self.lines.append(message)

    def confirmed(self, code: str) -> bool | None:
        self.code = code
        return self.agree

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def leave(self) -> None:
        self.machine.leave()
        self._thread.join(PATIENCE)
        assert self.ended()


def ask(stream: MessageStream, name: str = "den", memory: int = 1 << 20) -> tuple[bytes, dict[str, Any]]:
    """The first messages of a machine, and the answer."""
    nonce = secrets.token_bytes(32)
    stream.send("pair", version=__version__, name=name, memory=memory, commitment=pairing.commitment(nonce).hex())
    return nonce, stream.expect("nonce", seconds=10)


class Between:
    """Someone in between: a server to a machine, at `port`, and then a machine to the server at `onward`. `name` makes
    its name there from what its victim shows: the victim's name and code. It has asked there once `done` is set."""

    def __init__(self, onward: int, name: Callable[[str, str], str]) -> None:
        credentials = create_credentials(["x"])
        self._certificate = certificate_bytes(credentials.cert)
        self.listener = JoinListener("127.0.0.1", 0, credentials, self._certificate)
        self.port = self.listener.port
        self.failure: LaminaError | None = None
        self.done = threading.Event()
        self.victim: MessageStream | None = None
        self.stream = connect("127.0.0.1", onward)
        threading.Thread(target=self._run, args=(name,), daemon=True).start()

    def _run(self, name: Callable[[str, str], str]) -> None:
        victim = self.victim = self.listener.accept()
        assert victim is not None
        victim.open()
        offer, nonce = pairing.read_offer(victim.expect("pair", seconds=10)), secrets.token_bytes(32)
        victim.send("nonce", nonce=nonce.hex(), name="server", you=victim.there)
        theirs = bytes.fromhex(victim.expect("reveal", seconds=10)["nonce"])
        try:
            shown = pairing.code(self._certificate, offer, theirs, nonce)
            number, _ = ask(self.stream, name(offer.name, shown))
            self.stream.send("reveal", nonce=number.hex())
        except LaminaError as error:
            self.failure = error
        self.done.set()


@contextmanager
def between(onward: int, name: Callable[[str, str], str]) -> Iterator[Between]:
    made = Between(onward, name)
    try:
        yield made
    finally:
        for stream in filter(None, (made.stream, made.victim, made.listener)):
            stream.close()


@contextmanager
def server(folder: Path, port: int = 0) -> Iterator[Server]:
    made = Server(folder, port)
    try:
        yield made
    finally:
        made.served.close()


@contextmanager
def joiner(folder: Path, port: int, **options: Any) -> Iterator[Joiner]:
    made = Joiner(folder, port, **options)
    try:
        yield made
    finally:
        made.machine.leave()
        made.machine.leave()
        until(made.ended)
