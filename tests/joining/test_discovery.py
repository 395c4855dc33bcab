"""Servers announced and found by multicast DNS, on loopback alone."""

from __future__ import annotations

import secrets
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lamina.joining import discovery
from lamina.joining import discovery as finding
from lamina.joining.discovery import FoundServer, NoDiscovery, _Finder
from lamina.joining.records import KnownServer
from lamina.joining.stream import JoinFailed
from lamina_protocols.channels.channels import AddressError, ChannelClosed

ID = "ab" * 32


def test_announced_server_is_found_and_known_by_its_fingerprint() -> None:
    pytest.importorskip("zeroconf", reason="zeroconf is of the extra join")
    id = secrets.token_hex(32)  # other servers, also of other tests, may be there
    try:
        announced = discovery.Announcement("den", "127.0.0.1", 7717, id)
    except NoDiscovery as error:
        pytest.skip(f"no multicast here: {error}")
    try:
        (found,) = (each for each in discovery.find(10.0, [id], host="127.0.0.1") if each.is_any_of([id]))
        assert found == FoundServer("den", ("127.0.0.1",), 7717, id[:16])
        assert not found.is_any_of(["cd" * 32])
    finally:
        announced.close()


@pytest.mark.parametrize(
    ("found", "what"),
    [
        ([], "no server answers"),
        ([FoundServer("a", ("h",), 1, ""), FoundServer("b", ("i",), 2, "")], "several servers: a at h:1, b at i:2"),
    ],
)
def test_choice_is_left_to_people(monkeypatch: pytest.MonkeyPatch, found: list[FoundServer], what: str) -> None:
    monkeypatch.setattr(finding, "find", lambda *_: found)
    with pytest.raises(JoinFailed, match=what):
        finding.reach(None, [], lambda: False)


def info(host: str, id: str, port: int = 7717) -> Any:
    """What zeroconf tells of a service."""
    properties = {b"id": id.encode(), b"name": b"den"}
    return SimpleNamespace(parsed_addresses=lambda: [host], port=port, properties=properties)


def heard(*infos: Any) -> list[FoundServer]:
    """What is found where these answers come, all for one service, and then that it has ended."""
    finder, browsed = _Finder(), cast(Any, SimpleNamespace(get_service_info=lambda *_: next(answers)))
    answers = iter(infos)
    for tell in (finder.add_service, *[finder.update_service] * (len(infos) - 1), finder.remove_service):
        tell(browsed, discovery.SERVICE, "den-abcdef")
    return list(finder.servers.values())


def test_who_announces_the_service_of_another_server_does_not_replace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right, liar = info("10.0.0.1", "ab" * 8), info("10.0.0.66", "cd" * 8)
    for answers in ((right, liar), (liar, right)):
        servers = heard(*answers)
        monkeypatch.setattr(finding, "find", lambda *_, servers=servers: servers)
        with pytest.raises(JoinFailed, match="several servers"):
            finding.reach(None, [], lambda: False)


def test_who_announces_the_id_of_another_server_is_not_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of one server are collected, as they come one after another."""
    (server,) = heard(info("10.0.0.66", "ab" * 8), info("10.0.0.1", "ab" * 8), info("10.0.0.66", "ab" * 8))
    assert server.hosts == ("10.0.0.66", "10.0.0.1")
    streams = {host: SimpleNamespace(certificate=host, close=list) for host in server.hosts}
    monkeypatch.setattr(finding, "connect", lambda host, *_: streams[host])
    monkeypatch.setattr(finding, "fingerprint", lambda shown: ID if shown == "10.0.0.1" else "cd" * 32)
    monkeypatch.setattr(finding, "find", lambda *_: [server])
    assert finding.reach(None, [], lambda: False).certificate == cast(Any, "10.0.0.1")
    assert heard(info("10.0.0.1", "")) == []


def test_who_announces_the_id_of_a_known_server_needs_its_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody could have a machine, which with --yes asks nobody, join another server when its own was gone."""
    known = KnownServer(ID, "den", "1" * 16, "2" * 64, "gone", 1)
    liar, right = (FoundServer("den", (host,), 1, ID[:16]) for host in ("liar", "right"))
    closed = []

    class Stream:
        def __init__(self, host: str) -> None:
            self.certificate = host.encode()

        def close(self) -> None:
            closed.append(self.certificate)

    def connect(host: str, *_: object) -> Stream:
        if host == "gone":
            raise ChannelClosed("gone")
        return Stream(host)

    monkeypatch.setattr(finding, "connect", connect)
    monkeypatch.setattr(finding, "fingerprint", lambda shown: ID if shown == b"right" else "cd" * 32)
    monkeypatch.setattr(finding, "find", lambda *_: [liar, right])
    assert finding.reach(None, [known], lambda: False).certificate == b"right"
    assert closed == [b"liar"]
    monkeypatch.setattr(finding, "find", lambda *_: [liar])
    with pytest.raises(ChannelClosed, match="another certificate"):
        finding.reach(None, [known], lambda: False)


def test_who_announces_many_addresses_of_a_known_server_keeps_no_machine_from_leaving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """32 servers of 8 addresses that do not answer were tried one after another, whoever pressed Ctrl-C meanwhile."""
    known = KnownServer(ID, "den", "1" * 16, "2" * 64, "gone", 1)
    tried: list[str] = []

    def connect(host: str, *_: object) -> Any:
        tried.append(host)
        raise ChannelClosed("no answer")

    hosts = tuple(f"10.0.0.{number}" for number in range(8))
    monkeypatch.setattr(finding, "connect", connect)
    monkeypatch.setattr(finding, "find", lambda *_: [FoundServer("den", hosts, port, ID[:16]) for port in range(1, 33)])
    with pytest.raises(ChannelClosed, match="no answer"):
        finding.reach(None, [known], lambda: len(tried) >= 3)
    assert len(tried) == 3


def test_servers_are_named_with_and_without_a_port() -> None:
    named = ("den", "den:80", "10.0.0.1", "fe80::1", "[fe80::1]", "[fe80::1]:80")
    assert [finding.host_and_port(text) for text in named] == [
        ("den", 7717), ("den", 80), ("10.0.0.1", 7717), ("fe80::1", 7717), ("fe80::1", 7717), ("fe80::1", 80),
    ]  # fmt: skip
    with pytest.raises(AddressError):
        finding.host_and_port("den:x")
