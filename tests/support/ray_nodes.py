"""Real Ray nodes, each in a network namespace of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class Program:
    """A running program that prints lines of JSON."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process = process
        self._errors = errors

    def hear(self) -> Any:
        """Its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._errors.read_text()[-4000:]
        return json.loads(line)

    def tell(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


_numbers = itertools.count()  # of namespaces


class Namespaces:
    """Two namespaces joined by a cable, and all that runs in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"lm{os.getpid()}{next(_numbers)}" for _ in range(2)]
        self._environment = os.environ | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "5a" * 32,
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, second = self.names
        ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
        for name, address in zip(self.names, (HEAD, OTHER), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")

    def command(self, node: int, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[node], *words]

    def ray_start(self, node: int, *words: str, **environment: str) -> None:
        started = subprocess.run(
            self.command(
                node, "ray", "start", "--disable-usage-stats", "--num-cpus=1", "--object-store-memory=80000000", *words
            ),
            env=self._environment | environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert started.returncode == 0, started.stdout + started.stderr

    @contextlib.contextmanager
    def program(self, code: str, seconds: float = 100) -> Iterator[Program]:
        """A program in the head's namespace. It is killed at the end of the block, or after `seconds`."""
        errors = self.folder / "errors"
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                self.command(0, sys.executable, "-c", PREAMBLE + code),
                env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                cwd=self.folder,
            )  # fmt: skip
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        with process:
            try:
                yield Program(process, errors)
            finally:
                timer.cancel()
                process.kill()

    def run(self, code: str, seconds: float = 100) -> Any:
        """The first line of a program."""
        with self.program(code, seconds) as program:
            return program.hear()

    def lamina(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(0, sys.executable, "-c", "from lamina.cli.main import main; main()", *words),
            env=self._environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def kill(self, node: int) -> None:
        """Everything on a node dies at once."""
        pids = subprocess.run(["ip", "netns", "pids", self.names[node]], capture_output=True, text=True, check=True)
        for pid in pids.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        for node, name in enumerate(self.names):
            self.kill(node)
            ip("netns", "del", name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


PREAMBLE = """
import json, os, queue, signal, sys, time

def say(**facts):
    print(json.dumps(facts), flush=True)
"""


@contextlib.contextmanager
def cluster(folder: Path, resources: dict[str, int], **environment: str) -> Iterator[Namespaces]:
    """Two nodes, the first with a Ray head that has these resources; all ends with the block. Skips the test where
    there are no namespaces."""
    pytest.importorskip("ray")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    try:
        made = Namespaces(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    # Ray's sockets want a short path.
    with tempfile.TemporaryDirectory(prefix="lamina-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        try:
            made.ray_start(
                0, "--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--include-dashboard=false",
                f"--temp-dir={scratch}", f"--resources={json.dumps(resources)}", **environment,
            )  # fmt: skip
            yield made
        finally:
            made.close()


def join(nodes: Namespaces, resources: str, **environment: str) -> None:
    words = (f"--address={HEAD}:{PORT}", f"--node-ip-address={OTHER}", f"--resources={resources}")
    nodes.ray_start(1, *words, **environment)


def all_end(processes: list[int], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(Path(f"/proc/{process}").exists() for process in processes)


GENERATE = """
import lamina
options = {{"dtype": "float32", "threads": 1, "kv_memory": 1 << 26, "local_channel": False}}

def here():
    return lamina.LLM({model!r}, **options)

def on_cluster(**more):
    return lamina.LLM({model!r}, cluster="auto", attention_workers=2, local_share=0, **options, **more)
"""


HEAD, OTHER, PORT = "10.77.0.1", "10.77.0.2", 6379
