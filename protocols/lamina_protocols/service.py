"""The gRPC service: names, handlers, client, channel options, and who may call. Knows no session and no attention.

Bodies are bytes of `control`; the stream carries frames, cut where they are larger than a gRPC message may be. All
calls but the standard health service want the token, where there is one.
"""

from __future__ import annotations

import hmac
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import grpc

from lamina_protocols import control
from lamina_protocols.channels import CHECKSUM_SIZE, ChannelClosed, Credentials, check_size, checksum, verified
from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_protocols.frames import MAX_FRAME, Prefix, blank_frame, read_prefix

logger = logging.getLogger("lamina")

SERVICE = "lamina.Attention"
HEALTH = "grpc.health.v1.Health"
SESSION_KEY, CHECKSUM_KEY = "lamina-session", "lamina-checksum"  # metadata of the stream
MAX_MESSAGE = 4 << 20  # bytes of one gRPC message; frames above it are cut
_QUEUED = 64  # gRPC messages that wait on either side of a stream
_KEEPALIVE_MS, _KEEPALIVE_TIMEOUT_MS = 10_000, 5_000

T = TypeVar("T")


class WorkerUnreachable(LaminaError):
    """Nobody answers at that address, or not in time. It may do so later."""


class Busy(ProtocolError):
    """A worker has a session already; it may be over soon."""


class WorkerRefused(LaminaError):
    """A worker answers, and refuses: another version, model or dtype, a wrong token, busy, draining."""


class WorkerBusy(WorkerRefused):
    """The worker has a session with somebody else, who may be about to leave."""


class AttentionService(Protocol):
    """What a server does. A LaminaError becomes the status of the call, its text what the client is told.

    `remaining` is how many seconds the caller still waits.
    """

    def hello(self, hello: control.Hello, remaining: float) -> control.Welcome: ...

    def heartbeat(self, heartbeat: control.Heartbeat) -> control.Alive: ...

    def goodbye(self, goodbye: control.Goodbye) -> control.Alive: ...

    def status(self) -> control.WorkerStatus: ...

    def drain(self) -> control.WorkerStatus: ...

    def attach(self, session: str, channel: GrpcChannel) -> None:
        """Take the channel of the stream of that session."""


