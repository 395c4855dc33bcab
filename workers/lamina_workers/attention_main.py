"""An attention worker as a process: `python -m lamina_workers.attention_main`. Its flags, signals and parent.

Prints `listening HOST:PORT` when it serves. torch is imported only after the environment that OpenMP reads is set.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lamina_workers.devices.openmp import share_cores
from lamina_workers.process.exit import follow_parent, leave
from lamina_workers.process.signals import answering_signals

if TYPE_CHECKING:
    from lamina_workers.attention_server.attention_server import AttentionServer

DRAIN_S = 25.0  # seconds: Kubernetes kills 30 s after SIGTERM


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or the parent's end. After a signal the engine has a while to move its KV away; a
    second one ends the process at once. The exit status: 0, or 1 where it could not serve."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else a stranger's connections fill the log
    share_cores()
    _allow_connections()
    from lamina_protocols.errors import LaminaError

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    ended = threading.Event()

    def end() -> None:
        os._exit(1) if ended.is_set() else ended.set()

    if args.read_delay:
        _slow_down(args.read_delay)
    try:
        with answering_signals((signal.SIGTERM, signal.SIGINT), end):
            _serve(args, ended)
    except LaminaError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  # this is a command
        return 1
    return 0


def _serve(args: argparse.Namespace, ended: threading.Event) -> None:
    """Until `ended` is set. Raises LaminaError where it cannot serve."""
    parent_gone = threading.Event()

    def leave_at_once() -> None:
        parent_gone.set()
        ended.set()

    if args.die_with_parent or args.parent_pipe is not None:
        follow_parent(leave_at_once, args.parent_pipe or 0)
    server = _server(args)
    address = server.start()
    print(f"listening {address}", flush=True)  # noqa: T201  # the parent reads the port here
    ended.wait()
    grace = 0.0 if parent_gone.is_set() else args.drain_timeout
    threading.Thread(target=_leave_anyway, args=(grace + 5.0,), daemon=True).start()
    server.stop(grace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attention-worker", description="Hold KV and attend it, for one engine.")
    add = parser.add_argument
    add("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="where to listen; port 0 takes a free one")
    add("--data-port", type=int, default=0, metavar="PORT", help="of the TCP data channel; 0 takes a free one")
    add("--kv-memory", type=int, required=True, metavar="BYTES", help="memory for KV")
    add("--kv-cold", metavar="DIR", help="a folder on a disk, for the KV that nobody reads for long")
    add("--kv-resident", type=int, metavar="BYTES", help="of --kv-memory, to be kept in memory beside --kv-cold")
    add("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="that compute")
    add("--device", default="cpu", metavar="NAME", help="where KV lies and attention is computed: cpu, cuda or cuda:N")
    add("--name", default="attention", help="what status and errors call this worker")
    add("--tls-dir", metavar="DIR", help="with ca.pem, cert.pem and key.pem")
    add("--token-file", metavar="FILE", help="with the token that callers must show")
    add("--mutual-tls", action="store_true", help="ask callers for a certificate of the CA")
    add("--insecure", action="store_true", help="serve on any address without TLS or token")
    add("--no-local-channel", action="store_true", help="offer no Unix socket to callers on this host")
    add("--lease", type=float, default=30.0, metavar="SECONDS", help="that KV outlives the last sign of its engine")
    add("--drain-timeout", type=_seconds, default=DRAIN_S, metavar="SECONDS", help="for KV to move after SIGTERM")
    add("--die-with-parent", action="store_true", help="end when stdin closes or the parent's thread ends")
    add("--parent-pipe", type=int, metavar="FD", help="end when this descriptor closes, instead of stdin")
    add("--read-delay", type=float, default=0.0, help=argparse.SUPPRESS)  # SIGUSR1 ends or resumes it
    return parser


def _seconds(text: str) -> float:
    """A time of 0 seconds or more, which has an end."""
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} seconds; allowed are 0 or more")
    return seconds


def _server(args: argparse.Namespace) -> AttentionServer:
    from lamina_protocols.messages.layers import ColdTier
    from lamina_workers.attention_server.attention_server import AttentionServer, ServerConfig
    from lamina_workers.process.credentials import CredentialFiles

    files = CredentialFiles(args.tls_dir, args.token_file, server=True)
    return AttentionServer(
        ServerConfig(
            name=args.name,
            kv_memory=args.kv_memory,
            threads=args.threads,
            device=args.device,
            listen=args.listen,
            data_port=args.data_port,
            credentials=files.current,
            renewed=files.renewed,
            mutual_tls=args.mutual_tls,
            insecure=args.insecure,
            local_channel=not args.no_local_channel,
            lease=args.lease,
            cold=ColdTier.of(args.kv_cold, args.kv_resident, args.kv_memory),
        )
    )


def _allow_connections() -> None:
    """Open as many files as the system allows: connections that strangers leave idle for a while take some."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a system with another limit beside it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _slow_down(delay: float) -> None:
    """Make reads slow, for experiments. Each SIGUSR1 switches that off or on again."""
    from lamina_workers.attention_worker.attention_worker import AttentionWorker

    AttentionWorker.read_delay = delay

    def change(*_: object) -> None:
        AttentionWorker.read_delay = delay - AttentionWorker.read_delay

    signal.signal(signal.SIGUSR1, change)


def _leave_anyway(seconds: float) -> None:
    threading.Event().wait(seconds)
    os._exit(1)


if __name__ == "__main__":
    leave(main())
