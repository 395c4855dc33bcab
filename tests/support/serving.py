"""`lamina serve` as people start it, for tests: its address, its processes and its log."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds


class Server:
    """One server. `log` is the output of it and of its children."""

    def __init__(self, *arguments: str, model: str = "smollm2-135m", environment: dict[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `close`
        command = [sys.executable, "-m", "lamina", "serve", model, "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, env=os.environ | (environment or {}), start_new_session=True
        )
        self.url = ""

    def wait_until_serving(self) -> Server:
        found = until(lambda: re.search(r"serving \S+ at (http://\S+)", self.log) or self._ended(), self.log)
        if not isinstance(found, re.Match):
            raise AssertionError(f"the server ended with {self.process.returncode}: {self.log}")
        self.url = found[1]
        return self

    def _ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def log(self) -> str:
        with open(f"/proc/self/fd/{self._log.fileno()}") as file:
            return file.read()

    def children(self, what: str) -> list[int]:
        """The process ids of this server's children whose command line has `what`."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    command = (folder / "cmdline").read_bytes()
                except (OSError, ValueError):
                    continue
                if parent == self.process.pid and what.encode() in command:
                    found.append(int(folder.name))
        return found

    @property
    def engine(self) -> int:
        return self.children("lamina.server.processes.engine_main")[0]

    @property
    def http(self) -> int:
        return self.children("lamina.server.processes.http_main")[0]

    @property
    def attention_workers(self) -> list[int]:
        return self.children("lamina_workers.attention_main")

    def get(self, path: str) -> tuple[int, Any]:
        return ask(self.url + path)

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return ask(self.url + path, body)

    def status(self) -> dict[str, Any]:
        """What the page shows, with no request under way unless one is."""
        answer: dict[str, Any] = self.get("/lamina/status")[1]
        return answer

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


@contextmanager
def serving(*arguments: str, **options: Any) -> Iterator[Server]:
    """A server that serves."""
    server = Server(*arguments, **options)
    try:
        yield server.wait_until_serving()
    finally:
        server.close()


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """The status and JSON (else text) of one request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # loopback
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, _parsed(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _parsed(error.read())


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode()


def until(true: Callable[[], Any], say: object = "", seconds: float = PATIENCE) -> Any:
    """What `true` gives once it is anything."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not come within {seconds:g} s: {say}")
        time.sleep(0.02)
    return found
