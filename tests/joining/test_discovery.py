"""Servers announced and found by multicast DNS, on loopback alone."""

from __future__ import annotations

import pytest

from lamina.joining import discovery, finding
from lamina.joining.discovery import FoundServer, NoDiscovery
from lamina.joining.stream import JoinFailed
from lamina_protocols.channels import AddressError

ID = "ab" * 32


def test_announced_server_is_found_and_known_by_its_fingerprint() -> None:
    pytest.importorskip("zeroconf", reason="zeroconf is of the extra join")
    try:
        announced = discovery.Announcement("den", "127.0.0.1", 7717, ID)
    except NoDiscovery as error:
        pytest.skip(f"no multicast here: {error}")
    try:
        (found,) = discovery.find(10.0, [ID], host="127.0.0.1")
        assert found == FoundServer("den", ("127.0.0.1",), 7717, ID[:16])
        assert found.is_any_of([ID])
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


def test_servers_are_named_with_and_without_a_port() -> None:
    named = ("den", "den:80", "10.0.0.1", "fe80::1", "[fe80::1]", "[fe80::1]:80")
    assert [finding.host_and_port(text) for text in named] == [
        ("den", 7717), ("den", 80), ("10.0.0.1", 7717), ("fe80::1", 7717), ("fe80::1", 7717), ("fe80::1", 80),
    ]  # fmt: skip
    with pytest.raises(AddressError):
        finding.host_and_port("den:x")
