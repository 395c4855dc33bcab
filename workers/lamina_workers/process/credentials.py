"""Certificates and tokens: read from files, or made for a set of hosts.

A TLS folder has `ca.pem`, `cert.pem` and `key.pem`; a token file has one line.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lamina_protocols.channels import Credentials
from lamina_protocols.errors import LaminaError

if TYPE_CHECKING:
    from cryptography import x509

_LIFETIME = datetime.timedelta(days=3650)
_CLOCKS_DIFFER = datetime.timedelta(days=1)
_MAX_FILE = 1 << 20  # bytes of a PEM file or a token
TOKEN_NAME = "token"


class CredentialsError(LaminaError):
    """A certificate, key or token is missing or malformed."""


def load_credentials(
    tls_dir: str | Path | None = None, token_file: str | Path | None = None, server: bool = False
) -> Credentials:
    """The credentials of a folder and a file. A server needs all three files; a client `ca.pem`, and the pair if TLS is
    mutual. Raises CredentialsError."""
    ca = cert = key = b""
    if tls_dir is not None:
        folder = Path(tls_dir)
        ca = _pem(folder / "ca.pem", "CERTIFICATE")
        if server or (folder / "cert.pem").exists():
            cert, key = _pem(folder / "cert.pem", "CERTIFICATE"), _pem(folder / "key.pem", "PRIVATE KEY")
    token = ""
    if token_file is not None:
        token = _read(Path(token_file)).decode(errors="replace").strip()
        if not token or not token.isascii() or not token.isprintable():
            raise CredentialsError(f"{token_file} holds no token: one line of printable ASCII is expected")
    return Credentials(ca, cert, key, token)


def create_credentials(hosts: Sequence[str]) -> Credentials:
    """A fresh CA, a certificate of it for these host names and IP addresses, and a token. The CA's key is forgotten.

    The certificate serves both ends, so mutual TLS needs nothing more. Raises CredentialsError without a host.
    """
    from cryptography import x509  # it takes a while to load, and only making certificates needs it
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    if not hosts:
        raise CredentialsError("a certificate needs at least one host name or IP address")
    now = datetime.datetime.now(datetime.timezone.utc)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("Lamina CA", "Lamina worker")
    )

    def certificate(subject: x509.Name, public: ec.EllipticCurvePublicKey, is_ca: bool) -> x509.CertificateBuilder:
        usage = x509.KeyUsage(
            digital_signature=not is_ca, key_cert_sign=is_ca, crl_sign=is_ca, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
            decipher_only=False,
        )  # fmt: skip
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCKS_DIFFER)
            .not_valid_after(now + _LIFETIME)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )

    ca = certificate(ca_name, ca_key.public_key(), True).sign(ca_key, hashes.SHA256())
    both_ends = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    names = x509.SubjectAlternativeName([_alternative_name(host) for host in hosts])
    leaf = (
        certificate(name, key.public_key(), False)
        .add_extension(both_ends, critical=False)
        .add_extension(names, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Credentials(ca.public_bytes(pem), leaf.public_bytes(pem), private, secrets.token_urlsafe(32))


def make_credentials(directory: str | Path, hosts: Sequence[str]) -> Credentials:
    """Create credentials for these hosts and write them: `ca.pem`, `cert.pem`, `key.pem` and `token`.

    Key and token are readable by their owner alone. Files that are there are not replaced. Raises CredentialsError.
    """
    made = create_credentials(hosts)
    folder = Path(directory)
    files = {"ca.pem": made.ca, "cert.pem": made.cert, "key.pem": made.key, TOKEN_NAME: made.token.encode() + b"\n"}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if there := [name for name in files if (folder / name).exists()]:
            raise CredentialsError(f"{folder} has {', '.join(there)} already; nothing was written")
        for name, content in files.items():
            mode = 0o600 if name in ("key.pem", TOKEN_NAME) else 0o644
            with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
    except OSError as error:
        raise CredentialsError(f"cannot write credentials to {folder}: {error}") from error
    return made


def _alternative_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise CredentialsError(f"{host!r} is neither a host name nor an IP address") from error


def _pem(path: Path, kind: str) -> bytes:
    data = _read(path)
    if b"-----BEGIN" not in data or kind.encode() not in data:
        raise CredentialsError(f"{path} holds no {kind} in PEM")
    return data


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise CredentialsError(f"cannot read {path}: {error}") from error
    if len(data) > _MAX_FILE:
        raise CredentialsError(f"{path} is larger than {_MAX_FILE} bytes")
    return data
