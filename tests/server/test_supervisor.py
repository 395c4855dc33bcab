"""The supervisor with real child processes that only pretend to be an engine and an HTTP server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from supervisor_run import PATIENCE, World, pretend
from typer.testing import CliRunner

from lamina.cli.main import app
from lamina.errors import EngineError, InvalidRequest
from lamina.server.processes.child_protocol import Load, Unload
from lamina.server.processes.server_plan import ServerPlan
from lamina.server.processes.supervisor import Supervisor
from lamina.server.settings import ServerSettings
from lamina.system.private_folder import lock


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    pretend(tmp_path, monkeypatch)
    return World(tmp_path)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def count(world: World, role: str, word: str) -> int:
    return sum(said[0] == word for said in world.heard(role))


@pytest.mark.fault("F17")
def test_it_serves_until_a_signal_and_lets_requests_end(world: World) -> None:
    world.run(world.serving, world.signal)
    assert ["drain", 5.0] in world.heard("http")
    assert world.heard("engine")[0][:3] == ["engine", "m", {"threads": 1}]
    settings = world.heard("http")[0][1]
    assert settings["api_keys"] == ["secret"]
    assert "loading 1/2" in world.messages
    assert count(world, "http", "ready") == 1  # progress of an engine that is ready is not told as another one
    assert not alive(world.pid("engine"))
    assert not alive(world.pid("http"))


def test_a_second_signal_ends_at_once(world: World) -> None:
    draining = world.until(lambda: count(world, "http", "drain") == 1)
    steps = (world.behave("http", "drains for ever"), world.serving, world.signal, draining, world.signal)
    world.run(*steps)
    assert not alive(world.pid("http"))


@pytest.mark.fault("F15")
def test_an_engine_that_dies_is_started_again_and_the_http_process_is_told(world: World) -> None:
    twice = world.until(lambda: count(world, "http", "ready") == 2)
    world.run(world.serving, world.kill("engine"), twice, world.signal)
    heard = [said[0] for said in world.heard("http")]
    assert heard.index("dead") < len(heard) - 1 - heard[::-1].index("ready")
    sockets = {said[2]["socket"] for said in world.heard("http") if said[0] == "ready"}
    assert len(sockets) == 2  # nobody reaches the old engine by the new one's name
    assert any("killed by SIGKILL; it starts again" in message for message in world.messages)
    keywords = [said[2] for said in world.heard("engine") if said[0] == "engine"]
    assert keywords == [{"threads": 1}, {"threads": 1, "force": True}]  # beside KV that workers still have


def test_an_http_process_that_dies_is_started_again_and_the_engine_stays(world: World) -> None:
    again = world.until(lambda: count(world, "http", "http") == 2 and count(world, "http", "ready") >= 2)
    world.run(world.serving, world.kill("http"), again, world.signal)
    assert count(world, "engine", "engine") == 1


def test_an_engine_that_does_not_start_ends_the_server(world: World) -> None:
    world.behave("engine", "fails")()
    with pytest.raises(InvalidRequest, match="no such model"):
        world.run()


@pytest.mark.fault("F15")
@pytest.mark.parametrize("how", ["fails", "dies"])
def test_a_restart_that_fails_ends_the_server(world: World, how: str) -> None:
    world.supervisor._engines["m"].backoff.first = 0.01  # seconds; six delays, each twice as long as the previous one
    with pytest.raises(EngineError, match="again"):
        world.run(world.serving, world.behave("engine", how), world.kill("engine"))
    assert not alive(world.pid("http"))


def test_an_engine_that_finds_no_attention_worker_is_started_once_more(world: World) -> None:
    thrice = world.until(lambda: count(world, "engine", "engine") == 3 and count(world, "http", "ready") == 2)
    world.run(world.serving, world.behave("engine", "has no workers"), world.kill("engine"), thrice, world.signal)
    assert any("no attention worker can be used" in message for message in world.messages)


@pytest.mark.parametrize(("how", "error"), [("fails", InvalidRequest), ("dies", EngineError)])
def test_an_http_process_that_never_serves_ends_the_server(world: World, how: str, error: type[Exception]) -> None:
    world.behave("http", how)()
    with pytest.raises(error):
        world.run()
    assert count(world, "http", "http") == 1


def test_a_child_that_reads_nothing_holds_nobody_up(world: World) -> None:
    def stop() -> None:
        os.kill(world.pid("http"), signal.SIGSTOP)
        child = world.supervisor._http.worker
        assert child is not None
        for _ in range(3):
            child.say("x" * 100_000)  # more than a pipe holds

    ending = world.until(lambda: any(message.startswith("ending") for message in world.messages))
    world.run(world.serving, stop, world.signal, ending, world.signal)  # two signals at once may be one
    assert not alive(world.pid("http"))


def test_a_signal_without_a_name_is_told_by_its_number(world: World) -> None:
    twice = world.until(lambda: count(world, "http", "http") == 2)
    world.run(world.serving, lambda: os.kill(world.pid("http"), 40), twice, world.signal)
    assert any("killed by signal 40" in message for message in world.messages)


def test_a_folder_that_is_too_long_for_sockets_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(InvalidRequest, match="TMPDIR"):
        world.run()


@pytest.mark.fault("F28")
def test_a_port_that_is_taken_is_named(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        plan = ServerPlan({"m": "m"}, {}, ServerSettings(model="m"), "127.0.0.1", port)
        with pytest.raises(InvalidRequest, match=f"cannot listen on 127.0.0.1:{port}"):
            Supervisor(plan, world).run()


def test_children_die_with_the_supervisor(tmp_path: Path) -> None:
    code = """