class GrpcChannel:
    """A `Channel` over one bidirectional stream, the same on both sides.

    gRPC takes what goes out from `outgoing`, on a thread of its own; `start` reads what comes in on another.
    """

    def __init__(self, checksummed: bool, max_message: int = MAX_MESSAGE, max_frame: int = MAX_FRAME) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._trailer = CHECKSUM_SIZE if checksummed else 0
        self._max_message = max_message
        self._max_frame = max_frame
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._in: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._frames: deque[memoryview] = deque()
        self._memory = memoryview(b"")  # of the frame whose messages are arriving
        self._prefix: Prefix | None = None
        self._filled = 0
        self._closed = ""  # why
        self._ended = ""  # why nothing more comes in
        self._unreadable = ""  # what came in that is no frame; the other side can still be told so
        self._reader: threading.Thread | None = None
        self._cancel: Callable[[], object] = lambda: None
        self._wake: Callable[[], None] = lambda: None

    def start(self, incoming: Iterable[bytes], cancel: Callable[[], object]) -> None:
        """Read `incoming` until it ends; `cancel` breaks the stream off."""
        self._cancel = cancel
        reader = threading.Thread(target=self._read, args=(incoming,), name="lamina-stream", daemon=True)
        reader.start()
        self._reader = reader  # not before it runs: `close`, from another thread, waits for it

    def outgoing(self) -> Iterator[bytes]:
        """What is to be sent, until the channel is closed."""
        while (message := self._out.get()) is not None:
            if self._out.qsize() == _QUEUED - 1:
                self._wake()  # there is room again
            yield message

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        for message in self._cut(buffers):
            while not self.flush():
                time.sleep(0.001)  # the other side does not read
            self._out.put(message)

    def post(self, buffers: Sequence[bytes | memoryview]) -> None:
        self.flush()
        for message in self._cut(buffers):
            self._out.put(message)

    def flush(self) -> bool:
        if self._closed or self._ended:
            raise ChannelClosed(self._closed or self._ended)
        return self._out.qsize() < _QUEUED

    def watch(self, wake: Callable[[], None]) -> int | None:
        self._wake = wake
        return None

    def unseen(self) -> bool:
        return True

    def receive(self, timeout: float | None = None) -> memoryview:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._frames:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                self._take(self._in.get(timeout=left))
            except queue.Empty:
                raise TimeoutError(f"no frame within {timeout} seconds") from None
        return self._frames.popleft()

    def ready(self) -> bool:
        try:
            while not self._frames:
                self._take(self._in.get_nowait())
        except queue.Empty:
            return False
        except LaminaError:
            pass
        return True

    def close(self) -> None:
        self._closed = self._closed or "closed on this side"
        self._out.put(None)
        self._in.put(None)
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(0.5)  # the other side ends the stream when it sees its end, else it is broken off
        self._cancel()

    def _cut(self, buffers: Sequence[bytes | memoryview]) -> Iterable[bytes]:
        """A frame as gRPC messages."""
        size = check_size(buffers, self._max_frame)
        if self._trailer:
            buffers = [*buffers, checksum(buffers)]
        self.bytes_sent += size + self._trailer
        whole = size + self._trailer <= self._max_message
        return (b"".join(buffers),) if whole else _messages(buffers, self._max_message)

    def _read(self, incoming: Iterable[bytes]) -> None:
        try:
            for message in incoming:
                while self._in.qsize() >= _QUEUED and not self._closed:
                    time.sleep(0.001)  # nobody receives: gRPC's flow control then stops the other side
                self._in.put(message)
                self._wake()
            self._ended = "closed by the other side"
        except grpc.RpcError as error:
            self._ended = f"the stream broke: {_details(error)}"
        except Exception as error:  # noqa: BLE001  # a server's iterator raises a bare Exception when its call ends
            self._ended = f"the stream broke: {error}" if str(error) else "closed by the other side"
        self._in.put(None)
        self._out.put(None)  # nobody is there to read more: let go of gRPC's thread
        self._wake()

    def _take(self, message: bytes | None) -> None:
        if message is None or self._closed or self._unreadable:
            self._in.put(None)  # for the next call
            inside = ", inside a frame" if self._prefix is not None and not self._unreadable else ""
            raise ChannelClosed((self._closed or self._unreadable or self._ended) + inside)
        try:
            self._fill(message)
        except ProtocolError as error:
            self._unreadable = str(error)
            self._in.put(None)
            raise

    def _fill(self, message: bytes) -> None:
        if self._prefix is None:
            self._prefix = read_prefix(message, self._max_frame)
            self._memory, self._filled = blank_frame(self._prefix, self._trailer), 0
        end = self._filled + len(message)
        if end > len(self._memory) or not message:
            raise ProtocolError(f"{end} bytes for a frame of {len(self._memory)}")
        self._memory[self._filled : end] = message
        self._filled = end
        if end == len(self._memory):
            self._frames.append(verified(self._memory, self._prefix.frame))
            self.bytes_received += end
            self._prefix, self._memory = None, memoryview(b"")


class WorkerClient:
    """Calls to one worker. Every unary call has a deadline; raises WorkerUnreachable and WorkerRefused."""

    def __init__(self, address: str, credentials: Credentials | None = None, max_message: int = MAX_MESSAGE) -> None:
        credentials = credentials or Credentials()
        self.address = address
        self._max_message = max_message
        self._metadata = (("authorization", f"Bearer {credentials.token}"),) if credentials.token else ()
        options = _client_options(max_message)
        if credentials.ca:
            tls = grpc.ssl_channel_credentials(credentials.ca, credentials.key or None, credentials.cert or None)
            self._channel = grpc.secure_channel(address, tls, options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        self._calls = {
            name: self._channel.unary_unary(f"/{SERVICE}/{name}", _same, _same)
            for name in ("Hello", "Heartbeat", "Goodbye", "Status", "Drain")
        }

    def hello(self, hello: control.Hello, timeout: float) -> control.Welcome:
        return self._call("Hello", hello, control.Welcome, timeout)

    def heartbeat(self, session: str, timeout: float) -> control.Alive:
        return self._call("Heartbeat", control.Heartbeat(session), control.Alive, timeout)

    def goodbye(self, goodbye: control.Goodbye, timeout: float) -> control.Alive:
        return self._call("Goodbye", goodbye, control.Alive, timeout)

    def status(self, timeout: float = 5.0) -> control.WorkerStatus:
        return self._call("Status", control.StatusRequest(), control.WorkerStatus, timeout)

    def drain(self, timeout: float = 5.0) -> control.WorkerStatus:
        """Let the worker take no new session, and tell the one under way."""
        return self._call("Drain", control.Drain(), control.WorkerStatus, timeout)

    def stream(self, session: str, max_frame: int, checksummed: bool = False) -> GrpcChannel:
        """The data stream of a session. That the worker refuses it shows in its first `receive`."""
        channel = GrpcChannel(checksummed, self._max_message, max_frame)
        metadata = (*self._metadata, (SESSION_KEY, session), (CHECKSUM_KEY, str(int(checksummed))))
        call = self._channel.stream_stream(f"/{SERVICE}/Batch", _same, _same)(channel.outgoing(), metadata=metadata)
        channel.start(call, call.cancel)
        return channel

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, name: str, message: Any, reply: type[T], timeout: float) -> T:
        try:
            data = self._calls[name](control.pack(message), timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            gone = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            busy = code is grpc.StatusCode.RESOURCE_EXHAUSTED
            kind = WorkerUnreachable if gone else WorkerBusy if busy else WorkerRefused
            raise kind(f"{name} at {self.address}: {_details(error)}") from error
        except ValueError as error:  # so says gRPC where this side has closed the channel
            raise WorkerUnreachable(f"{name} at {self.address}: {error}") from error
        return control.unpack(reply, data)


class TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Refuses every call without the token, streams too. The health service is open: it tells no more than a ping."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        given = [value for key, value in details.invocation_metadata if key == "authorization"]
        matches = [hmac.compare_digest(_encoded(value), self._expected) for value in given]
        if any(matches) or details.method.startswith(f"/{HEALTH}/"):
            return continuation(details)
        told = "the token is wrong" if given else "a token is needed"

        def refuse(_: Any, context: grpc.ServicerContext) -> Any:
            logger.warning("%s refused to %s: %s", details.method, context.peer(), told)
            _abort(context, grpc.StatusCode.UNAUTHENTICATED, told)

        handler = continuation(details)
        if handler is not None and handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse, _same, _same)
        return grpc.unary_unary_rpc_method_handler(refuse, _same, _same)


