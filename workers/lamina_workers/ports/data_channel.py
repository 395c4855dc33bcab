"""Opens the data channel of a session that a worker has admitted.

What the worker offers is checked before it is used: it may name any socket of this host, to which bytes of its choice
would then be sent.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from dataclasses import dataclass

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import (
    Channel,
    ChannelClosed,
    Credentials,
    client_context,
    is_loopback,
    split_address,
)
from lamina_protocols.channels.grpc_client import WorkerClient, WorkerRefused
from lamina_protocols.channels.sockets import LOCAL_FOLDER, LOCAL_SOCKET, connect_tcp, connect_unix, is_here

logger = logging.getLogger("lamina")


@dataclass(frozen=True, slots=True)
class ChannelOptions:
    """The way to a worker, in seconds where it is time.

    `local_channel`: a Unix socket where both ends share a host. `data_channel`: "grpc" or "tcp". `checksum`: on each
    frame; None: where nothing else vouches for frames, which is on the way to another host without TLS. `timeout`
    bounds each step of the handshake (a worker that has never run compiles its kernels first). Without an answer to
    heartbeats for `lost_after` seconds the port is lost; so it is where the worker does not read a frame for so long.
    """

    credentials: Credentials | None = None
    local_channel: bool = True
    data_channel: str = "grpc"
    checksum: bool | None = None
    timeout: float = 30.0
    lost_after: float = 10.0

    @property
    def shown(self) -> Credentials:
        """The credentials, empty where there are none."""
        return self.credentials or Credentials()


def open_channel(
    client: WorkerClient, welcome: control.Welcome, session: str, options: ChannelOptions
) -> tuple[Channel, str]:
    """The channel and its kind: "local", "tcp" or "grpc". Raises WorkerRefused where the worker offers none."""
    host, _ = split_address(client.address)
    checksum = options.checksum
    if checksum is None:
        checksum = not options.shown.ca and not is_loopback(host)
    timeout = options.timeout
    if welcome.local is not None and options.local_channel:
        try:
            check_local(welcome.local.path, host)
            return connect_unix(welcome.local.path, welcome.local.secret, timeout, welcome.max_frame), "local"
        except ChannelClosed as error:  # another host, or a container of its own
            logger.info("attention worker at %s: %s", client.address, error)
    if options.data_channel != "tcp":
        return client.stream(session, welcome.max_frame, checksum), "grpc"
    if welcome.tcp is None:
        raise WorkerRefused(f"the worker at {client.address} offers no TCP data channel")
    tls = client_context(options.shown) if options.shown.ca else None
    try:
        offer = welcome.tcp
        channel = connect_tcp(host, offer.port, offer.secret, timeout, tls, welcome.max_frame, checksum)
    except ChannelClosed as error:
        raise WorkerRefused(f"the worker at {client.address}: {error}") from error
    return channel, "tcp"


def check_local(path: str, host: str) -> None:
    """Raise ChannelClosed unless `path` is what a worker of this user makes, and `host` an address of this host: else a
    worker elsewhere could have this process write to any socket that its user may open."""
    if not is_here(host):
        raise ChannelClosed(f"a local channel is offered from another host, {host}")
    folder, name = os.path.split(path)
    above, folder_name = os.path.split(folder)
    try:
        temporary_folders = {os.path.realpath(directory) for directory in (tempfile.gettempdir(), "/tmp")}
        status = os.lstat(folder)
        right = name == LOCAL_SOCKET and folder_name.startswith(LOCAL_FOLDER)
        right = right and os.path.realpath(above) in temporary_folders
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise ChannelClosed(f"no local channel at {path!r:.200}: {error}") from error
    private = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700 and status.st_uid == os.getuid()
    if not (right and private):
        raise ChannelClosed(
            f"a local channel is offered at {path!r:.200}; allowed: {LOCAL_FOLDER}*/{LOCAL_SOCKET} in the temporary "
            "folder, in a folder of this user that nobody else may open"
        )
