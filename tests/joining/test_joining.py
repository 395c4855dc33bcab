"""Servers and machines over real connections: codes, decisions, returns, losses, and someone in between."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import pytest
from joining_rig import ask, between, joiner, server, until

from lamina.errors import InvalidRequest
from lamina.joining import server as join_server
from lamina.joining.book import CODES_S, MOST_CODES, MOST_OF_ALL, MachineBook, NoRoom
from lamina.joining.pairing import Offer, plain_name
from lamina.joining.records import ServerRecords, known_servers
from lamina.joining.server import JoinServer
from lamina.joining.stream import MAX_MESSAGE, JoinListener, JoinRefused, connect
from lamina.version import __version__
from lamina_protocols.channels.channels import ChannelClosed, certificate_bytes
from lamina_protocols.channels.versions import PROTOCOL_VERSION
from lamina_workers.process.credentials import create_credentials


@pytest.fixture(autouse=True)
def unannounced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test speaks to the network."""
    monkeypatch.setattr(JoinServer, "_announce", lambda self: None)


def test_accepted_machine_serves_and_comes_back_after_every_end(tmp_path: Path) -> None:
    with server(tmp_path / "s") as first:
        port = first.port
        with joiner(tmp_path / "m", port) as machine:
            waiting = first.waiting()
            until(lambda: machine.code)
            assert waiting["code"] == machine.code
            assert (waiting["name"], waiting["address"], waiting["memory"]) == ("den", "127.0.0.1", 1 << 20)
            first.served.decide(waiting["id"], True)
            worker = until(lambda: first.workers.get("den"))
            assert worker.credentials.token
            assert b"CERTIFICATE" in worker.credentials.ca
            assert not list(tmp_path.rglob("*.pem"))
            first.served.lost("den")  # the engine gives it up: another worker, under another name
            address = until(lambda: first.workers.get("den.1")).address
            assert address != worker.address
            first.served.close()
            with server(tmp_path / "s", port) as second:  # the same machine, without a word from anybody
                until(lambda: second.state() == ["serving"])
                assert second.workers["den"].address == address  # the worker has stayed
                machine.leave()
                assert machine.failure is None
                assert second.asked == ["den"]
                until(lambda: second.state() == ["lost"])
                assert not second.workers
        with server(tmp_path / "s", port) as third, joiner(tmp_path / "m", port, agree=None) as again:
            until(lambda: third.state() == ["serving"])  # nobody is asked again
            third.served.decide(third.machines[0]["id"], False)
            until(again.ended)
            assert "operator does not want" in str(again.failure)
            assert third.machines == []
            assert known_servers(tmp_path / "m") == []


def test_both_sides_must_agree(tmp_path: Path) -> None:
    with server(tmp_path / "s") as taking:
        with joiner(tmp_path / "m", taking.port, agree=None) as machine:
            taking.served.decide(taking.waiting()["id"], True)
            time.sleep(1.0)
            assert not taking.workers
            machine.agree = False
            until(machine.ended)
            assert "the codes differ" in str(machine.failure)
        until(lambda: taking.machines == [])
        with joiner(tmp_path / "m", taking.port) as machine:
            taking.served.decide(taking.waiting()["id"], False)
            until(machine.ended)
            assert "does not want this machine" in str(machine.failure)
        assert known_servers(tmp_path / "m") == []


def test_a_machine_is_removed_though_that_cannot_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker stayed the engine's, and the page went on showing it."""

    def refused(*_: object) -> None:
        raise InvalidRequest("the disk is full")

    with server(tmp_path / "s") as taking, joiner(tmp_path / "m", taking.port):
        id = taking.waiting()["id"]
        taking.served.decide(id, True)
        until(lambda: taking.workers)
        monkeypatch.setattr(ServerRecords, "write", refused)
        with pytest.raises(InvalidRequest, match="the disk is full"):
            taking.served.decide(id, False)
        assert not taking.workers
        assert not taking.machines


def test_someone_in_between_has_another_code(tmp_path: Path) -> None:
    """The classical attack: one TLS connection to each side, all messages passed on unchanged."""
    own = create_credentials(["x"])
    listener = JoinListener("127.0.0.1", 0, own, certificate_bytes(own.cert))

    def pass_on(port: int) -> None:
        stream = listener.accept()
        assert stream is not None
        stream.open()
        with stream, connect("127.0.0.1", port) as onward:
            while True:
                for one, other in ((stream, onward), (onward, stream)):
                    try:
                        if message := one.receive(0.1):
                            other.send(message.pop("type"), **message)
                    except ChannelClosed:
                        return

    with server(tmp_path / "s") as taking:
        threading.Thread(target=pass_on, args=(taking.port,), daemon=True).start()
        with joiner(tmp_path / "m", listener.port, agree=None) as machine:
            waiting = taking.waiting()
            until(lambda: machine.code)
            assert machine.code != waiting["code"]
    listener.close()


def test_no_machine_is_called_as_a_code(tmp_path: Path) -> None:
    """Someone in between, who knows the code of a machine first, cannot have that code as its name at the server."""
    with (
        server(tmp_path / "s") as taking,
        between(taking.port, lambda _, code: code) as attacker,
        joiner(tmp_path / "m", attacker.port, agree=None) as machine,
    ):
        until(lambda: machine.code)
        until(attacker.done.is_set)
        assert attacker.failure is not None
        assert taking.machines == []
    assert [plain_name(host) for host in ("482193", "482-193.lan", "--", "den-7.lan", "1" * 40)] == [
        "machine-482193", "machine-482-193", "machine", "den-7", "machine-" + "1" * 24,
    ]  # fmt: skip


