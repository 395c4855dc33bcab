"""Everything that listens and connects does so over IPv6 too."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
from attention_servers import WAYS, connected, one_batch, running

from lamina.joining import discovery
from lamina.joining.stream import JoinListener
from lamina.server.processes.supervisor import address_of, listening
from lamina_protocols.channels.channels import AddressError, certificate_bytes, join_address, split_address
from lamina_workers.parallel.peers import PeerListener
from lamina_workers.process.credentials import create_credentials


def loopback() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not loopback(), reason="there is no IPv6 here")


@pytest.mark.fault("F28")
@needs_ipv6
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("way", ["local", "grpc", "tcp"])
def test_a_worker_is_reached_over_every_channel(way: str, tls: bool) -> None:
    made = create_credentials(["::1"]) if tls else None
    with running(listen="[::1]:0", **({"credentials": made} if made else {})) as (_, address):
        assert split_address(address)[0] == "::1"
        with connected(address, credentials=made, **WAYS[way], timeout=30.0) as port:
            assert port.channel_kind == way
            one_batch(port)


@needs_ipv6
def test_an_http_server_and_model_worker_0_listen() -> None:
    with listening("::1", 0) as sock:
        assert address_of(sock).startswith("http://[::1]:")
    listener = PeerListener(*[lambda *_: None] * 5, host="::1")  # type: ignore[arg-type]
    try:
        assert split_address(listener.address)[0] == "::1"
        socket.create_connection(split_address(listener.address), 5).close()
    finally:
        listener.close()


@pytest.mark.fault("F28")
@needs_ipv6
@pytest.mark.parametrize(("host", "reached"), [("::1", ["::1"]), ("::", ["::1", "127.0.0.1"])])
def test_machines_join_over_both_families_where_the_server_listens_everywhere(host: str, reached: list[str]) -> None:
    made = create_credentials(["lamina"])
    listener = JoinListener(host, 0, made, certificate_bytes(made.cert))
    try:
        for where in reached:
            with socket.create_connection((where, listener.port), 5):
                stream = listener.accept()
                assert stream is not None
                assert (stream.here, stream.there) == (where, where)
                stream.close()
    finally:
        listener.close()


def test_a_server_that_listens_everywhere_announces_what_others_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ("127.0.0.1", "192.0.2.7", "169.254.1.1", ("::1", 0, 0), ("fe80::1", 0, 2), ("2001:db8::7", 0, 0))
    adapter = SimpleNamespace(ips=[SimpleNamespace(ip=ip) for ip in found])
    monkeypatch.setattr("ifaddr.get_adapters", lambda: [adapter])
    assert discovery.own_addresses() == ["192.0.2.7"]
    assert discovery.own_addresses(both=True) == ["192.0.2.7", "2001:db8::7"]


@pytest.mark.parametrize(("host", "port"), [("::1", 5), ("2001:db8::1", 65535), ("fe80::1%eth0", 1), ("a.example", 0)])
def test_addresses_are_taken_apart_as_they_were_joined(host: str, port: int) -> None:
    assert split_address(join_address(host, port)) == (host, port)


NO_ADDRESSES = """::1:50051 [::1] [::1:5 ::1]:5 [a]:5 []:5 a:b:5 [[::1]]:5 host host: host:99999 :1 host:-1"""


@pytest.mark.parametrize("wrong", ["", *NO_ADDRESSES.split()])
def test_what_is_no_address_is_refused_naming_the_form(wrong: str) -> None:
    with pytest.raises(AddressError, match=r"expected HOST:PORT or \[IPv6\]:PORT"):
        split_address(wrong)