def handlers(service: AttentionService, max_message: int, max_frame: int) -> Any:
    """The generic handlers of the service, to be added to a server."""

    def unary(cls: type[T], act: Callable[[T, float], Any]) -> Any:
        def call(data: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                return control.pack(act(control.unpack(cls, data), context.time_remaining() or 60.0))
            except Busy as error:
                _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            except LaminaError as error:
                _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
            except Exception as error:  # the client learns its kind, the log the rest
                logger.exception("a call failed")
                _abort(context, grpc.StatusCode.INTERNAL, type(error).__name__)

        return grpc.unary_unary_rpc_method_handler(call, _same, _same)

    def batch(incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = dict(context.invocation_metadata())
        channel = GrpcChannel(metadata.get(CHECKSUM_KEY) == "1", max_message, max_frame)
        try:
            service.attach(metadata.get(SESSION_KEY, ""), channel)
        except LaminaError as error:
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        channel.start(incoming, context.cancel)
        yield from channel.outgoing()

    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Hello": unary(control.Hello, service.hello),
            "Heartbeat": unary(control.Heartbeat, lambda message, _: service.heartbeat(message)),
            "Goodbye": unary(control.Goodbye, lambda message, _: service.goodbye(message)),
            "Status": unary(control.StatusRequest, lambda *_: service.status()),
            "Drain": unary(control.Drain, lambda *_: service.drain()),
            "Batch": grpc.stream_stream_rpc_method_handler(batch, _same, _same),
        },
    )


def server_credentials(credentials: Credentials, mutual: bool) -> grpc.ServerCredentials:
    """TLS of a server; with `mutual`, clients must show a certificate of the CA."""
    pair = [(credentials.key, credentials.cert)]
    return grpc.ssl_server_credentials(pair, credentials.ca if mutual else None, mutual)


def server_options(max_message: int) -> list[tuple[str, int]]:
    return [
        *_common_options(max_message),
        ("grpc.so_reuseport", 0),  # a port in use is an error
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    ]


def _client_options(max_message: int) -> list[tuple[str, int]]:
    return [
        *_common_options(max_message),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, with this client's credentials
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]


def _common_options(max_message: int) -> list[tuple[str, int]]:
    limit = max(max_message, control.MAX_CONTROL)
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _messages(buffers: Sequence[bytes | memoryview], limit: int) -> Iterator[bytes]:
    """The buffers joined, in pieces of `limit` bytes; each byte is copied once."""
    pieces: list[memoryview] = []
    room = limit
    for buffer in buffers:
        view = memoryview(buffer)
        while len(view):
            piece = view[:room]
            view = view[len(piece) :]
            pieces.append(piece)
            room -= len(piece)
            if not room:
                yield b"".join(pieces)
                pieces, room = [], limit
    if pieces:
        yield b"".join(pieces)


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, told: str) -> NoReturn:
    context.abort(code, told)
    raise RuntimeError("a call went on after it was ended")  # abort raises


def _same(data: bytes) -> bytes:
    return data


def _encoded(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _details(error: grpc.RpcError) -> str:
    """What the other side or gRPC says of a failed call."""
    if not isinstance(error, grpc.Call):
        return str(error)
    return f"{error.details() or 'no details'} ({error.code().name})"
