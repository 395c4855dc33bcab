"""Models by hub id, from a small server that speaks the hub's protocol: what is fetched, and what is not."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from gguf_writing import write_tiny_llama
from model_export import export

from lamina.models.gguf_conversion import convert
from lamina.models.gguf_files import GgufFile

REVISION = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = """
import json, sys
from lamina.models.resolve import resolve
calls = []
folder = resolve("org/tiny", lambda *call: calls.append(call))
sys.stdout.write(json.dumps([str(folder), sorted(file.name for file in folder.iterdir()), calls[-1:]]))
"""


class Hub(ThreadingHTTPServer):
    """Serves `files` as those of org/tiny, and remembers which were fetched."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.fetched: set[str] = set()
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = self.server.files
        if path == "/api/models/org/tiny/revision/main":
            siblings = [{"rfilename": name} for name in files]
            self._answer({"id": "org/tiny", "sha": REVISION, "siblings": siblings})
        elif path == f"/api/models/org/tiny/tree/{REVISION}":
            self._answer([{"type": "file", "path": n, "size": len(c), "oid": _hash(c)} for n, c in files.items()])
        elif (name := path.removeprefix(f"/org/tiny/resolve/{REVISION}/")) in files:
            if self.command == "GET":
                self.server.fetched.add(name)
            self._send(200, files[name], {"ETag": f'"{_hash(files[name])}"', "X-Repo-Commit": REVISION})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Silence."""


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    gguf = write_tiny_llama(tmp_path / "tiny.gguf")
    (tmp_path / "own").mkdir()
    convert(GgufFile(gguf), tmp_path / "own", str(gguf), {})
    export(tmp_path / "own", tmp_path / "tiny")
    files = {file.name: file.read_bytes() for file in (tmp_path / "tiny").iterdir()}
    others = {"pytorch_model.bin": b"a pickle", "README.md": b"words", "model.gguf": b"GGUF", "gguf.json": b"{}"}
    server = Hub(files | others)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(tmp_path: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the hub library reads its settings once."""
    variables = os.environ | {"HF_HOME": str(tmp_path / "hf"), **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)


def test_weights_and_tokenizer_are_fetched_and_pickles_are_not(tmp_path: Path, hub: Hub) -> None:
    process = run(tmp_path, RESOLVE, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""  # no bar is drawn
    folder, names, calls = json.loads(process.stdout)
    wanted = hub.files.keys() - {"pytorch_model.bin", "README.md", "model.gguf", "gguf.json"}
    assert set(names) == hub.fetched == wanted
    assert [call[0] for call in calls] == ["fetching org/tiny"]
    again = run(tmp_path, RESOLVE, HF_HUB_OFFLINE="1")
    assert json.loads(again.stdout)[0] == folder


def test_a_model_that_the_hub_lacks_is_named(tmp_path: Path, hub: Hub) -> None:
    code = RESOLVE.replace("org/tiny", "org/none")
    process = run(tmp_path, code, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert "ModelFileError: cannot fetch 'org/none' from the hub" in process.stderr


def test_without_a_hub_the_message_says_what_to_do(tmp_path: Path) -> None:
    process = run(tmp_path, RESOLVE, HF_HUB_OFFLINE="1")
    assert "ModelFileError: cannot fetch 'org/tiny' from the hub" in process.stderr
    assert "give its path" in process.stderr
