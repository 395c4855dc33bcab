"""`lamina serve` as people start it: its address, its processes and its log."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds
MODULES = {
    "attention worker": "lamina_workers.attention_main",
    "engine": "lamina.server.processes.engine_main",
    "HTTP process": "lamina.server.processes.http_main",
    "model worker": "lamina_workers.model_main",
}
"""What a server's children run, by their role."""


class Server:
    """One server. `log` is the output of it and of its children."""

    def __init__(self, *arguments: str, model: str = "smollm2-135m", environment: dict[str, str] | None = None) -> None:
        self._said = bytearray()
        command = [sys.executable, "-m", "lamina", "serve", model, "--port", "0", *arguments]
        self.process = subprocess.Popen(
            self.start(command),
            stdout=subprocess.PIPE,  # a file would be refused to a server whose disk is full
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def start(self, command: list[str]) -> list[str]:
        """What runs the command."""
        return command

    def wait_until_serving(self) -> Server:
        found = until(lambda: re.search(r"serving \S+ at (http://\S+)", self.log) or self._ended(), self)
        if not isinstance(found, re.Match):
            raise RuntimeError(f"the server ended with {self.process.returncode}: {self.log}")
        self.url = found[1]
        return self

    def _ended(self) -> bool:
        return self.process.poll() is not None

    def _read(self) -> None:
        while self.process.stdout is not None and (data := self.process.stdout.read(1 << 16)):
            self._said += data

    @property
    def log(self) -> str:
        return self._said.decode(errors="replace")

    def __str__(self) -> str:
        return self.log

    def children(self, what: str) -> list[int]:
        """The process ids of this server's children, and of theirs, whose command line has `what`: by their `--name`,
        else the oldest first."""
        parents: dict[int, int] = {}
        commands: dict[int, bytes] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    commands[int(folder.name)] = (folder / "cmdline").read_bytes()
                except (OSError, ValueError):
                    continue
                parents[int(folder.name)] = parent
        found = [pid for pid, command in commands.items() if what.encode() in command and self._below(pid, parents)]
        return sorted(found, key=lambda pid: (commands[pid].partition(b"--name\0")[2].partition(b"\0")[0], pid))

    def _below(self, pid: int, parents: dict[int, int]) -> bool:
        while pid in parents and pid != self.process.pid:
            pid = parents[pid]
        return pid == self.process.pid

    @property
    def engine(self) -> int:
        return self.children(MODULES["engine"])[0]

    @property
    def http(self) -> int:
        return self.children(MODULES["HTTP process"])[0]

    @property
    def attention_workers(self) -> list[int]:
        return self.children(MODULES["attention worker"])

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
        self._reader.join(PATIENCE)  # its children end with it
        if self.process.stdout is not None:
            self.process.stdout.close()


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


def gone(process: int) -> bool:
    """Whether a process has ended, be its end noted by its parent or not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def until(true: Callable[[], Any], say: object = "", seconds: float = PATIENCE) -> Any:
    """What `true` gives once it is anything. Raises TimeoutError, with the text of `say`, such as a server's log."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not come within {seconds:g} s: {say}")
        time.sleep(0.02)
    return found
