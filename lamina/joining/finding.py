"""Which server a machine joins: the one that was named, else the one it knows, else the only one on the network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from lamina.joining.discovery import FoundServer, find
from lamina.joining.pairing import JOIN_PORT, fingerprint
from lamina.joining.records import KnownServer
from lamina.joining.stream import JoinFailed, MessageStream, connect
from lamina_protocols.channels.channels import ChannelClosed, split_address

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
    wanted = [server.fingerprint for server in known]
    found = find(_FIND_S, wanted, over)
    back = [server for server in found if server.is_any_of(wanted)]
    if not back and known:
        others = f" (others are: {_listed(found)}; --server joins one)" if found else ""
        raise ChannelClosed(f"the server {known[0].name} is not there{others}")
    if not found:
        raise JoinFailed(
            f"no server answers on this network within {_FIND_S:g} s: start one with `lamina serve --allow-join`, or "
            "name it with --server HOST where multicast does not reach it"
        )
    if len(found) > 1 and not back:
        raise JoinFailed(f"there are several servers: {_listed(found)}; choose one with --server HOST:PORT")
    return _first_that_answers(back or found, wanted)


def host_and_port(text: str) -> tuple[str, int]:
    """Of "host", "host:port", "v6" or "[v6]:port". Raises AddressError."""
    if text.startswith("["):
        return split_address(text if not text.endswith("]") else f"{text}:{JOIN_PORT}")
    return split_address(text) if text.count(":") == 1 else (text, JOIN_PORT)


def _first_that_answers(servers: Sequence[FoundServer], wanted: Collection[str]) -> MessageStream:
    """A connection to the first address that answers, as one of those `wanted` if there are any: anybody can announce
    the id of a server that is known. Raises ChannelClosed."""
    why = "no server has an address"
    for server in servers:
        for host in server.hosts:
            try:
                stream = connect(host, server.port, 2.0)
            except ChannelClosed as error:
                why = str(error)
                continue
            if not wanted or fingerprint(stream.certificate) in wanted:
                return stream
            stream.close()
            why = f"{host}:{server.port} says that it is {server.name}, and has another certificate"
    raise ChannelClosed(why)


def _listed(found: Sequence[FoundServer]) -> str:
    return ", ".join(f"{server.name} at {server.hosts[0]}:{server.port}" for server in found)