def test_known_server_is_known_by_its_certificate(tmp_path: Path) -> None:
    """Another server at the same address never gets the key, but a code to compare."""
    with server(tmp_path / "s") as first:
        port = first.port
        with joiner(tmp_path / "m", port):
            first.served.decide(first.waiting()["id"], True)
            until(lambda: first.workers)
    with server(tmp_path / "other", port) as other, joiner(tmp_path / "m", port, agree=None) as machine:
        assert other.waiting()["code"]
        until(lambda: machine.code)
        other.served.close()
        until(machine.ended)  # a second code would be a second guess for someone in between
        assert "the connection broke" in str(machine.failure) or "has closed" in str(machine.failure)


def test_wrong_key_and_other_version_are_refused(tmp_path: Path) -> None:
    with server(tmp_path / "s") as taking:
        with connect("127.0.0.1", taking.port) as stream:
            stream.send("resume", version=__version__, id="00" * 8, key="00" * 32)
            with pytest.raises(JoinRefused, match="unknown"):
                stream.expect("resumed", seconds=10)
        with connect("127.0.0.1", taking.port) as stream:
            stream.send("pair", version="0", protocol=77, name="a", memory=1, commitment="00" * 32)
            with pytest.raises(JoinRefused, match=rf"the engine has {PROTOCOL_VERSION}, this worker 77"):
                stream.expect("nonce", seconds=10)


def test_codes_are_rationed_and_a_changed_nonce_has_none(tmp_path: Path) -> None:
    with server(tmp_path / "s") as taking:
        for _ in range(MOST_CODES):
            with connect("127.0.0.1", taking.port) as stream:
                ask(stream)
                stream.send("reveal", nonce="00" * 32)
                with pytest.raises(ChannelClosed):
                    stream.expect("accepted", seconds=10)
        with connect("127.0.0.1", taking.port) as stream, pytest.raises(JoinRefused, match="try again in"):
            ask(stream)
        assert taking.machines == []


def test_codes_are_rationed_by_address() -> None:
    """One address that asks again and again keeps no other away, and many together get no more guesses."""
    book = MachineBook()
    for number in range(MOST_CODES):
        book.begin_code("10.0.0.66", 0.0)
        book.wait(f"{number}", Offer("evil", 1), f"{number:06d}", "10.0.0.66", 0.0)
    with pytest.raises(NoRoom, match=f"{MOST_CODES} machines at 10.0.0.66 have asked lately; try again in 300 s"):
        book.begin_code("10.0.0.66", 0.0)
    for number in range(MOST_OF_ALL - MOST_CODES):
        book.begin_code(f"10.0.1.{number}", 1.0)
    with pytest.raises(NoRoom, match=f"{MOST_OF_ALL} machines have asked lately; try again in 299 s"):
        book.begin_code("10.0.0.2", 1.0)
    book.begin_code("10.0.0.66", CODES_S)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * MAX_MESSAGE + b"\n",
        b"x" * (2 * MAX_MESSAGE),
        b'{"type": "pair"}\n',
        b'{"type": 5}\n',
        json.dumps({"type": "pair", "version": __version__, "name": "a\x1b[2J", "memory": 1}).encode() + b"\n",
        json.dumps({"type": "pair", "version": __version__, "name": "a", "memory": True}).encode() + b"\n",
        json.dumps({"type": "resume", "version": __version__, "id": {}, "key": None}).encode() + b"\n",
    ],
)
def test_nonsense_ends_its_own_connection(tmp_path: Path, said: bytes) -> None:
    with server(tmp_path / "s") as taking:
        with connect("127.0.0.1", taking.port) as stream:
            stream._sock.sendall(said)
            with pytest.raises((ChannelClosed, JoinRefused)):
                stream.expect("nonce", seconds=10)
        with connect("127.0.0.1", taking.port) as stream:
            ask(stream)


def test_silent_strangers_do_not_keep_a_machine_away(tmp_path: Path) -> None:
    with server(tmp_path / "s") as taking:
        strangers = [socket.create_connection(("127.0.0.1", taking.port)) for _ in range(3 * join_server._MOST_UNKNOWN)]
        with connect("127.0.0.1", taking.port) as stream:
            ask(stream)
        assert len(taking.served._unknown) <= join_server._MOST_UNKNOWN
        for stranger in strangers:
            stranger.close()


def test_folder_is_of_one_server_and_damage_is_named(tmp_path: Path) -> None:
    with server(tmp_path / "s"), pytest.raises(InvalidRequest, match="XDG_STATE_HOME"):
        JoinServer("127.0.0.1", 0, tmp_path / "s", None)  # type: ignore[arg-type]  # it is not reached
    file = tmp_path / "s" / "server.json"
    assert file.stat().st_mode & 0o777 == 0o600
    for damage in ('{"machines": [{"id": 5}]}', '{"certificate": "\\ud800"}'):
        file.write_text(damage)
        with pytest.raises(InvalidRequest, match="damaged"):
            JoinServer("127.0.0.1", 0, tmp_path / "s", None)  # type: ignore[arg-type]
