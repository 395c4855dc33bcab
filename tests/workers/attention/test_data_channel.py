"""The data channel that a worker offers: which Unix sockets are this host's, and nobody else's."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest
from attention_servers import connected
from test_remote import Scripted
from transports import serving

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import ChannelClosed
from lamina_protocols.channels.sockets import is_here
from lamina_protocols.errors import ProtocolError
from lamina_workers.ports.data_channel import check_local

SECRET = bytes(32)


@pytest.mark.fault("F22")
@pytest.mark.parametrize("where", ["another folder", "a folder for all", "another name", "through a link"])
def test_a_worker_cannot_have_the_engine_write_to_a_socket_of_its_choice(tmp_path, where):
    """A worker elsewhere named any Unix socket of the engine's host, and the engine sent it what the worker chose."""
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        path = {
            "another folder": tmp_path / "data",
            "a folder for all": Path(folder, "data"),
            "another name": Path(folder, "docker.sock"),
            "through a link": Path(f"{folder}-link", "data"),
        }[where]
        if where == "a folder for all":
            os.chmod(folder, 0o755)
        if where == "through a link":
            path.parent.symlink_to(folder)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen()
            listening.setblocking(False)
            worker = Scripted()
            worker.local = control.LocalOffer(str(path), SECRET)
            with serving(worker, None) as address, connected(address, timeout=2.0) as port:
                assert port.channel_kind == "grpc"
            if where == "through a link":
                path.parent.unlink()
            with pytest.raises(BlockingIOError):
                listening.accept()


def test_what_a_worker_of_this_user_makes_is_taken():
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        check_local(f"{folder}/data", "127.0.0.1")
        with pytest.raises(ChannelClosed, match=r"offered from another host, 192\.0\.2\.1"):
            check_local(f"{folder}/data", "192.0.2.1")


@pytest.mark.parametrize(
    "path", ["", "data", "/tmp/lamina-/../data", "/tmp/lamina-x\0/data", "/" + "x" * 5000, "\ud800"]
)
def test_paths_that_are_none(path):
    with pytest.raises(ChannelClosed, match="local channel"):
        check_local(path, "127.0.0.1")


def test_which_addresses_are_here():
    assert is_here("127.0.0.1")
    assert is_here("::1")
    assert is_here("localhost")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:  # without a network there is nothing else
            return
        assert is_here(probe.getsockname()[0])
    for host in ("192.0.2.1", "2001:db8::1", "no such name", "\ud800", "x" * 300):
        assert not is_here(host)


@pytest.mark.parametrize("size", [0, 31, 33, 4106])
def test_a_secret_has_its_size(size):
    """The engine sent a secret of any length, so up to a megabyte of the worker's choice."""
    welcome = control.Welcome("w", 1, 1, 1.0, 1, control.LocalOffer("/tmp/x", bytes(size)), None, False, "")
    with pytest.raises(ProtocolError, match=f"a secret of {size} bytes, it has 32"):
        control.unpack(control.Welcome, control.pack(welcome))


@pytest.mark.parametrize("port", [0, 65536, 1 << 40])
def test_a_port_is_one(port):
    """A port beyond 65535 was an OverflowError, which nobody caught."""
    welcome = control.Welcome("w", 1, 1, 1.0, 1, None, control.TcpOffer(port, SECRET), False, "")
    with pytest.raises(ProtocolError, match=f"port {port}, allowed"):
        control.unpack(control.Welcome, control.pack(welcome))
