"""An attention worker that engines elsewhere reach: handshake, sessions, channels.

It serves one engine at a time, with one session or several. One thread, that of a `ComputeLoop`, makes every torch
call. It reads socket channels itself; a thread of gRPC reads a gRPC stream for it.

An engine's description of its layers is checked, and each number bounded, before anything is made. The gRPC server and
the socket listener show the newest certificate that can be used.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import (
    SECRET_SIZE,
    Credentials,
    TlsContext,
    is_loopback,
    join_address,
    server_context,
    split_address,
)
from lamina_protocols.channels.grpc_client import MAX_MESSAGE, GrpcChannel
from lamina_protocols.channels.grpc_core import grpc
from lamina_protocols.channels.grpc_server import (
    TokenInterceptor,
    handlers,
    health_handlers,
    server_credentials,
    server_options,
)
from lamina_protocols.channels.sockets import (
    LOCAL_FOLDER,
    LOCAL_SOCKET,
    Listener,
    SocketChannel,
    listen_tcp,
    listen_unix,
)
from lamina_protocols.channels.versions import shared
from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_protocols.frames.fields import shown
from lamina_protocols.frames.frames import MAX_FRAME, Arriving
from lamina_protocols.frames.tensors import DTYPES
from lamina_protocols.messages.layers import LATENT, STATES, ColdTier, LayerSpec
from lamina_protocols.messages.pools import pool_shape
from lamina_workers.attention_server.leases import MAX_SEATS, MAX_SESSIONS, Leases
from lamina_workers.attention_server.loop import ComputeLoop
from lamina_workers.attention_server.session import Session
from lamina_workers.devices.available import find

_MAX_LAYERS, _MAX_HEADS, _MAX_WIDTH = 1 << 12, 1 << 10, 1 << 14  # a worker takes time and memory for each of them
_MAX_POOLS = 64  # shapes of layers: each has an arena and tables of its own
_MAX_BLOCKS = 1 << 24
_MAX_CONV = 64  # wide
_MAX_CHOSEN = 1 << 16  # blocks of an index, and keys of a block


def check_layers(layers: Sequence[LayerSpec]) -> None:
    """Raise ProtocolError, which names what is wrong and what is allowed."""
    if not 0 < len(layers) <= _MAX_LAYERS:
        raise ProtocolError(f"{len(layers)} layers, allowed: 1 to {_MAX_LAYERS}")
    for spec in layers:
        _check_layer(spec)
    shapes = len({pool_shape(spec) for spec in layers})
    if shapes > _MAX_POOLS:
        raise ProtocolError(f"layers of {shapes} shapes, allowed: up to {_MAX_POOLS}, each with a pool of pages")


def check_blocks(hello: control.Hello) -> None:
    """Raise ProtocolError unless the numbers of an engine that owns its blocks fit its layers, and each other."""
    if not hello.blocks:
        if hello.tables:
            raise ProtocolError(f"block tables of {len(hello.tables)} layers, and no blocks; allowed: both, or neither")
        return
    if hello.blocks > _MAX_BLOCKS:
        raise ProtocolError(f"{hello.blocks} blocks, allowed: up to {_MAX_BLOCKS}")
    if len(hello.tables) != len(hello.layers) or set(hello.tables) != set(range(len(set(hello.tables)))):
        raise ProtocolError(
            f"block tables {shown(hello.tables)} of {len(hello.layers)} layers; allowed: one number a layer, from 0 on"
        )
    if len(set(hello.tables)) > _MAX_POOLS:
        raise ProtocolError(f"{len(set(hello.tables))} block tables, allowed: up to {_MAX_POOLS}")
    if any(spec.kind in STATES for spec in hello.layers):
        raise ProtocolError("layers with a state, which blocks do not keep; allowed: layers of attention")


def _check_layer(spec: LayerSpec) -> None:
    """Raise ProtocolError for a layer of which a worker could not even reckon what it takes."""
    wide = 0 < spec.d_k <= _MAX_WIDTH and 0 < spec.d_v <= (spec.d_k if spec.kind == LATENT else _MAX_WIDTH)
    if not wide or not 0 < spec.kv_heads <= spec.heads <= _MAX_HEADS or spec.kv_layer >= _MAX_LAYERS:
        raise ProtocolError(
            f"layer {spec.kv_layer} of {spec.heads} heads, {spec.kv_heads} of K and V, {spec.d_k} and "
            f"{spec.d_v} wide; allowed: below {_MAX_LAYERS}, up to {_MAX_HEADS} heads, up to {_MAX_WIDTH} wide"
        )
    if spec.key_heads > spec.kv_heads or spec.conv > _MAX_CONV or len(spec.decays) not in (0, spec.kv_heads):
        raise ProtocolError(
            f"layer {spec.kv_layer} of {spec.key_heads} key heads, a convolution {spec.conv} wide and "
            f"{len(spec.decays)} decays; allowed: up to {spec.kv_heads} heads, up to {_MAX_CONV} wide, a decay a head"
        )
    state, attention = (spec.key_heads, spec.conv, len(spec.decays)), (spec.window, spec.soft_cap, spec.index)
    if any(part is not None for part in attention) if spec.kind in STATES else any(state):
        raise ProtocolError(
            f"layer {spec.kv_layer} of kind {spec.kind!r:.80} has what only another kind has; allowed: a window, a "
            "soft cap and an index of attention; key heads, a convolution and decays of a state"
        )
    if (index := spec.index) is None:
        return
    sizes = (index.width, _MAX_WIDTH), (index.heads, _MAX_HEADS), (index.block, _MAX_CHOSEN), (index.top, _MAX_CHOSEN)
    if not all(0 < size <= limit for size, limit in sizes) or index.local > index.top:
        raise ProtocolError(
            f"layer {spec.kv_layer} with {index}; allowed: up to {_MAX_WIDTH} wide, {_MAX_HEADS} heads, {_MAX_CHOSEN} "
            "blocks of as many keys"
        )
    if spec.window is not None:
        raise ProtocolError(
            f"layer {spec.kv_layer} has an index and a window of {spec.window}; allowed: attention that sees all keys"
        )


logger = logging.getLogger("lamina")


class ServerCertificates:
    """The certificate in use, if there is one. `renewed` gives new credentials, None where they are as before. Raises
    ValueError for a first certificate that cannot be used.

    `context` is that of sockets, None without TLS. What is connected keeps the certificate that it was shown.
    """

    def __init__(self, first: Credentials, mutual: bool, renewed: Callable[[], Credentials | None]) -> None:
        self._mutual = mutual
        self._renewed = renewed
        self._newest = first
        self.context = self._context_of(first) if first.cert else None

    def bind(self, server: grpc.Server, address: str) -> int:
        """Have a gRPC server listen. The port. Raises RuntimeError where it cannot."""
        if self.context is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, server_credentials(lambda: self._newest, self._mutual)))

    def renew(self, listener: Listener | None) -> None:
        """Take a new certificate where there is one, for the listener too."""
        if self.context is None or (credentials := self._renewed()) is None:
            return
        try:
            self.context = self._context_of(credentials)
        except ValueError as error:  # between the writing of a certificate and that of its key
            logger.warning("the certificate from before stays in use: %s", error)
            return
        self._newest = credentials
        if listener is not None:
            listener.tls = self.context
        logger.info("there is a new certificate, which new connections are shown")

    def _context_of(self, credentials: Credentials) -> TlsContext:
        try:
            return server_context(credentials, self._mutual)
        except (OSError, ValueError) as error:  # the first: of ssl
            raise ValueError(f"the certificate or its key cannot be used: {error}") from error


_GRPC_THREADS = MAX_SESSIONS + 8  # handlers at once: the streams, and unary calls
_MAX_CALLS = MAX_SESSIONS + 32
_MAX_LINGER = 86_400.0  # seconds
_MAX_SHARES = 1 << 16
_ENGINE_ID = re.compile(r"[0-9a-f]{16,64}")
_MAX_PATH = 96  # bytes of a Unix socket's folder; every system allows 104 for the path

_NONE = Credentials()


class ServerError(LaminaError):
    """A server cannot be started as it is configured, or not at that address."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """`kv_memory` in bytes, `lease` in seconds; `listen` is host:port, port 0 any free one; `device` is where KV lies.

    `renewed` gives new credentials when the certificate was replaced, else None.
    """

    name: str
    kv_memory: int
    threads: int = 1
    device: str = "cpu"
    listen: str = "127.0.0.1:0"
    data_port: int = 0
    credentials: Credentials = _NONE
    mutual_tls: bool = False
    insecure: bool = False
    local_channel: bool = True
    lease: float = 30.0
    max_frame: int = MAX_FRAME
    max_message: int = MAX_MESSAGE
    cold: ColdTier | None = None
    renewed: Callable[[], Credentials | None] = lambda: None

    @property
    def host(self) -> str:
        return split_address(self.listen)[0]

    def check(self) -> None:
        """Raise ServerError for a server that would be open to strangers, or contradicts itself."""
        credentials = self.credentials
        if bool(credentials.cert) != bool(credentials.key):
            raise ServerError("a certificate needs its key, and a key its certificate")
        if self.mutual_tls and not (credentials.ca and credentials.cert):
            raise ServerError("mutual TLS needs a CA besides the server's certificate and key")
        if not is_loopback(self.host) and not self.insecure and not (credentials.cert and credentials.token):
            lacking = " and ".join(
                what for what, present in (("TLS", credentials.cert), ("a token", credentials.token)) if not present
            )
            raise ServerError(
                f"listening on {self.listen} without {lacking} would serve strangers; give both, "
                "or allow it with --insecure"
            )


class AttentionServer:
    """Serves one attention worker. `start` and `stop` once each, from one thread."""

    def __init__(
        self, config: ServerConfig, clock: Callable[[], float] = time.monotonic, loop: type[ComputeLoop] = ComputeLoop
    ) -> None:
        config.check()
        self.config = config
        device = find("device", config.device, prefer_gpu=False)
        self._arriving = Arriving(2 * config.max_frame)
        self._clock = clock
        self._started_at = clock()
        self._over: SimpleQueue[Session | None] = SimpleQueue()  # sessions whose channels are to be closed
        shared = config.name, config.kv_memory, config.threads
        self._leases = Leases(*shared, device, config.lease, clock, self._over.put, config.cold, loop)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._locals: dict[str, tuple[Listener, str]] = {}  # by session: its Unix socket, and the folder of that
        self._tcp: Listener | None = None
        self._grpc: grpc.Server | None = None
        self._threads = [
            threading.Thread(target=self._leases.loop.run, name="lamina-attention", daemon=True),
            threading.Thread(target=self._watch, name="lamina-lease", daemon=True),
        ]

    def start(self) -> str:
        """Listen and serve. Returns the address, with its port. Raises ServerError where it cannot be listened on."""
        config, credentials = self.config, self.config.credentials
        interceptors = (TokenInterceptor(credentials.token),) if credentials.token else ()
        pool = ThreadPoolExecutor(_GRPC_THREADS, thread_name_prefix="lamina-grpc")
        server = grpc.server(
            pool,
            interceptors=interceptors,
            options=server_options(config.max_message),
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        server.add_generic_rpc_handlers(
            (handlers(self, config.max_message, config.max_frame, self._arriving), health_handlers(self))
        )
        try:
            self._certificates = ServerCertificates(credentials, config.mutual_tls, config.renewed)
            port = self._certificates.bind(server, config.listen)
            self._open_channels()
        except ValueError as error:
            raise ServerError(str(error)) from error
        except (OSError, RuntimeError) as error:  # grpc raises RuntimeError for an address in use
            self._close_channels()
            raise ServerError(f"cannot listen on {config.listen}: {error}") from error
        self._grpc = server
        for thread in self._threads:
            thread.start()
        server.start()
        return join_address(config.host, port)

    def stop(self, grace: float = 1.0) -> None:
        """Take no new session, wait up to `grace` seconds for the live ones, then end them and free everything."""
        self.drain()
        deadline = self._clock() + grace
        while self._leases.live() and self._clock() < deadline:
            time.sleep(0.02)
        self._leases.end_all("the worker was stopped")
        self._stopped.set()
        self._leases.loop.stop()
        self._over.put(None)
        if self._grpc is not None:
            self._grpc.stop(1.0).wait()
        self._close_channels()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def drain(self) -> None:
        """Take no new session; the engine that is there sees it in the answer to its next heartbeat."""
        self._leases.draining = True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server is stopped. Returns whether it is."""
        return self._stopped.wait(timeout)

    # Called by the service, on gRPC's threads.

    def hello(self, hello: control.Hello, remaining: float) -> control.Welcome:
        """Open a session. Raises ProtocolError, which names what differs."""
        self._check(hello)
        secret = secrets.token_bytes(SECRET_SIZE)
        session, resumed = self._leases.admit(hello, secret)
        seat = session.seat
        try:
            seat.built.result(remaining)
        except FutureTimeout as error:
            self._leases.end(session, "the handshake took too long")
            raise ProtocolError(f"the worker was not ready within {remaining:.1f} seconds") from error
        except MemoryError as error:
            raise ProtocolError(f"no memory for {seat.config.kv_memory} bytes of KV") from error
        session.heard()
        claims = hello.protocol, hello.model or "no model named", hello.kv_dtype
        logger.info("session %.8s: protocol %d, %s, KV %s", session.id, *claims)
        ours, local, tcp = self.config, None, None
        if hello.local_channel and ours.local_channel and (path := self._open_local(session)):
            local = control.LocalOffer(path, secret)
        if hello.data_channel == "tcp" and self._tcp is not None:
            tcp = control.TcpOffer(self._tcp.port, secret)
        memory, features = seat.config.kv_memory, tuple(sorted(shared(hello.features)))
        return control.Welcome(
            ours.name, memory, ours.threads, ours.lease, ours.max_frame, local, tcp, resumed, seat.page_layout, features
        )

    def heartbeat(self, heartbeat: control.Heartbeat) -> control.Alive:
        session = self._leases.session(heartbeat.session)
        if session is None:
            return control.Alive("ended")
        session.heard()
        return control.Alive("draining" if self._leases.draining else "serving")

    def goodbye(self, goodbye: control.Goodbye) -> control.Alive:
        self._leases.goodbye(goodbye)
        return control.Alive("ended")

    def status(self) -> control.WorkerStatus:
        return self._leases.status(control.package_version(), self._clock() - self._started_at)

    @property
    def serving(self) -> bool:
        return not self._leases.draining

    def attach(self, session: str, channel: GrpcChannel) -> None:
        leased = self._leases.session(session)
        if leased is None:
            raise ProtocolError("no such session at this worker")
        self._leases.attach(leased, channel, "grpc")
        self._close_local(leased)

    def _check(self, hello: control.Hello) -> None:
        if hello.compute_dtype not in DTYPES:
            raise ProtocolError(f"compute dtype {hello.compute_dtype!r:.80}, this worker knows {', '.join(DTYPES)}")
        if hello.data_channel not in control.DATA_CHANNELS:
            raise ProtocolError(
                f"data channel {hello.data_channel!r:.80}, this worker knows {', '.join(control.DATA_CHANNELS)}"
            )
        if not _ENGINE_ID.fullmatch(hello.engine):
            raise ProtocolError(f"engine id {hello.engine!r:.80}, allowed: 16 to 64 hexadecimal characters")
        if hello.seat >= MAX_SEATS:
            raise ProtocolError(f"place {hello.seat}, allowed: 0 to {MAX_SEATS - 1}")
        if len(hello.share) != 2 or not 0 < hello.share[0] <= hello.share[1] <= _MAX_SHARES:
            raise ProtocolError(f"a place's share is {hello.share!r:.80}, allowed: (part, of), 1 to {_MAX_SHARES}")
        if not 0 <= hello.linger <= _MAX_LINGER:
            raise ProtocolError(f"linger of {hello.linger:g} seconds, allowed: 0 to {_MAX_LINGER:g}")
        if hello.sequence_tokens < 1:
            raise ProtocolError(f"sequences of {hello.sequence_tokens} tokens, allowed: 1 or more")
        if not 16 <= len(hello.session) <= 64:
            raise ProtocolError(f"a session id of {len(hello.session)} characters, allowed: 16 to 64")
        check_layers(hello.layers)
        check_blocks(hello)

    # The server's own threads.

    def _watch(self) -> None:
        """Close the channels of ended sessions, which can take a while, end the sessions that are overdue, and look for
        a new certificate."""
        while True:
            try:
                session = self._over.get(timeout=self._leases.tend())
            except Empty:
                self._certificates.renew(self._tcp)
                continue
            if session is None:
                return
            self._part(session)

    def _part(self, session: Session) -> None:
        self._close_local(session)
        if session.channel is not None:
            session.channel.close()

    # Channels.

    def _open_channels(self) -> None:
        config = self.config
        self._tcp = Listener(
            listen_tcp(config.host, config.data_port),
            self._admit,
            self._deliver("tcp"),
            self._certificates.context,
            config.max_frame,
            self._arriving,
        )

    def _open_local(self, session: Session) -> str:
        """The path of a Unix socket for the session's data, in a folder of its own; "" where the system has none."""
        try:
            folder = tempfile.mkdtemp(prefix=LOCAL_FOLDER)  # mode 0700
            if len(os.fsencode(folder)) > _MAX_PATH:
                os.rmdir(folder)
                folder = tempfile.mkdtemp(prefix=LOCAL_FOLDER, dir="/tmp")
            listening = listen_unix(path := os.path.join(folder, LOCAL_SOCKET))
        except OSError as error:
            logger.warning("no local channel: %s", error)
            return ""
        listener = Listener(
            listening, session.admits, self._deliver("local"), None, self.config.max_frame, self._arriving
        )
        with self._lock:
            self._locals[session.id] = (listener, folder)
        if session.ended:
            self._close_local(session)
        return path

    def _close_local(self, session: Session) -> None:
        """Close the session's Unix socket to new connections. What is connected stays."""
        with self._lock:
            local = self._locals.pop(session.id, None)
        if local is not None:
            listener, folder = local
            listener.close()
            shutil.rmtree(folder, ignore_errors=True)

    def _close_channels(self) -> None:
        if self._tcp is not None:
            self._tcp.close()

    def _admit(self, secret: bytes) -> bool:
        session = self._leases.opened_by(secret)
        return session is not None and session.admits(secret)

    def _deliver(self, kind: str) -> Callable[[SocketChannel, bytes], None]:
        def deliver(channel: SocketChannel, secret: bytes) -> None:
            session = self._leases.opened_by(secret)
            try:
                if session is None:
                    raise ProtocolError("the session is over")
                self._leases.attach(session, channel, kind)
            except ProtocolError:
                channel.close()
            if session is not None:
                self._close_local(session)

        return deliver
