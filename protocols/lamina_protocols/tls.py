"""TLS of sockets: the contexts of a server and of a client, made from PEM bytes. TLS 1.3 and above."""

from __future__ import annotations

import os
import ssl
import sys
import tempfile
from typing import TypeAlias

from lamina_protocols.channels import Credentials

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
    said = str(error).lower()  # `reason` is None where Python does not know OpenSSL's number
    return isinstance(error, ssl.SSLError) and any(each in said for each in _CHANGED)


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
