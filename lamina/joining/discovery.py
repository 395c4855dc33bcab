"""Which server a machine joins (`reach`): the one that was named, else the one it knows, else the only one on the
network.

Servers announce themselves, and are found, by multicast DNS (RFC 6762). This is the only file that loads zeroconf. An
answer is a hint and nothing more, since any machine on the network can give one, also in another's name. A server is
told from others by its certificate, whose fingerprint it announces the beginning of. The pairing code, or the
fingerprint that is known from earlier, says whether it is the right one.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lamina.errors import LaminaError
from lamina.joining.pairing import JOIN_PORT, fingerprint, plain_name
from lamina.joining.records import KnownServer
from lamina.joining.stream import JoinFailed, MessageStream, connect
from lamina_protocols.channels.channels import ChannelClosed, split_address

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

SERVICE = "_lamina._tcp.local."
MISSING = "zeroconf is not installed (pip install zeroconf)"
_ID = 16  # digits of a fingerprint that are announced
_MOST = 32  # servers
_ADDRESSES = 8  # of each
_ASK_MS = 1000
_LOOK_S = 0.2
_FIND_S = 4.0  # seconds for which servers of the network may answer


def reach(named: str | None, known: Sequence[KnownServer], over: Callable[[], bool]) -> MessageStream:
    """A connection to the server to join; the search ends early once it is `over`. Raises ChannelClosed, NoDiscovery,
    and JoinFailed where there is none such."""
    if named is not None:
        return connect(*host_and_port(named))
    for server in known[:1]:
        try:
            stream = connect(server.host, server.port, 3.0)
        except ChannelClosed:
            break
        if fingerprint(stream.certificate) == server.fingerprint:
            return stream
        stream.close()
    fingerprints = [server.fingerprint for server in known]
    servers = find(_FIND_S, fingerprints, over)
    back = [server for server in servers if server.is_any_of(fingerprints)]
    if not back and known:
        others = f" (others are: {_listed(servers)}; --server joins one)" if servers else ""
        raise ChannelClosed(f"the server {known[0].name} is not there{others}")
    if not servers:
        raise JoinFailed(
            f"no server answers on this network within {_FIND_S:g} s: start one with `lamina serve --allow-join`, or "
            "name it with --server HOST where multicast does not reach it"
        )
    if len(servers) > 1 and not back:
        raise JoinFailed(f"there are several servers: {_listed(servers)}; choose one with --server HOST:PORT")
    return _first_that_answers(back or servers, over)


def host_and_port(text: str) -> tuple[str, int]:
    """Of "host", "host:port", "v6" or "[v6]:port". Raises AddressError."""
    if text.startswith("["):
        return split_address(text if not text.endswith("]") else f"{text}:{JOIN_PORT}")
    return split_address(text) if text.count(":") == 1 else (text, JOIN_PORT)


def _first_that_answers(servers: Sequence[FoundServer], over: Callable[[], bool]) -> MessageStream:
    """A connection to the first address that answers with the certificate that was announced: any machine can announce
    another one's id, at many addresses. Raises ChannelClosed, also once it is `over`."""
    why = "no server has an address"
    for server in servers:
        for host in server.hosts:
            if over():
                raise ChannelClosed(why)
            try:
                stream = connect(host, server.port, 2.0)
            except ChannelClosed as error:
                why = str(error)
                continue
            if server.is_any_of([fingerprint(stream.certificate)]):
                return stream
            stream.close()
            why = f"{host}:{server.port} says that it is {server.name}, and has another certificate"
    raise ChannelClosed(why)


def _listed(found: Sequence[FoundServer]) -> str:
    return ", ".join(f"{server.name} at {server.hosts[0]}:{server.port}" for server in found)


class NoDiscovery(LaminaError):
    """Multicast DNS cannot be used here."""


@dataclass(frozen=True, slots=True)
class FoundServer:
    """A server that announces itself. `id`: the beginning of its certificate's fingerprint, as it says."""

    name: str
    hosts: tuple[str, ...]
    port: int
    id: str

    def is_any_of(self, fingerprints: Collection[str]) -> bool:
        """Whether it says that it is one of these."""
        return any(fingerprint.startswith(self.id) for fingerprint in fingerprints)


