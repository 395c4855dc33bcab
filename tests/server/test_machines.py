"""Machines that join a server: the operator's routes, and the supervisor between machines, engine and HTTP process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from joining_rig import between, joiner, server, until
from supervisor_run import World, pretend
from typer.testing import CliRunner
from unobserved import NoMetrics, Unobserved

from lamina.cli import join
from lamina.cli.main import app as cli
from lamina.joining.pairing import spaced
from lamina.joining.server import JoinServer
from lamina.server.app import create_app
from lamina.server.frontend import Frontend
from lamina.server.machines import Machines
from lamina.server.processes.server_plan import JoinPlan, ServerPlan
from lamina.server.settings import ServerSettings

DEN = {"id": "00ff", "name": "den", "code": "482193", "address": "10.0.0.2", "memory": 1 << 30, "since": 1.5}
TAKE = {"accept": True, "code": "482 193"}


class Decisions:
    """A supervisor that does at once what is decided."""

    def __init__(self, settings: ServerSettings) -> None:
        self.machines = Machines(settings, self.decide)
        self.machines.update([{**DEN, "state": "waiting"}])
        self.taken: list[tuple[str, bool]] = []

    def decide(self, id: str, accept: bool) -> None:
        self.taken.append((id, accept))
        self.machines.update([{**DEN, "code": "", "state": "accepted"}] if accept else [])


def ask(
    settings: ServerSettings, machines: Machines | None, *requests: tuple[str, str, Any], key: str = ""
) -> list[httpx.Response]:
    app = create_app(Frontend(Unobserved()), settings, NoMetrics(), machines)

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            return [await client.request(method, path, json=body) for method, path, body in requests]

    return asyncio.run(run())


def test_operator_sees_accepts_and_removes() -> None:
    settings = ServerSettings(model="m")
    world = Decisions(settings)
    seen, accepted, removed = ask(
        settings, world.machines, ("GET", "/joining", None), ("POST", "/joining/00ff", TAKE),
        ("POST", "/joining/00ff", {"accept": False}),
    )  # fmt: skip
    assert seen.json() == {"allowed": True, "machines": [{**DEN, "state": "waiting"}]}
    assert accepted.json()["machines"][0]["state"] == "accepted"
    assert removed.json()["machines"] == []
    assert world.taken == [("00ff", True), ("00ff", False)]


def test_key_that_is_not_the_operators_is_refused() -> None:
    settings = ServerSettings(model="m", api_keys=("user",), operator_keys=("root",))
    world = Decisions(settings)
    requests = ("GET", "/joining", None), ("POST", "/joining/00ff", TAKE)
    assert [reply.status_code for reply in ask(settings, world.machines, *requests, key="user")] == [403, 403]
    assert [reply.status_code for reply in ask(settings, world.machines, *requests)] == [401, 401]
    assert not world.taken
    assert [reply.status_code for reply in ask(settings, world.machines, *requests, key="root")] == [200, 200]


@pytest.mark.parametrize(
    ("body", "status", "what"),
    [
        ({}, 400, "accept is missing"),
        ({"accept": "yes"}, 400, "accept is 'yes'"),
        ({"accept": True}, 400, "code is ''; allowed is that of den at 10.0.0.2"),
        ({"accept": True, "code": "den"}, 400, "code is 'den'"),
        ({"accept": True, "code": "482194"}, 400, "a third is in between: accept none"),
        ({"accept": True, "code": 482193}, 400, "code is 482193"),
        ({"accept": True, "number": "1"}, 400, "unknown field 'number'"),
        ([], 400, "a JSON object is needed"),
        ({"accept": True, "x": "y" * 2000}, 413, "1024 bytes"),
    ],
)
def test_wrong_decision_is_refused(body: Any, status: int, what: str) -> None:
    settings = ServerSettings(model="m")
    world = Decisions(settings)
    (reply,) = ask(settings, world.machines, ("POST", "/joining/00ff", body))
    assert (reply.status_code, what in reply.json()["error"]["message"]) == (status, True), reply.text
    assert not world.taken


def test_server_that_takes_none_has_none() -> None:
    seen, decided = ask(
        ServerSettings(model="m"), None, ("GET", "/joining", None), ("POST", "/joining/x", {"accept": True})
    )
    assert seen.json() == {"allowed": False, "machines": []}
    assert decided.status_code == 404


@pytest.mark.parametrize("name", [lambda name, code: name, lambda name, code: f"code-{code}"], ids=["same", "code"])
def test_operator_who_types_the_code_of_a_machine_takes_no_one_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Callable[[str, str], str]
) -> None:
    """By the command and by what the page sends, whatever someone in between is called at the server."""
    monkeypatch.setattr(JoinServer, "_announce", lambda self: None)
    settings = ServerSettings(model="m", joining=True)

    def by_command(url: str, path: str, api_key: str | None, body: Any = None) -> Any:
        return ask(settings, machines, ("GET" if body is None else "POST", path, body))[0].json()

    with server(tmp_path / "s") as taking, between(taking.port, name) as attacker:
        machines = Machines(settings, taking.served.decide)
        with joiner(tmp_path / "m", attacker.port, agree=True) as victim:
            waiting = taking.waiting()
            until(lambda: victim.code)
            machines.update(taking.machines)
            monkeypatch.setattr(join, "ask", by_command)
            result = CliRunner().invoke(cli, ["joining", "accept", victim.code, "--yes"])
            assert (result.exit_code, "accept none" in result.output) == (2, True), result.output
            (reply,) = ask(settings, machines, ("POST", f"/joining/{waiting['id']}", {**TAKE, "code": victim.code}))
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "code")
            assert taking.state() == ["waiting"]
            shown = CliRunner().invoke(cli, ["joining", "accept", waiting["code"], "--yes"]).output
            assert shown == f"{waiting['name']} at 127.0.0.1 with the code {spaced(waiting['code'])} is accepted\n"
            attacker.stream.expect("accepted", seconds=10)


def test_machine_joins_a_running_engine_and_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine starts without any attention worker; the machine's comes, is given up, and goes."""
    monkeypatch.setattr(JoinServer, "_announce", lambda self: None)
    pretend(tmp_path, monkeypatch)
    joining = JoinPlan("127.0.0.1", 0, tmp_path / "state")
    settings = ServerSettings(model="m", joining=True)
    world = World(tmp_path, ServerPlan({"m": "m"}, {}, settings, "127.0.0.1", 0, drain=5.0, joining=joining))
    supervisor = world.supervisor

    def heard(role: str, word: str) -> list[list[Any]]:
        return [message for message in world.heard(role) if message[0] == word]

    def names() -> list[str]:
        return [worker[0] for worker in heard("engine", "workers")[-1][1]]

    def steps() -> None:
        joins = until(lambda: [line for line in world.messages if line.startswith("machines may join at")])[0]
        until(lambda: heard("engine", "workers") == [["workers", []]])
        assert heard("engine", "engine")[0][-2:] == [True, False]
        port = int(joins.split(":")[1])
        with joiner(tmp_path / "m", port) as machine:
            waiting = until(lambda: heard("http", "machines") and heard("http", "machines")[-1][1])[0]
            until(lambda: machine.code)
            assert any(f"{machine.code[:3]} {machine.code[3:]}" in line for line in world.messages)
            supervisor._calls.put(lambda: supervisor._machines.decide(waiting["id"], True))
            until(lambda: names() == ["den"])
            assert "CERTIFICATE" in heard("engine", "workers")[-1][1][0][4]
            until(lambda: heard("http", "machines")[-1][1][0]["state"] == "serving")
            supervisor._calls.put(lambda: supervisor._machines.lost("den"))
            until(lambda: "den.1" in names())
            machine.leave()
            assert heard("engine", "drain") == [["drain", "den.1"]]
            until(lambda: "den.1" not in names())
            until(lambda: heard("http", "machines")[-1][1][0]["state"] == "lost")

    world.run(steps, world.signal)
