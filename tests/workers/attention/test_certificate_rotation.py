"""A worker's certificate is replaced while it serves: sessions go on, new ones are shown the new one, and what is out
of date is said."""

from __future__ import annotations

import dataclasses
import datetime

import pytest
from attention_servers import ASKED, WAYS, connected, one_batch, open_port, running, until

from lamina_protocols.channels.channels import Credentials
from lamina_protocols.channels.grpc_client import WorkerClient, WorkerUnreachable
from lamina_workers.process import credentials
from lamina_workers.process.credentials import create_credentials


class Files:
    """What the files have, as `CredentialFiles` gives it."""

    def __init__(self) -> None:
        self.current = create_credentials(["127.0.0.1"])
        self._news: list[Credentials] = []

    def replace(self, found: Credentials) -> None:
        self.current = dataclasses.replace(found, token=self.current.token)
        self._news.append(self.current)

    def renewed(self) -> Credentials | None:
        return self._news.pop() if self._news else None


def reached(address: str, shown: Credentials) -> bool:
    with WorkerClient(address, shown) as client:
        try:
            client.status(5)
        except WorkerUnreachable:
            return False
    return True


@pytest.mark.fault("F20")
@pytest.mark.parametrize("way", ["grpc", "tcp"])
@pytest.mark.parametrize("mutual", [False, True])
def test_new_connections_are_shown_the_new_certificate_and_old_ones_go_on(way: str, mutual: bool) -> None:
    files = Files()
    old = files.current
    with running(credentials=old, mutual_tls=mutual, renewed=files.renewed, lease=2.0) as (_, address):
        with connected(address, credentials=old, **WAYS[way]) as port:
            files.replace(create_credentials(["127.0.0.1"]))
            until(lambda: reached(address, files.current))
            one_batch(port)
            assert not reached(address, old)
        with connected(address, credentials=files.current, **WAYS[way]) as port:
            one_batch(port)


def test_a_key_that_does_not_belong_to_the_certificate_yet_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    files = Files()
    old, new = files.current, create_credentials(["127.0.0.1"])
    with running(credentials=old, renewed=files.renewed, lease=2.0) as (_, address):
        files.replace(dataclasses.replace(new, key=old.key))
        until(lambda: "the certificate from before stays in use" in caplog.text)
        assert reached(address, old)
        files.replace(new)
        until(lambda: reached(address, files.current))


@pytest.mark.fault("F20")
def test_a_worker_whose_certificate_has_expired_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(credentials, "_LIFETIME", datetime.timedelta(hours=-1))
        expired = create_credentials(["127.0.0.1"])
    with (
        running(credentials=expired) as (_, address),
        pytest.raises(WorkerUnreachable, match="TLS fails: certificate has expired"),
    ):
        open_port(address, **{**ASKED, "timeout": 3.0}, credentials=expired)


def test_a_worker_without_tls_and_a_certificate_of_others_are_named() -> None:
    made = create_credentials(["127.0.0.1"])
    with running() as (_, address), pytest.raises(WorkerUnreachable, match="TLS fails: the other side speaks none"):
        open_port(address, **{**ASKED, "timeout": 3.0}, credentials=made)
    with (
        running(credentials=create_credentials(["127.0.0.1"])) as (_, address),
        pytest.raises(WorkerUnreachable, match="TLS fails: unable to get local issuer certificate"),
    ):
        open_port(address, **{**ASKED, "timeout": 3.0}, credentials=made)
