"""The HTTP process of `lamina serve` without an engine, for hostile clients: its answers, its memory, its log. No
callback of its event loop may take long, unless its files are few."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import loop_watch

from lamina.server.processes.child_protocol import TO_HTTP, StartHttp
from lamina.server.settings import ServerSettings

KEY = "key"


class HttpProcess:
    """The process, at `port`. `files`: its soft and hard limits of open files."""

    def __init__(self, files: tuple[int, int] | None = None) -> None:
        # Without open files asyncio's loop tries 2,048 times to take a connection; uvloop, the server's own, does not.
        main = [loop_watch.__file__] if files is None else ["-m", "lamina.server.processes.http_main"]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `close`
        with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
            self.port: int = listener.getsockname()[1]
            self._process = subprocess.Popen(
                [sys.executable, *main],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
                pass_fds=(listener.fileno(),),
                preexec_fn=None if files is None else lambda: resource.setrlimit(resource.RLIMIT_NOFILE, files),
            )  # fmt: skip
            settings = asdict(ServerSettings(model="tiny", api_keys=(KEY,), max_body=16 << 20)) | {"api_keys": [KEY]}
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(TO_HTTP.line(StartHttp(settings, listener.fileno(), "00" * 32)) + "\n")
            self._process.stdin.flush()
            said = self._process.stdout.readline()
            assert "serving" in said, (said, self.log)

    @property
    def log(self) -> str:
        return Path(f"/proc/self/fd/{self._log.fileno()}").read_text()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        slow = [line for line in self.log.splitlines() if line.startswith(loop_watch.SLOW)]
        self._log.close()
        assert not slow, slow

    def connect(self, data: bytes = b"") -> socket.socket:
        """A connection on which this was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(data)
        return connection

    def post(self, path: str, body: bytes | dict[str, Any]) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
            connection.request("POST", path, data, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def serves(self, seconds: float = 10.0) -> bool:
        """Whether another client is answered in time."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
                connection.settimeout(seconds)
                connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return connection.recv(100).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def waits(self, attack: Callable[[], Any]) -> float:
        """The longest that another client waited, in seconds, while an attack went on."""
        over, longest = threading.Event(), [0.0]

        def ask() -> None:
            while not over.is_set():
                begun = time.monotonic()
                self.serves(60.0)
                longest[0] = max(longest[0], time.monotonic() - begun)
                time.sleep(0.01)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            attack()
        finally:
            over.set()
            thread.join()
        return longest[0]

    @contextmanager
    def growth(self) -> Iterator[Callable[[], float]]:
        """Gives how many megabytes of memory the process had more, at most, than when the context began."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")  # the peak begins anew
        before = self._memory("VmRSS")
        yield lambda: (self._memory("VmHWM") - before) / 1024

    def soft_files(self) -> int:
        """The soft limit of open files."""
        limits = Path(f"/proc/{self._process.pid}/limits").read_text()
        return int(next(each for each in limits.splitlines() if each.startswith("Max open files")).split()[3])

    def _memory(self, name: str) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(each for each in status.splitlines() if each.startswith(name)).split()[1])


@contextmanager
def http_process(files: tuple[int, int] | None = None) -> Iterator[HttpProcess]:
    process = HttpProcess(files)
    try:
        yield process
    finally:
        process.close()


def head(length: int, path: str = "/v1/completions") -> bytes:
    """The head of a request with a body of that many bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {KEY}", f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines).encode()


def answers(connection: socket.socket, seconds: float = 20.0) -> bytes:
    """What comes until the server closes, which it must do within so many seconds."""
    connection.settimeout(seconds)
    pieces: list[bytes] = []
    end = time.monotonic() + seconds
    try:
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
            if time.monotonic() > end:
                raise AssertionError(f"the connection is still open after {seconds:g} s")
    except ConnectionError:
        pass
    except TimeoutError:
        raise AssertionError(f"the connection is still open after {seconds:g} s: {pieces}") from None
    return b"".join(pieces)
