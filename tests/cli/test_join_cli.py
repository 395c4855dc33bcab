"""`lamina join`, `lamina joining` and the options of `lamina serve` about them."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lamina.cli import join
from lamina.cli.join import _Terminal
from lamina.cli.main import app

MACHINES = [
    {"id": "00ff", "name": "den", "code": "482193", "address": "10.0.0.2", "memory": 1 << 30, "since": 1.5,
     "state": "waiting"},
    {"id": "00aa", "name": "loft", "code": "", "address": "10.0.0.3:41000", "memory": 1 << 31, "since": 1.5,
     "state": "serving"},
]  # fmt: skip


class Operator(http.server.BaseHTTPRequestHandler):
    """Answers as the server's routes do."""

    allowed = True
    asked: list[tuple[str, Any, str | None]] = []  # noqa: RUF012  # replaced for each test

    def do_GET(self) -> None:
        self._answer(200, {"allowed": self.allowed, "machines": MACHINES})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body, self.headers.get("Authorization")))
        if self.headers.get("Authorization") == "Bearer wrong":
            self._answer(403, {"error": {"message": "machines are taken with a key of the operator"}})
        else:
            self._answer(200, {"allowed": True, "machines": []})

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Operator, "asked", [])
    monkeypatch.delenv("LAMINA_API_KEY", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Operator) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_machines_are_listed_accepted_by_code_and_removed_by_name(url: str) -> None:
    listed = run("joining", "ls", "--url", url)
    assert "482 193" in listed.output
    assert "10.0.0.3:41000" in listed.output
    for code in ("482193", "482 193"):
        accepted = run("joining", "accept", code, "--yes", "--url", url, "--api-key", "k")
        assert accepted.output == "den at 10.0.0.2 with the code 482 193 is accepted\n"
    assert "loft is removed" in run("joining", "remove", "loft", "--url", url).output
    accept = ("/joining/00ff", {"accept": True, "code": "482193"}, "Bearer k")
    assert Operator.asked == [accept, accept, ("/joining/00aa", {"accept": False}, None)]


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 1)])
def test_people_are_asked_before_a_machine_is_accepted(
    url: str, answer: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "_check_terminal", lambda: None)
    result = CliRunner().invoke(app, ["joining", "accept", "482193", "--url", url], input=f"{answer}\n")
    assert "Accept den at 10.0.0.2 with the code 482 193? [y/N]" in result.output
    assert (result.exit_code, len(Operator.asked)) == (status, 1 - status)


@pytest.mark.parametrize(
    ("words", "status", "what"),
    [
        (["accept", "111111"], 2, "code is '111111'; allowed are the six digits that your machine shows"),
        (["accept", "loft"], 2, "code is 'loft'"),
        (["accept", "den", "--yes"], 2, "code is 'den'"),
        (["accept", "00ff"], 2, "code is '00ff'"),
        (["accept", "-"], 2, "code is '-'"),
        (["accept", "482193"], 2, "stdin is no terminal, so nobody can compare the code; allowed is --yes"),
        (["accept", "482193", "--yes", "--api-key", "wrong"], 1, "the server refuses: machines are taken with a key"),
        (["remove", "111111"], 2, "there is no machine '111111'; allowed: 482 193, loft"),
        (["ls", "--url", "http://127.0.0.1:1"], 1, "no server answers at http://127.0.0.1:1"),
        (["ls", "--url", "ftp://x"], 2, "url is 'ftp://x'"),
    ],
)
def test_wrong_decision_says_what_is_allowed(url: str, words: list[str], status: int, what: str) -> None:
    result = run("joining", *words, *([] if "--url" in words else ["--url", url]))
    assert (result.exit_code, what in result.output) == (status, True), result.output


def test_server_that_takes_none_says_so(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operator, "allowed", False)
    assert "start it with --allow-join" in run("joining", "ls", "--url", url).output


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert "allowed are names with a letter" in run("join", "--name", "482-193").output
    result = run("join", "--server", "127.0.0.1:1")
    assert (result.exit_code, "cannot connect to 127.0.0.1:1" in result.output) == (1, True), result.output


def test_an_answer_stays_until_the_server_has_accepted_and_is_of_one_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = os.openpty()
    with os.fdopen(there, "r") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        people = _Terminal(yes=False)
        assert people.confirmed("482193") is None
        os.write(here, b"y\n")
        assert [people.confirmed("482193") for _ in range(3)] == [True] * 3
        assert people.confirmed("482194") is None
        assert capsys.readouterr().err.count("Does the server show this code?") == 2
    os.close(here)
