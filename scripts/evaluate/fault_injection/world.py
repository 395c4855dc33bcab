"""The processes of one scenario: a server, and what is outside of it: attention workers at addresses, proxies on the
way to them, machines that join. All on loopback, and all end with the scenario.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .load import Clients, Load, warm
from .proxy import Proxy, Toxic
from .server import MODULES, Server, ask, until

Place = Literal["children", "addresses", "proxies"]
PROXIED = "127.0.0.2"  # where proxies listen, with the ports of their workers
TURN = 0.1  # seconds in which a slow process runs once and is stopped once


@dataclass(frozen=True, slots=True)
class Setup:
    """What is started: `lamina serve` with these options and so many attention workers, which are its children, or run
    at addresses of their own, or behind a proxy each. `kv_memory` is that of each holder, `local_share` the share
    of the KV that the engine's process keeps. `previous`: workers at addresses run the previous version of Lamina at
    first, whose source is given to `World`. `tls`: they have certificates and a token."""

    workers: int = 2
    place: Place = "children"
    options: tuple[str, ...] = ()
    kv_memory: str = "256MiB"
    local_share: str = "0"
    previous: bool = False
    tls: bool = False


class ListedWorker:
    """An attention worker with an address of its own, which it keeps when it is started again."""

    def __init__(
        self, kv_memory: str, environment: dict[str, str], options: Sequence[str], source: Path | None = None
    ) -> None:
        self.data_port = _free_port()
        self._options = ["--kv-memory", kv_memory, "--threads", "1", "--data-port", str(self.data_port), *options]
        self._environment = environment
        self.address = "127.0.0.1:0"
        self.process = self._start(source)

    def _start(self, source: Path | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "lamina", "attention-worker", "--listen", self.address, *self._options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=source,
            env=self._environment if source is None else self._environment | path_to(source),
        )
        line = process.stdout.readline() if process.stdout else ""
        match = re.fullmatch(r"listening (\S+:\d+)", line.strip())
        if match is None:
            process.kill()
            process.wait()
            raise RuntimeError(f"an attention worker said {line!r}")
        self.address = match[1]
        return process

    def start_again(self) -> None:
        self.process = self._start()

    def close(self) -> None:
        self.process.kill()  # it may be stopped
        self.process.communicate()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def path_to(source: Path) -> dict[str, str]:
    """The environment in which Python takes Lamina from a folder with its repository, where it is the working folder
    too."""
    return {"PYTHONPATH": os.pathsep.join(str(source / part) for part in ("", "workers", "kernels", "protocols"))}


class World:
    """What runs. A context manager: entering it starts everything and waits until it serves; `start` are the seconds
    that the server took. `folder` is for files of this scenario alone, `previous` has the repository as it was in the
    previous version."""

    def __init__(self, setup: Setup, load: Load, model: str, folder: Path, previous: Path | None = None) -> None:
        self.setup = setup
        self.load = load
        self.expected = setup.workers  # attention workers that a whole service has
        self.start = 0.0
        self._model = model
        self._folder = folder
        self._previous = previous if setup.previous else None
        self._environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(folder)}
        self._stack = contextlib.ExitStack()
        self._listed: list[ListedWorker] = []
        self._proxies: list[tuple[Proxy, Proxy]] = []  # to each worker's port, and its data port
        self._machines: dict[str, subprocess.Popen[bytes]] = {}
        self.server: Server
        self.clients: Clients

    def __enter__(self) -> World:
        with contextlib.ExitStack() as stack:
            self._stack = stack
            began = time.monotonic()
            self.server = Server(*self._options(), model=self._model, environment=self._environment)
            stack.callback(self.server.close)
            self.server.wait_until_serving()
            self.start = time.monotonic() - began
            until(self.whole, self.server)
            warm(self.server.url, self.load)
            self.clients = Clients(self.server.url, self.load)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _options(self) -> list[str]:
        workers, credentials = [str(self.setup.workers)], []
        if self.setup.place != "children":
            if self.setup.tls:
                credentials = self._credentials()
            for _ in range(self.setup.workers):
                worker = ListedWorker(self.setup.kv_memory, self._environment, credentials, self._previous)
                self._stack.callback(worker.close)
                self._listed.append(worker)
            if self.setup.place == "proxies":
                self._proxies = [self._through_proxies(worker) for worker in self._listed]
            workers = [control.address for control, _ in self._proxies] or [each.address for each in self._listed]
        options = ["--threads", "1", "--weights", "float32", "--kv-memory", self.setup.kv_memory]
        options += ["--attention-workers", ",".join(workers), "--local-share", self.setup.local_share]
        if self._proxies:
            options.append("--no-local-channel")  # a Unix socket would not pass the proxy
        return [*options, *credentials, *self.setup.options]

    def _through_proxies(self, worker: ListedWorker) -> tuple[Proxy, Proxy]:
        ports = int(worker.address.rpartition(":")[2]), worker.data_port
        control, data = (Proxy(f"127.0.0.1:{port}", listen=(PROXIED, port)) for port in ports)
        return self._stack.enter_context(control), self._stack.enter_context(data)

    def _credentials(self) -> list[str]:
        """Make certificates and a token for loopback. The options that name them."""
        folder = self._folder / "tls"
        command = [sys.executable, "-m", "lamina", "credentials", str(folder), "--host", "127.0.0.1", "--host", PROXIED]
        subprocess.run(command, check=True, capture_output=True, env=self._environment)
        return ["--tls-dir", str(folder), "--token-file", str(folder / "token")]

    # What is there.

    def processes(self, role: str) -> list[int]:
        """The process ids of a role, always in the same order; of "server" that of `lamina serve`."""
        if role == "server":
            return [self.server.process.pid]
        if role == "attention worker" and self._listed:
            return [worker.process.pid for worker in self._listed]
        if role not in MODULES:
            raise ValueError(f"role is {role!r}; allowed are server, {', '.join(MODULES)}")
        return self.server.children(MODULES[role])

    def snapshot(self) -> dict[str, Any]:
        """What the engine says of itself; empty while nobody answers."""
        try:
            found = self.server.status().get("engine")
        except OSError:
            return {}
        return found if isinstance(found, dict) else {}

    def whole(self) -> bool:
        """Whether the server is healthy and its engine has all attention workers that it is to have."""
        try:
            healthy = self.server.get("/health")[0] == 200
        except OSError:
            return False
        return healthy and self.workers() == self.expected

    def workers(self) -> int:
        """How many attention workers the engine uses."""
        return sum(not holder["local"] for holder in self.snapshot().get("holders", ()))

    def idle(self) -> bool:
        """Whether no request is under way and only the prefix cache has pages."""
        snapshot = self.snapshot()
        return bool(snapshot) and snapshot["running"] == snapshot["waiting"] == 0 and not snapshot["sequences"]

    # What happens to it.

    def send(self, role: str, which: Sequence[int], number: signal.Signals) -> None:
        processes = self.processes(role)
        for at in which:
            os.kill(processes[at], number)

    def slow_down(self, role: str, which: int, share: float, seconds: float) -> None:
        """Let a process run for a share of the time only."""
        process, end = self.processes(role)[which], time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):
            try:
                while time.monotonic() < end:
                    os.kill(process, signal.SIGSTOP)
                    time.sleep(TURN * (1 - share))
                    os.kill(process, signal.SIGCONT)
                    time.sleep(TURN * share)
            finally:
                os.kill(process, signal.SIGCONT)

    def spoil(self, which: int, toxic: Toxic, data_alone: bool = False) -> None:
        """From now on the connections to a worker, or to its data port alone, are like this."""
        for proxy in self._proxies[which][data_alone:]:
            proxy.toxic = toxic

    def reset(self, which: int) -> None:
        for proxy in self._proxies[which]:
            proxy.reset()

    def limit_files(self, role: str, size: int) -> None:
        """From now on no file of a process may grow beyond `size` bytes: what a full disk is, for it alone."""
        for process in self.processes(role):
            resource.prlimit(process, resource.RLIMIT_FSIZE, (size, size))

    def replace(self, which: int) -> None:
        """Tell a worker to go (SIGTERM), and start another one at its address once it has gone."""
        worker = self._listed[which]
        worker.process.terminate()
        worker.process.wait()
        worker.start_again()

    def join(self, name: str) -> None:
        """Another machine joins; the operator accepts it as soon as it asks."""
        port = re.search(r"machines may join at \S+:(\d+)", self.server.log)
        if port is None:
            raise RuntimeError(f"the server takes no machines: {self.server.log}")
        machine = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lamina",
                "join",
                "--server",
                f"127.0.0.1:{port[1]}",
                "--name",
                name,
                "--memory",
                self.setup.kv_memory,
                "--threads",
                "1",
                "--yes",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment | {"XDG_STATE_HOME": str(self._folder / name)},
        )
        self._stack.callback(_end, machine)
        self._machines[name] = machine
        waiting = until(lambda: [each for each in self._joining() if each["state"] == "waiting"], self.server)
        ask(f"{self.server.url}/joining/{waiting[0]['id']}", {"accept": True, "code": waiting[0]["code"]})
        self.expected += 1

    def _joining(self) -> list[dict[str, Any]]:
        return list(self.server.get("/joining")[1]["machines"])

    def leave(self, name: str) -> None:
        """A machine that joined leaves in order, as at Ctrl-C."""
        self._machines[name].send_signal(signal.SIGINT)
        self.expected -= 1
        self._machines[name].wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
