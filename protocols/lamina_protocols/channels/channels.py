"""The channel, which carries whole frames in order, and what all kinds of it share: credentials, addresses, checksums.

`sockets` implements it over Unix sockets and TCP, `grpc_client` over a gRPC stream. Sockets take their TLS from here
too: the contexts of a server and of a client, made from PEM bytes. They speak TLS 1.3 and above.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from lamina_protocols.errors import CorruptFrame, LaminaError, ProtocolError

SECRET_SIZE = 32  # bytes by which a connection shows whose it is
CHECKSUM_SIZE = 4  # bytes after each frame, where neither TLS nor the kernel of one host protects its bytes


class ChannelClosed(LaminaError):
    """The other side is gone, or this side closed the channel. The channel is of no more use."""


class AddressError(LaminaError):
    """A text is no address of the form host:port."""


class Channel(Protocol):
    """Frames in both directions. One thread sends and receives; any thread may call `close`.

    Raises ChannelClosed where it is closed, and ProtocolError for bytes that are no frame: it then receives no more,
    and every further `receive` raises the same.
    """

    bytes_sent: int
    bytes_received: int

    def send(self, buffers: Sequence[bytes | memoryview], timeout: float | None = None) -> None:
        """Send one frame, given as buffers in order; they may be changed once this returns. Raises TimeoutError where
        the other side has not taken it within `timeout` seconds; the channel is then of no more use."""

    def receive(self, timeout: float | None = None) -> memoryview:
        """The next frame, in writable memory of its own. Raises TimeoutError after `timeout` seconds without one."""

    def ready(self) -> bool:
        """Whether `receive` would return or raise at once."""

    def post(self, buffers: Sequence[bytes | memoryview]) -> None:
        """`send` without waiting: what the other side does not take at once is kept, and `flush` sends it."""

    def flush(self) -> bool:
        """Send what was posted, as far as possible without waiting. Returns whether there is room to post more."""

    def watch(self, wake: Callable[[], None]) -> int | None:
        """The file descriptor to poll; None where the channel instead calls `wake` when it can receive or send."""

    def unseen(self) -> bool:
        """Whether a poll of the descriptor could miss what has arrived already, or what was posted."""

    def close(self) -> None:
        """End both directions; a `receive` or `send` that waits raises ChannelClosed. May be called again."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one side presents and what it accepts: PEM bytes, and the shared token. All empty: no TLS, no token.

    A server with `cert` and `key` speaks TLS; where TLS is mutual, it asks clients for certificates of `ca`.
    A client with `ca` speaks TLS, and presents `cert` and `key` where it has them.
    """

    ca: bytes = b""
    cert: bytes = b""
    key: bytes = field(default=b"", repr=False)
    token: str = field(default="", repr=False)


def split_address(address: str) -> tuple[str, int]:
    """The host and the port of host:port or [v6]:port. Raises AddressError."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not host or not port.isdecimal() or int(port) > 65535 or bracketed != (":" in host) or set("[]") & set(host):
        raise AddressError(f"address {address!r:.80}, expected HOST:PORT or [IPv6]:PORT with a port up to 65535")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The address that `split_address` takes apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host name or IP address means this host and nothing else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checksum(buffers: Iterable[bytes | memoryview]) -> bytes:
    """CRC-32 of the buffers one after the other, little-endian."""
    value = 0
    for buffer in buffers:
        value = zlib.crc32(buffer, value)
    return value.to_bytes(CHECKSUM_SIZE, "little")


def verified(memory: memoryview, size: int) -> memoryview:
    """The frame of `size` bytes at the start of `memory`. Raises CorruptFrame if a checksum follows and differs."""
    frame = memory[:size]
    if len(memory) > size and checksum([frame]) != memory[size:]:
        raise CorruptFrame(f"the checksum of a frame of {size} bytes does not agree")
    return frame


def check_size(buffers: Sequence[bytes | memoryview], max_frame: int) -> int:
    """The size in bytes of a frame to send. Raises ProtocolError for more than the other side accepts."""
    size = sum(map(len, buffers))
    if size > max_frame:
        raise ProtocolError(f"frame of {size} bytes, the other side takes up to {max_frame}")
    return size


TlsContext: TypeAlias = ssl.SSLContext

TLS_NOT_NOW = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""What a non-blocking TLS socket raises instead of waiting."""


def is_tls(sock: object) -> bool:
    return isinstance(sock, ssl.SSLSocket)


_CHANGED = (
    "bad record mac", "record layer failure", "record overflow", "wrong version number", "unexpected message",
    "decode error",
)  # fmt: skip
"""In OpenSSL's words what ends an established connection whose bits have changed: the second is what 3.2 and later say
of every record that is wrong, the others are alerts from the other side, or older versions'."""


def is_corrupt(error: OSError) -> bool:
    """Whether bits have changed on the way, as this side has found or the other one says."""
    message = str(error).lower()  # `reason` is None where Python does not know OpenSSL's number
    return isinstance(error, ssl.SSLError) and any(sign in message for sign in _CHANGED)


def handshake(sock: object) -> None:
    """Do the handshake that was put off; nothing for a socket without TLS. Raises OSError."""
    if isinstance(sock, ssl.SSLSocket):
        sock.do_handshake()


def server_context(credentials: Credentials, mutual: bool) -> ssl.SSLContext:
    """TLS of a server; with `mutual`, clients must show a certificate of the CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load_certificate(context, credentials)
    if mutual:
        context.load_verify_locations(cadata=credentials.ca.decode())
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(credentials: Credentials) -> ssl.SSLContext:
    """TLS of a client, which trusts only the CA given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=credentials.ca.decode())
    if credentials.cert:
        _load_certificate(context, credentials)
    return context


def unchecked_context() -> ssl.SSLContext:
    """TLS of a client that checks the server's certificate itself: the context takes any."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def peer_certificate(sock: ssl.SSLSocket) -> bytes:
    """The certificate in DER that the other side has shown."""
    return sock.getpeercert(binary_form=True) or b""


def certificate_bytes(pem: bytes) -> bytes:
    """A certificate in DER from its PEM."""
    return ssl.PEM_cert_to_DER_cert(pem.decode().strip())


def _load_certificate(context: ssl.SSLContext, credentials: Credentials) -> None:
    # `ssl` reads only files, and a key is not for a disk: Linux has files in memory.
    linux = sys.platform == "linux"
    with open(os.memfd_create("tls"), "wb") if linux else tempfile.NamedTemporaryFile() as file:
        file.write(credentials.cert + b"\n" + credentials.key)
        file.flush()
        context.load_cert_chain(f"/dev/fd/{file.fileno()}" if linux else file.name)
