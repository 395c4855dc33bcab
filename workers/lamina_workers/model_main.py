"""A model worker beyond 0 as a process: `python -m lamina_workers.model_main`. Its flags, signals and parent.

Connects to model worker 0 and serves it, see `parallel.peer_worker`. The secret of the connection is the first line of
its stdin. torch is imported only after the environment that OpenMP reads is set.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial

from lamina_workers.devices.openmp import share_cores
from lamina_workers.process.exit import follow_parent, leave

UNIX = "unix:"
_CONNECT_S = 30.0
_MAX_SECRET = 256  # characters of the line


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until model worker 0, or the parent, is gone. The exit status: 0, or 1 where it could not serve."""
    args = _parser().parse_args(argv)
    if args.die_with_parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    secret = sys.stdin.readline(_MAX_SECRET).strip()
    if args.die_with_parent:
        follow_parent(lambda: os._exit(0))  # all that this process keeps can be made again
    from lamina_protocols.channels.channels import ChannelClosed
    from lamina_protocols.errors import LaminaError

    try:
        serve(
            args.connect,
            bytes.fromhex(secret),
            args.name,
            threads=args.threads,
            folder=args.folder,
            address=args.address,
            tls_dir=args.tls_dir,
        )
    except ChannelClosed as error:
        print(f"model worker 0 is gone: {error}", file=sys.stderr)  # noqa: T201  # this is a command
    except (LaminaError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  # this is a command
        return 1
    return 0


def serve(
    connect: str,
    secret: bytes,
    name: str,
    *,
    threads: int,
    folder: str | None = None,
    address: str = "127.0.0.1",
    tls_dir: str | None = None,
) -> None:
    """Be a model worker in this process until model worker 0 is gone or dismisses it, which is no error.

    `connect` is unix:PATH or HOST:PORT, where `secret` is taken once; `threads` will compute. Call it before anything
    imports torch. `folder` and `address` as for `PeerWorker`. Raises LaminaError where it cannot begin.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    share_cores()
    from lamina_protocols.channels.channels import Channel, Credentials, client_context, split_address
    from lamina_protocols.channels.sockets import connect_tcp, connect_unix
    from lamina_protocols.channels.versions import PREVIOUS, VARIABLE
    from lamina_workers.parallel.peer_worker import PeerWorker
    from lamina_workers.parallel.peers import beats_secret
    from lamina_workers.process.credentials import load_credentials

    def connected(secret: bytes) -> Channel:
        if connect.startswith(UNIX):
            return connect_unix(connect.removeprefix(UNIX), secret, _CONNECT_S)
        host, port = split_address(connect)
        credentials = load_credentials(tls_dir) if tls_dir is not None else Credentials()
        tls = client_context(credentials) if credentials.ca else None
        return connect_tcp(host, port, secret, _CONNECT_S, tls, checksummed=tls is None)

    channel, protocol = connected(secret), int(os.environ.get(VARIABLE, PREVIOUS))
    beats = partial(connected, beats_secret(secret))
    try:
        PeerWorker(channel, name, folder, address, protocol, beats=beats).serve()
    finally:
        channel.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="model-worker", description="Compute a part of a model, for one engine.")
    add = parser.add_argument
    add("--connect", required=True, metavar="unix:PATH|HOST:PORT", help="where model worker 0 waits")
    add("--name", required=True, help="what model worker 0 calls this one")
    add("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="that compute")
    add("--folder", metavar="DIR", help="with the model's files, where they are elsewhere than at model worker 0")
    add("--address", default="127.0.0.1", metavar="HOST", help="of this host, for the other model workers")
    add("--tls-dir", metavar="DIR", help="with ca.pem, where model worker 0 uses TLS")
    add("--die-with-parent", action="store_true", help="end when stdin closes or the parent's thread ends")
    return parser


if __name__ == "__main__":
    leave(main())