import lamina.server.processes.supervisor as s
from lamina.server.processes.server_plan import ServerPlan
from lamina.server.settings import ServerSettings
s.ENGINE_MODULE = s.HTTP_MODULE = "fake_server_child"
class Report:
    def progress(self, *news): pass
    def said(self, message): print(message, flush=True)
s.Supervisor(ServerPlan({"m": "m"}, {}, ServerSettings(model="m"), "127.0.0.1", 0), Report()).run()
"""
    environment = os.environ | {"FAKE_CHILD_FOLDER": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving m")
        pids = [int((tmp_path / f"{role}.pid").read_text()) for role in ("engine", "http")]
        process.kill()
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def test_no_child_has_the_keys_in_its_environment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys were in the environment of the HTTP process and of the engine, where all that they run reads them."""
    monkeypatch.setenv("LAMINA_API_KEY", "top-secret")
    inherited: list[str] = []

    def look() -> None:
        inherited.extend(Path(f"/proc/{world.pid(role)}/environ").read_text() for role in ("engine", "http"))

    world.run(world.serving, look, world.signal)
    assert len(inherited) == 2
    assert all("FAKE_CHILD_FOLDER" in each and "top-secret" not in each for each in inherited)


def test_folders_of_killed_servers_are_swept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was killed left its folder with the journal, all requests in it, in the temporary folder."""
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:  # sockets want a short path
        left, used = Path(parent) / "lamina-serve-left", Path(parent) / "lamina-serve-used"
        held = [lock(left), lock(used)]
        (left / "journal").mkdir()
        for folder in (left, used):
            os.utime(folder / "lock", (1000, 1000))
        os.close(held[0])
        monkeypatch.setattr(tempfile, "tempdir", parent)
        world.run(world.serving, world.signal)
        os.close(held[1])
        assert [path.name for path in Path(parent).iterdir()] == ["lamina-serve-used"]


def test_ps_lists_servers_with_their_models_while_they_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        monkeypatch.setattr(tempfile, "tempdir", parent)
        for name, text in (("dead", '{"address": "http://h:1", "models": {"m": 1}}'), ("odd", "[1]"), ("bad", "{")):
            held = lock(folder := Path(parent) / f"lamina-serve-{name}")
            (folder / "server.json").write_text(text)
            if name == "dead":
                os.close(held)
        shown: list[str] = []

        def show() -> None:
            shown.extend(CliRunner().invoke(app, words).stdout for words in (["ps"], ["ps", "--json"]))

        dead = world.until(lambda: "not loaded" in CliRunner().invoke(app, ["ps"]).stdout)
        world.run(world.serving, show, world.kill("engine"), dead, world.signal)
        heading, row = shown[0].splitlines()
        assert heading.split() == ["model", "engine", "address", "server", "up"]
        (server,) = map(json.loads, shown[1].splitlines())
        assert (server["pid"], list(server["models"])) == (os.getpid(), ["m"])
        assert row.split()[:4] == ["m", str(server["models"]["m"]), server["address"], str(os.getpid())]
        assert server["address"].startswith("http://127.0.0.1:")
        assert CliRunner().invoke(app, ["ps"]).stdout == "no server runs here: `lamina serve` starts one\n"


TWO = {"m": "m", "n": "n"}


@pytest.fixture
def two(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A server of two models, of which the HTTP process may have one loaded."""
    monkeypatch.setattr("lamina.server.processes.supervisor._SPARE_AFTER", 0.0)
    settings = ServerSettings(model="m", others=("n",))
    world.supervisor = Supervisor(ServerPlan(TWO, {}, settings, "127.0.0.1", 0, drain=5.0, journal=True), world)
    return world


def wants(world: World, message: Load | Unload) -> Callable[[], None]:
    return lambda: world.supervisor._calls.put(lambda: world.supervisor._take_from_http(message))


def said_of(world: World, model: str) -> list[str]:
    return [said[0] for said in world.heard("http")[1:] if said[1] == model]


def test_models_come_and_go_as_the_http_process_wants_them(two: World) -> None:
    def then(model: str, word: str) -> Callable[[], None]:
        return two.until(lambda: said_of(two, model)[-1:] == [word])

    spare = two.until(lambda: count(two, "spare", "prepare") == 1)
    two.run(
        two.serving, spare, wants(two, Unload("m")), then("m", "unloaded"), wants(two, Load("n")),
        then("n", "ready"), wants(two, Unload("n")), then("n", "unloaded"), wants(two, Load("m")),
        then("m", "ready"), two.signal,
    )  # fmt: skip
    assert [said[0] for said in two.heard("engine")] == ["engine", "stop", "engine"]
    assert [said[0] for said in two.heard("engine-n")] == ["engine", "stop"]
    journals = {
        said[2]["journal"].rpartition("/")[2] for role in ("engine", "engine-n") for said in two.heard(role)[:1]
    }
    assert journals == {"m", "n"}


def test_a_model_that_does_not_load_leaves_the_server(two: World) -> None:
    failed = two.until(lambda: ["unloaded", "n", "no such model"] in two.heard("http"))
    two.run(two.serving, two.behave("engine-n", "fails"), wants(two, Load("n")), failed, two.signal)


def test_a_process_that_dies_while_it_loads_a_further_model_leaves_the_server(two: World) -> None:
    failed = two.until(lambda: any(said[:2] == ["unloaded", "n"] and said[2] for said in two.heard("http")))
    two.run(two.serving, two.behave("engine-n", "dies"), wants(two, Load("n")), failed, two.signal)
