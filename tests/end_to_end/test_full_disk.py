"""A server whose disk is full or read-only, whole: it serves, and what dies comes back. In a mount namespace of its
own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluate.fault_injection.server import Server, until
from real_workers import write_tiny_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

ENTER = """
import os, subprocess, sys
folder, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
os.execvp(command[0], command)
"""


class OnSmallDisk(Server):
    """A server all of whose files, but for its model, go to a disk of 4 MiB."""

    def __init__(self, folder: Path, *arguments: str, model: str) -> None:
        self.disk = folder
        variables = ("TMPDIR", "XDG_STATE_HOME", "XDG_CACHE_HOME")
        super().__init__(*arguments, model=model, environment=dict.fromkeys(variables, str(folder)))

    def start(self, command: list[str]) -> list[str]:
        return ["unshare", "--mount", sys.executable, "-c", ENTER, str(self.disk), *command]

    @property
    def inside(self) -> Path:
        """The disk, as the server sees it."""
        return Path(f"/proc/{self.process.pid}/root{self.disk}")

    def fill(self) -> None:
        with pytest.raises(OSError, match="No space left"):
            (self.inside / "filler").write_bytes(bytes(8 << 20))

    def make_read_only(self) -> None:
        """For all that is opened from now on: what is open keeps a disk from being remounted itself."""
        enter, disk = ["nsenter", "--mount", "--target", str(self.process.pid), "mount"], str(self.disk)
        for words in (["--bind", disk, disk], ["-o", "remount,ro,bind", disk]):
            subprocess.run([*enter, *words], check=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OnSmallDisk]:
    if os.geteuid() != 0 or shutil.which("nsenter") is None:
        pytest.skip("mount namespaces need root")
    model = write_tiny_model(tmp_path / "model")
    folder = Path(tempfile.mkdtemp(prefix="lamina-", dir="/tmp"))  # a short name, for sockets
    options = ("--threads", "1", "--kv-memory", "16MiB", "--attention-workers", "1", "--weights", "float32")
    server = OnSmallDisk(folder, *options, model=str(model))
    try:
        yield server
    finally:
        server.close()
        folder.rmdir()


def text(server: Server) -> str:
    status, answer = server.post("/v1/completions", prompt="w1 w2 w3 ", max_tokens=20, temperature=0)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


@pytest.mark.fault("F28")
@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_server_serves_on_a_disk_that_takes_nothing_and_what_dies_comes_back(
    server: OnSmallDisk, trouble: str
) -> None:
    server.wait_until_serving()
    expected = text(server)
    server.fill() if trouble == "full" else server.make_read_only()
    assert text(server) == expected
    os.kill(server.attention_workers[0], signal.SIGKILL)
    assert text(server) == expected
    for _ in range(2):
        os.kill(old := server.engine, signal.SIGKILL)
        until(lambda old=old: set(server.children("engine_main")) - {old} and server.get("/health")[0] == 200, server)
        assert text(server) == expected
    assert trouble == "read-only" or "it keeps the KV of engine" not in server.log
    assert "an engine that dies is not gone on from" in server.log
    assert server.process.poll() is None
