"""Certificates and tokens: read from files, read again when these change, or made for a set of hosts.

A TLS folder has `ca.pem`, `cert.pem` and `key.pem`; a token file has one line.
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lamina_protocols.channels.channels import Credentials
from lamina_protocols.errors import LaminaError

if TYPE_CHECKING:
    from cryptography import x509

logger = logging.getLogger("lamina")

WARNED = datetime.timedelta(days=30)
"""For so long before its end a certificate is warned of."""

_LIFETIME = datetime.timedelta(days=3650)
_CLOCKS_DIFFER = datetime.timedelta(days=1)
_MAX_FILE = 1 << 20  # bytes of a PEM file or a token
TOKEN_NAME = "token"


class CredentialsError(LaminaError):
    """A certificate, key or token is missing, malformed or out of date."""


def load_credentials(
    tls_dir: str | Path | None = None, token_file: str | Path | None = None, server: bool = False
) -> Credentials:
    """The credentials of a folder and a file. A server needs all three files; a client `ca.pem`, and the pair if TLS is
    mutual. Raises CredentialsError, for a certificate that is out of date too, and warns of one that soon is."""
    ca = cert = key = b""
    if tls_dir is not None:
        folder = Path(tls_dir)
        ca = _pem(folder / "ca.pem", "CERTIFICATE")
        if server or (folder / "cert.pem").exists():
            cert, key = _pem(folder / "cert.pem", "CERTIFICATE"), _pem(folder / "key.pem", "PRIVATE KEY")
        for name, pem in ("ca.pem", ca), ("cert.pem", cert):
            if pem:
                _check_dates(folder / name, pem)
    token = ""
    if token_file is not None:
        token = _read(Path(token_file)).decode(errors="replace").strip()
        if not token or not token.isascii() or not token.isprintable():
            raise CredentialsError(f"{token_file} holds no token: one line of printable ASCII is expected")
    return Credentials(ca, cert, key, token)


class CredentialFiles:
    """The credentials of a folder and a token file, as `load_credentials` reads them. Raises CredentialsError.

    `current` has the newest that could be read. A new token is not taken: engines with the old one would be locked out.
    """

    def __init__(
        self, tls_dir: str | Path | None = None, token_file: str | Path | None = None, server: bool = False
    ) -> None:
        self._folder = None if tls_dir is None else Path(tls_dir)
        self._server = server
        self._last_state = self._state()
        self.current = load_credentials(tls_dir, token_file, server)

    def renewed(self) -> Credentials | None:
        """The credentials where the folder's files have changed since the last call, None where they have not, or
        cannot be used."""
        if self._folder is None or (state := self._state()) == self._last_state:
            return None
        self._last_state = state
        try:
            self.current = replace(load_credentials(self._folder, None, self._server), token=self.current.token)
        except CredentialsError as error:
            logger.warning("the certificates from before stay in use: %s", error)
            return None
        return self.current

    def _state(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What shows that a file was replaced or written to."""
        if self._folder is None:
            return ()
        states: list[tuple[int, int, int] | None] = []
        for name in ("ca.pem", "cert.pem", "key.pem"):
            try:
                facts = (self._folder / name).stat()
                states.append((facts.st_ino, facts.st_mtime_ns, facts.st_size))
            except OSError:
                states.append(None)
        return tuple(states)


def certificate_end(pem: bytes) -> datetime.datetime:
    """When the first certificate of some ends to be valid. Raises ValueError for what is none."""
    from cryptography import x509

    return _utc(x509.load_pem_x509_certificate(pem), "not_valid_after")


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
            digital_signature=not is_ca,
            key_cert_sign=is_ca,
            crl_sign=is_ca,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
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
    credentials = create_credentials(hosts)
    folder = Path(directory)
    files = {
        "ca.pem": credentials.ca,
        "cert.pem": credentials.cert,
        "key.pem": credentials.key,
        TOKEN_NAME: credentials.token.encode() + b"\n",
    }
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if present := [name for name in files if (folder / name).exists()]:
            raise CredentialsError(f"{folder} has {', '.join(present)} already; nothing was written")
        for name, content in files.items():
            mode = 0o600 if name in ("key.pem", TOKEN_NAME) else 0o644
            with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
    except OSError as error:
        raise CredentialsError(f"cannot write credentials to {folder}: {error}") from error
    return credentials


def _utc(certificate: x509.Certificate, name: str) -> datetime.datetime:
    """A date of a certificate; the package has called it by two names."""
    moment: datetime.datetime | None = getattr(certificate, f"{name}_utc", None)
    return moment or getattr(certificate, name).replace(tzinfo=datetime.timezone.utc)


def _check_dates(path: Path, pem: bytes) -> None:
    """Raise CredentialsError for a certificate that is not valid now, and warn of one that ends soon."""
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise CredentialsError(f"{path} holds no certificate: {error}") from error
    now = datetime.datetime.now(datetime.timezone.utc)
    begin, end = _utc(certificate, "not_valid_before"), _utc(certificate, "not_valid_after")
    if now > end:
        raise CredentialsError(
            f"the certificate in {path} has expired at {end:%Y-%m-%d %H:%M} UTC; a new one is taken from the same "
            "file, without a restart of what runs"
        )
    if now < begin:
        raise CredentialsError(
            f"the certificate in {path} is valid from {begin:%Y-%m-%d %H:%M} UTC on, and this machine's clock says "
            f"{now:%Y-%m-%d %H:%M} UTC"
        )
    if end - now < WARNED:
        logger.warning("the certificate in %s expires in %d days, at %s UTC", path, (end - now).days, f"{end:%F %H:%M}")


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
