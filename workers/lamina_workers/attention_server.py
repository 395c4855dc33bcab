"""An attention worker that others reach: handshake, sessions, channels. Knows no model and no engine.

One engine at a time. One thread makes every torch call of the server's life: OpenMP keeps a team for each thread that
ever computed. It reads socket channels itself; a gRPC stream is read for it.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import shutil
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from queue import SimpleQueue

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lamina_protocols import control
from lamina_protocols.channels import Credentials, is_loopback, split_address
from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_protocols.frames import MAX_FRAME
from lamina_protocols.messages import PROTOCOL_VERSION, HolderConfig
from lamina_protocols.service import (
    MAX_MESSAGE,
    SERVICE,
    Busy,
    GrpcChannel,
    TokenInterceptor,
    handlers,
    server_credentials,
    server_options,
)
from lamina_protocols.socket_channel import (
    SECRET_SIZE,
    Listener,
    SocketChannel,
    listen_tcp,
    listen_unix,
    server_context,
)
from lamina_protocols.tensors import DTYPES
from lamina_workers.attention_session import Session, Traffic
from lamina_workers.attention_worker import Counters

logger = logging.getLogger("lamina")

_GRPC_THREADS = 8  # handlers at once: the stream, an ending one, and unary calls
_MAX_CALLS = 32
_MAX_PATH = 96  # bytes of a Unix socket's folder; its path may take 104 at least

_NONE = Credentials()


class ServerError(LaminaError):
    """A server cannot be started as it is configured, or not at that address."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """`kv_memory` in bytes, `lease` in seconds; `listen` is host:port, port 0 any free one.

    `model`, `compute_dtype`, `kv_dtype` and `page_size`, where given, are all that a handshake may ask for.
    """

    name: str
    kv_memory: int
    threads: int = 1
    listen: str = "127.0.0.1:0"
    data_port: int = 0
    credentials: Credentials = _NONE
    mutual_tls: bool = False
    insecure: bool = False
    local_channel: bool = True
    lease: float = 30.0
    max_frame: int = MAX_FRAME
    max_message: int = MAX_MESSAGE
    model: str | None = None
    compute_dtype: str | None = None
    kv_dtype: str | None = None
    page_size: int | None = None

    @property
    def host(self) -> str:
        return split_address(self.listen)[0]

    def check(self) -> None:
        """Raise ServerError for what would be open to strangers, or cannot be."""
        made = self.credentials
        if bool(made.cert) != bool(made.key):
            raise ServerError("a certificate needs its key, and a key its certificate")
        if self.mutual_tls and not (made.ca and made.cert):
            raise ServerError("mutual TLS needs a CA besides the server's certificate and key")
        if not is_loopback(self.host) and not self.insecure and not (made.cert and made.token):
            lacking = " and ".join(what for what, there in (("TLS", made.cert), ("a token", made.token)) if not there)
            raise ServerError(
                f"listening on {self.listen} without {lacking} would serve strangers; give both, "
                "or allow it with --insecure"
            )


class AttentionServer:
    """Serves one attention worker. `start` and `stop` once each, from one thread."""

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        config.check()
        self.config = config
        self._clock = clock
        self._started_at = clock()
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._draining = False
        self._totals = Counters()
        self._traffic = Traffic()
        self._jobs: SimpleQueue[tuple[Session, HolderConfig] | None] = SimpleQueue()
        self._stopped = threading.Event()
        self._local: tuple[Listener, str] | None = None  # and its folder
        self._tcp: Listener | None = None
        self._health = health.HealthServicer()
        self._grpc: grpc.Server | None = None
        self._threads = [
            threading.Thread(target=self._compute, name="lamina-attention", daemon=True),
            threading.Thread(target=self._watch, name="lamina-lease", daemon=True),
        ]

    def start(self) -> str:
        """Listen and serve. The address, with the port that was taken. Raises ServerError where it cannot be had."""
        config, made = self.config, self.config.credentials
        interceptors = (TokenInterceptor(made.token),) if made.token else ()
        pool = ThreadPoolExecutor(_GRPC_THREADS, thread_name_prefix="lamina-grpc")
        server = grpc.server(
            pool,
            interceptors=interceptors,
            options=server_options(config.max_message),
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        server.add_generic_rpc_handlers((handlers(self, config.max_message, config.max_frame),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            port = self._bind(server)
            self._open_channels()
        except (OSError, RuntimeError) as error:  # grpc raises RuntimeError for an address in use
            self._close_channels()
            raise ServerError(f"cannot listen on {config.listen}: {error}") from error
        self._grpc = server
        for thread in self._threads:
            thread.start()
        server.start()
        self._set_health(True)
        host = f"[{config.host}]" if ":" in config.host else config.host
        return f"{host}:{port}"

    def stop(self, grace: float = 1.0) -> None:
        """Take no new session, give the one under way `grace` seconds, then end it and free everything."""
        self._set_health(False)
        self._draining = True
        deadline = self._clock() + grace
        while (session := self._session) is not None and not session.ended and self._clock() < deadline:
            time.sleep(0.02)
        if session is not None:
            session.end("the worker was stopped")
        self._stopped.set()
        self._jobs.put(None)
        if self._grpc is not None:
            self._grpc.stop(1.0).wait()
        self._close_channels()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server is stopped; whether it is."""
        return self._stopped.wait(timeout)

    # What the service calls, on gRPC's threads.

    def hello(self, hello: control.Hello, remaining: float) -> control.Welcome:
        """Open a session, or refuse naming what differs."""
        self._check(hello)
        secret = secrets.token_bytes(SECRET_SIZE)
        config = HolderConfig(hello.layers, hello.page_size, hello.kv_dtype, self.config.kv_memory)
        with self._lock:
            if self._draining:
                raise ProtocolError(f"worker {self.config.name} is draining and takes no new session")
            if self._session is not None and not self._session.ended:
                age = self._clock() - self._session.opened_at
                raise Busy(f"worker {self.config.name} is busy with a session of {age:.1f} seconds")
            session = Session(hello.session, secret, hello.model, self.config.lease, self._clock)
            self._session = session
            self._jobs.put((session, config))
        try:
            session.built.result(remaining)
        except FutureTimeout as error:
            session.built.cancel()
            session.end("the handshake took too long")
            raise ProtocolError(f"the worker was not ready within {remaining:.1f} seconds") from error
        except MemoryError as error:
            raise ProtocolError(f"no memory for {self.config.kv_memory} bytes of KV") from error
        session.heard()
        logger.info("session %.8s: %s, KV %s", session.id, hello.model or "no model named", hello.kv_dtype)
        ours, local, tcp = self.config, None, None
        if hello.local_channel and ours.local_channel and (path := self._open_local()):
            local = control.LocalOffer(path, secret)
        if hello.data_channel == "tcp" and self._tcp is not None:
            tcp = control.TcpOffer(self._tcp.port, secret)
        return control.Welcome(ours.name, ours.kv_memory, ours.threads, ours.lease, ours.max_frame, local, tcp)

    def heartbeat(self, heartbeat: control.Heartbeat) -> control.Alive:
        session = self._session
        if session is None or session.id != heartbeat.session or session.ended:
            return control.Alive("ended")
        session.heard()
        return control.Alive("draining" if self._draining else "serving")

    def drain(self) -> control.WorkerStatus:
        self._draining = True
        self._set_health(False)
        return self.status()

    def status(self) -> control.WorkerStatus:
        with self._lock:
            session, totals, traffic = self._session, self._totals, self._traffic
            worker = None if session is None else session.worker
            if session is not None and worker is not None:
                totals, traffic = _sum(totals, worker.counters), _sum_traffic(traffic, session.traffic)
        live = session is not None and not session.ended
        parts = () if worker is None else worker.store.parts()
        return control.WorkerStatus(
            name=self.config.name,
            version=control.package_version(),
            model=session.model if session is not None and live else "",
            session=live,
            session_age=self._clock() - session.opened_at if session is not None and live else 0.0,
            draining=self._draining,
            channel=session.channel_kind if session is not None and live else "",
            kv_memory=self.config.kv_memory,
            parts=len(parts),
            heads=tuple(sorted({head for part in parts for head in part.heads})),
            lo=min((part.lo for part in parts), default=0),
            hi=max((part.held for part in parts), default=0),
            free_pages=0 if worker is None else worker.store.free_pages,
            total_pages=0 if worker is None else worker.store.n_pages,
            batches=totals.batches,
            queries=totals.queries,
            stored=totals.vectors_stored,
            bytes_in=traffic.bytes_in,
            bytes_out=traffic.bytes_out,
            busy=traffic.busy,
            uptime=self._clock() - self._started_at,
        )

    def attach(self, session: str, channel: GrpcChannel) -> None:
        current = self._session
        if current is None or not session or current.id != session:
            raise ProtocolError("no such session at this worker")
        current.attach(channel, "grpc")
        self._close_local()

    def _check(self, hello: control.Hello) -> None:
        ours = self.config
        control.check("protocol version", hello.protocol, PROTOCOL_VERSION)
        control.check("lamina version", hello.version, control.package_version())
        for what, theirs, pinned in (
            ("model", hello.model, ours.model),
            ("compute dtype", hello.compute_dtype, ours.compute_dtype),
            ("KV dtype", hello.kv_dtype, ours.kv_dtype),
            ("page size", hello.page_size, ours.page_size),
        ):
            if pinned is not None:
                control.check(what, theirs, pinned)
        if hello.compute_dtype not in DTYPES:
            raise ProtocolError(f"compute dtype {hello.compute_dtype!r:.80}, this worker knows {', '.join(DTYPES)}")
        if hello.data_channel not in control.DATA_CHANNELS:
            raise ProtocolError(
                f"data channel {hello.data_channel!r:.80}, this worker knows {', '.join(control.DATA_CHANNELS)}"
            )
        if not hello.layers or not 16 <= len(hello.session) <= 64:
            raise ProtocolError(f"{len(hello.layers)} layers and a session id of {len(hello.session)} characters")

    # The server's own threads.

    def _compute(self) -> None:
        while (job := self._jobs.get()) is not None:
            session, config = job
            counters = session.run(config, self.config.threads, self.config.name)
            with self._lock:
                self._totals = _sum(self._totals, counters)
                self._traffic = _sum_traffic(self._traffic, session.traffic)
                if self._session is session:
                    self._session = None
            if self._session is None:
                self._close_local()
            gc.collect()  # KV is large, and whatever keeps it in a cycle must not outlive its session

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.config.lease / 10)):
            session = self._session
            if session is not None and session.overdue():
                session.end(f"no sign of life for {self.config.lease:g} seconds")

    # Channels.

    def _bind(self, server: grpc.Server) -> int:
        config = self.config
        if config.credentials.cert:
            tls = server_credentials(config.credentials, config.mutual_tls)
            return int(server.add_secure_port(config.listen, tls))
        return int(server.add_insecure_port(config.listen))

    def _open_channels(self) -> None:
        config, tls = self.config, None
        if config.credentials.cert:
            try:
                tls = server_context(config.credentials, config.mutual_tls)
            except (ssl.SSLError, ValueError) as error:
                raise ServerError(f"the certificate or its key cannot be used: {error}") from error
        self._tcp = Listener(
            listen_tcp(config.host, config.data_port), self._admit, self._deliver("tcp"), tls, config.max_frame
        )

    def _open_local(self) -> str:
        """A Unix socket for the session's data, in a folder of its own; its path, or nothing where it cannot be had."""
        self._close_local()
        try:
            folder = tempfile.mkdtemp(prefix="lamina-")  # mode 0700
            if len(os.fsencode(folder)) > _MAX_PATH:
                os.rmdir(folder)
                folder = tempfile.mkdtemp(prefix="lamina-", dir="/tmp")
            listening = listen_unix(path := os.path.join(folder, "data"))
        except OSError as error:
            logger.warning("no local channel: %s", error)
            return ""
        listener = Listener(listening, self._admit, self._deliver("local"), None, self.config.max_frame)
        with self._lock:
            self._local = (listener, folder)
        return path

    def _close_local(self) -> None:
        """Nobody connects to the session's Unix socket any more. What is connected stays."""
        with self._lock:
            local, self._local = self._local, None
        if local is not None:
            listener, folder = local
            listener.close()
            shutil.rmtree(folder, ignore_errors=True)

    def _close_channels(self) -> None:
        self._close_local()
        if self._tcp is not None:
            self._tcp.close()

    def _admit(self, secret: bytes) -> bool:
        session = self._session
        return session is not None and session.admits(secret)

    def _deliver(self, kind: str) -> Callable[[SocketChannel], None]:
        def deliver(channel: SocketChannel) -> None:
            session = self._session
            try:
                if session is None:
                    raise ProtocolError("the session is over")
                session.attach(channel, kind)
            except ProtocolError:
                channel.close()
            self._close_local()

        return deliver

    def _set_health(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            self._health.set(service, status)


def _sum(a: Counters, b: Counters) -> Counters:
    return Counters(a.batches + b.batches, a.queries + b.queries, a.vectors_stored + b.vectors_stored)


def _sum_traffic(a: Traffic, b: Traffic) -> Traffic:
    return Traffic(a.bytes_in + b.bytes_in, a.bytes_out + b.bytes_out, a.busy + b.busy)