class Announcement:
    """Announces a server that listens at `host` and `port`, until it is closed. Raises NoDiscovery."""

    def __init__(self, name: str, host: str, port: int, fingerprint: str) -> None:
        self._zeroconf = _zeroconf(host)
        try:
            from zeroconf import ServiceInfo

            addresses = own_addresses(host == "::") if host in ("0.0.0.0", "::") else [host]
            info = ServiceInfo(
                SERVICE,
                f"{name}-{fingerprint[:6]}.{SERVICE}",
                port=port,
                properties={"id": fingerprint[:_ID], "name": name},
                parsed_addresses=addresses,
                server=f"{name}-{fingerprint[:6]}.local.",
            )
            self._zeroconf.register_service(info, allow_name_change=True)
        except Exception as error:  # of sockets, names and zeroconf's own
            self.close()
            raise NoDiscovery(f"the server cannot be announced: {error}") from error

    def close(self) -> None:
        self._zeroconf.close()


class _Finder:
    """Collects what answers, on zeroconf's threads. Nothing is replaced or removed: another machine could announce the
    same service, or its end, to be the only server."""

    def __init__(self) -> None:
        self.servers: dict[tuple[str, int], FoundServer] = {}  # by id and port

    def add_service(self, zeroconf: Zeroconf, kind: str, name: str) -> None:
        with suppress(Exception):  # the answer may be anything
            info = zeroconf.get_service_info(kind, name, _ASK_MS)
            if info is not None and (server := _server(info)) is not None and len(self.servers) < _MOST:
                before = self.servers.get(key := (server.id, server.port), server)
                hosts = dict.fromkeys((*before.hosts, *server.hosts))
                self.servers[key] = replace(before, hosts=tuple(hosts)[:_ADDRESSES])

    update_service = add_service

    def remove_service(self, zeroconf: Zeroconf, kind: str, name: str) -> None: ...


def find(
    seconds: float, wanted: Collection[str] = (), over: Callable[[], bool] = bool, host: str = "0.0.0.0"
) -> list[FoundServer]:
    """The servers that answer within so many seconds, at once where one is `wanted` (fingerprints) or it is `over`.
    `host`: the address whose network is asked; 0.0.0.0: all. Raises NoDiscovery."""
    zeroconf = _zeroconf(host)
    try:
        from zeroconf import ServiceBrowser

        finder: Any = _Finder()
        ServiceBrowser(zeroconf, SERVICE, listener=finder)
        pause, remaining = threading.Event(), seconds
        while remaining > 0 and not over() and not any(hit.is_any_of(wanted) for hit in list(finder.servers.values())):
            pause.wait(_LOOK_S)
            remaining -= _LOOK_S
        return sorted(finder.servers.values(), key=lambda server: server.name)
    finally:
        zeroconf.close()


def own_addresses(both: bool = False) -> list[str]:
    """This machine's IPv4 addresses that others can reach; with `both` its IPv6 addresses too."""
    import ifaddr

    every = [ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    addresses = [ip for ip in every if isinstance(ip, str)] + [
        ip[0] for ip in every if both and not isinstance(ip, str)
    ]
    kinds = [ipaddress.ip_address(address) for address in addresses]
    return [str(kind) for kind in kinds if not kind.is_loopback and not kind.is_link_local][:_ADDRESSES]


def _zeroconf(host: str) -> Zeroconf:
    try:
        from zeroconf import InterfaceChoice, IPVersion, Zeroconf
    except ImportError:
        raise NoDiscovery(MISSING) from None
    try:
        everywhere = host in ("0.0.0.0", "::")
        return Zeroconf(
            interfaces=InterfaceChoice.All if everywhere else [host],
            ip_version=IPVersion.V4Only if "." in host else IPVersion.All,
        )
    except OSError as error:
        raise NoDiscovery(f"multicast DNS cannot be used here: {error}") from error


def _server(info: ServiceInfo) -> FoundServer | None:
    hosts = tuple(info.parsed_addresses())[:_ADDRESSES]
    properties = {key: (value or b"").decode("ascii", "replace") for key, value in info.properties.items()}
    id = properties.get(b"id", "")
    if not hosts or not info.port or len(id) != _ID:
        return None
    return FoundServer(plain_name(properties.get(b"name", "")), hosts, info.port, id)
