"""Credentials: what is made is read back, keys are private, and what is missing or malformed is said."""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import stat

import pytest
from cryptography import x509

from lamina_protocols.channels.channels import Credentials
from lamina_workers.process import credentials
from lamina_workers.process.credentials import (
    CredentialFiles,
    CredentialsError,
    certificate_end,
    create_credentials,
    load_credentials,
    make_credentials,
)


def test_what_is_made_is_read_back(tmp_path):
    made = make_credentials(tmp_path / "tls", ["worker.example", "192.0.2.7", "::1"])
    assert load_credentials(tmp_path / "tls", tmp_path / "tls/token", server=True) == made
    for name, mode in (("ca.pem", 0o644), ("cert.pem", 0o644), ("key.pem", 0o600), ("token", 0o600)):
        assert stat.S_IMODE((tmp_path / "tls" / name).stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700


def test_the_certificate_is_for_these_hosts_and_no_ca():
    made = create_credentials(["worker.example", "192.0.2.7"])
    cert = x509.load_pem_x509_certificate(made.cert)
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["worker.example"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("192.0.2.7")]
    assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    cert.verify_directly_issued_by(x509.load_pem_x509_certificate(made.ca))


def test_no_two_are_alike():
    one, other = (create_credentials(["a"]) for _ in range(2))
    assert one.ca != other.ca
    assert one.key != other.key
    assert one.token != other.token
    assert len(one.token) >= 43


def test_a_client_needs_the_ca_alone(tmp_path):
    made = make_credentials(tmp_path, ["localhost"])
    (tmp_path / "cert.pem").unlink()
    (tmp_path / "key.pem").unlink()
    assert load_credentials(tmp_path) == Credentials(ca=made.ca)
    assert load_credentials() == Credentials()
    with pytest.raises(CredentialsError, match=r"cannot read .*cert.pem"):
        load_credentials(tmp_path, server=True)


def test_what_is_missing_or_malformed_is_said(tmp_path):
    with pytest.raises(CredentialsError, match=r"cannot read .*ca.pem"):
        load_credentials(tmp_path)
    (tmp_path / "ca.pem").write_text("hello")
    with pytest.raises(CredentialsError, match=r"ca.pem holds no CERTIFICATE in PEM"):
        load_credentials(tmp_path)
    for content in (b"", b" \n", b"two\nlines", "tökén".encode()):
        (tmp_path / "token").write_bytes(content)
        with pytest.raises(CredentialsError, match="token holds no token"):
            load_credentials(token_file=tmp_path / "token")
    (tmp_path / "token").write_bytes(bytes(1 << 21))
    with pytest.raises(CredentialsError, match="larger than 1048576 bytes"):
        load_credentials(token_file=tmp_path / "token")


def test_files_are_not_replaced(tmp_path):
    make_credentials(tmp_path, ["localhost"])
    before = (tmp_path / "key.pem").read_bytes()
    with pytest.raises(CredentialsError, match=r"has ca.pem, cert.pem, key.pem, token already; nothing was written"):
        make_credentials(tmp_path, ["localhost"])
    assert (tmp_path / "key.pem").read_bytes() == before


@pytest.mark.parametrize(("hosts", "said"), [([], "at least one host"), (["höst"], "'höst' is neither")])
def test_hosts_that_cannot_be(hosts, said):
    with pytest.raises(CredentialsError, match=said):
        create_credentials(hosts)


def test_keys_and_tokens_do_not_show_in_a_repr():
    made = create_credentials(["localhost"])
    assert made.token not in repr(made)
    assert "PRIVATE KEY" not in repr(made)


def lasting(monkeypatch: pytest.MonkeyPatch, **time: float) -> None:
    monkeypatch.setattr(credentials, "_LIFETIME", datetime.timedelta(**time))


@pytest.mark.fault("F20")
def test_certificates_out_of_date_are_refused_naming_file_and_time(tmp_path, monkeypatch):
    lasting(monkeypatch, hours=-1)
    make_credentials(tmp_path / "old", ["localhost"])
    with pytest.raises(CredentialsError, match=r"old/ca\.pem has expired at \d{4}-\d\d-\d\d \d\d:\d\d UTC"):
        load_credentials(tmp_path / "old")
    lasting(monkeypatch, days=1)
    monkeypatch.setattr(credentials, "_CLOCKS_DIFFER", datetime.timedelta(hours=-2))
    make_credentials(tmp_path / "early", ["localhost"])
    with pytest.raises(CredentialsError, match=r"early/ca\.pem is valid from .* on, and this machine's clock says"):
        load_credentials(tmp_path / "early")


def test_a_certificate_that_ends_soon_is_warned_of(tmp_path, monkeypatch, caplog):
    lasting(monkeypatch, days=6, hours=1)
    made = make_credentials(tmp_path / "tls", ["localhost"])
    assert load_credentials(tmp_path / "tls", server=True) == dataclasses.replace(made, token="")
    assert "cert.pem expires in 6 days" in caplog.text
    assert certificate_end(made.cert) > datetime.datetime.now(datetime.timezone.utc)


def test_files_are_read_again_when_they_change_and_the_token_stays(tmp_path):
    folder = tmp_path / "tls"
    first = make_credentials(folder, ["localhost"])
    files = CredentialFiles(folder, folder / "token", server=True)
    assert files.renewed() is None
    second = create_credentials(["localhost"])
    for name, content in (("ca.pem", second.ca), ("cert.pem", second.cert), ("key.pem", second.key)):
        (folder / "next").write_bytes(content)
        (folder / "next").rename(folder / name)
    (folder / "token").write_text("another")
    assert files.renewed() == dataclasses.replace(second, token=first.token)
    assert files.renewed() is None


@pytest.mark.parametrize(
    "content", [None, b"nothing", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_cannot_be_read_changes_nothing(tmp_path, caplog, content):
    folder = tmp_path / "tls"
    made = make_credentials(folder, ["localhost"])
    files = CredentialFiles(folder, folder / "token", server=True)
    (folder / "cert.pem").unlink()
    if content is not None:
        (folder / "cert.pem").write_bytes(content)
    assert files.renewed() is None
    assert files.current == made
    assert "the certificates from before stay in use" in caplog.text
    (folder / "cert.pem").unlink(missing_ok=True)
    (folder / "cert.pem").write_bytes(made.cert)
    assert files.renewed() == made
