"""The gRPC service: its names, its errors, the channel over its stream, and the client.

The bodies of unary calls are bytes of `control`. The stream carries frames; a frame larger than a gRPC message may be
is cut into several.
"""

from __future__ import annotations

import math
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import CHECKSUM_SIZE, ChannelClosed, Credentials, check_size, checksum, verified
from lamina_protocols.channels.grpc_core import grpc
from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_protocols.frames.frames import MAX_FRAME, Arriving, Prefix, blank_frame, read_prefix

SERVICE = "lamina.Attention"
SESSION_KEY, CHECKSUM_KEY = "lamina-session", "lamina-checksum"  # metadata of the stream
MAX_MESSAGE = 4 << 20  # bytes of one gRPC message; frames above it are cut
_QUEUED = 64  # gRPC messages that wait on either side of a stream
_PARTING_S = 10.0  # for the last message to leave, on a server
_FAREWELL_S = 0.5  # for the server to end the stream, on a client
KEEPALIVE_MS, _KEEPALIVE_TIMEOUT_MS = 10_000, 5_000
_TLS_FAILED = re.compile(r"Tls handshake failed.*OPENSSL_internal:(.+?): (?:OK|Invalid certificate verification)")

T = TypeVar("T")


class WorkerUnreachable(LaminaError):
    """No worker answers at that address in time. A later call may succeed."""


class Busy(ProtocolError):
    """The worker has a session already, which may end soon."""


class WorkerRefused(LaminaError):
    """A worker answers, and refuses: another version, model or dtype, a wrong token, busy, draining."""


class WorkerBusy(WorkerRefused):
    """The worker has a session with another engine, which may end soon."""


class GrpcChannel:
    """A `Channel` over one bidirectional stream, the same on both sides. `arriving` counts its frames among others'.

    gRPC takes messages to send from `outgoing`, on a thread of its own. `start` reads incoming ones on another thread.
    """

    def __init__(
        self,
        checksummed: bool,
        max_message: int = MAX_MESSAGE,
        max_frame: int = MAX_FRAME,
        arriving: Arriving | None = None,
    ) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._trailer = CHECKSUM_SIZE if checksummed else 0
        self._max_message = max_message
        self._max_frame = max_frame
        self._arriving = arriving or Arriving(2 * max_frame)
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._in: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._frames: deque[memoryview] = deque()
        self._memory = memoryview(b"")  # of the frame whose messages are arriving
        self._prefix: Prefix | None = None
        self._filled = 0
        self._closed = ""  # why
        self._ended = ""  # why nothing more comes in
        self._unreadable: ProtocolError | None = None  # what came in is no frame; sending still works
        self._sent_all = False  # the last message has left; then gRPC ends the stream on this side
        self._serves = False
        self._parting: threading.Timer | None = None
        self._reader: threading.Thread | None = None
        self._cancel: Callable[[], object] = lambda: None
        self._wake: Callable[[], None] = lambda: None

    def start(self, incoming: Iterable[bytes], cancel: Callable[[], object], serves: bool = False) -> None:
        """Read `incoming` until it ends; `cancel` breaks the stream off. `serves`: this side ends the stream, in order,
        once its last message has left."""
        self._cancel = cancel
        self._serves = serves
        reader = threading.Thread(target=self._read, args=(incoming,), name="lamina-stream", daemon=True)
        reader.start()
        self._reader = reader  # only now that it runs: `close`, called by another thread, joins it

    def outgoing(self) -> Iterator[bytes]:
        """The messages to send, until the channel is closed."""
        while (message := self._out.get()) is not None:
            if self._out.qsize() == _QUEUED - 1:
                self._wake()  # there is room again
            yield message
        self._sent_all = True
        if self._parting is not None and self._serves:
            self._parting.cancel()

    def send(self, buffers: Sequence[bytes | memoryview], timeout: float | None = None) -> None:
        deadline = None
        for message in self._cut(buffers):
            while not self.flush():
                deadline = deadline or time.monotonic() + (math.inf if timeout is None else timeout)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"a frame was not read within {timeout} seconds")
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
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                self._take(self._in.get(timeout=remaining))
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
        self._arriving.end(self)
        self._out.put(None)
        self._in.put(None)
        started = self._reader is not None or self._serves  # what came may end the session before `start` has returned
        if started and self._reader is not threading.current_thread():
            # Breaking the stream off could overtake the last message, which says why it ends.
            self._part()
        else:
            self._cancel()

    def _part(self) -> None:
        """Give the last message time, without waiting for it."""
        if self._parting is None and not (self._serves and self._sent_all):
            self._parting = threading.Timer(_PARTING_S if self._serves else _FAREWELL_S, self._cancel)
            self._parting.daemon = True
            self._parting.start()

    def _cut(self, buffers: Sequence[bytes | memoryview]) -> Iterable[bytes]:
        """A frame as gRPC messages."""
        size = check_size(buffers, self._max_frame)
        if self._trailer:
            buffers = [*buffers, checksum(buffers)]
        self.bytes_sent += size + self._trailer
        is_one_message = size + self._trailer <= self._max_message
        return (b"".join(buffers),) if is_one_message else _messages(buffers, self._max_message)

    def _read(self, incoming: Iterable[bytes]) -> None:
        try:
            for message in incoming:
                while self._in.qsize() >= _QUEUED and not self._closed:
                    time.sleep(0.001)  # until `receive` takes some: gRPC's flow control stops the other side
                self._in.put(message)
                self._wake()
            self._ended = "closed by the other side"
        except grpc.RpcError as error:
            self._ended = f"the stream broke: {_details(error)}"
        except Exception as error:  # noqa: BLE001  # a server's iterator raises a bare Exception when its call ends
            self._ended = f"the stream broke: {error}" if str(error) else "closed by the other side"
        self._in.put(None)
        self._out.put(None)  # the other side reads no more: gRPC's sending thread may end
        if self._parting is not None and not self._serves:
            self._parting.cancel()
        self._wake()

    def _take(self, message: bytes | None) -> None:
        if message is None or self._closed or self._unreadable is not None:
            self._in.put(None)  # for the next call
            if self._unreadable is not None and not self._closed:
                raise type(self._unreadable)(str(self._unreadable))
            inside = ", inside a frame" if self._prefix is not None and self._unreadable is None else ""
            raise ChannelClosed((self._closed or self._ended) + inside)
        try:
            self._fill(message)
        except ProtocolError as error:
            self._unreadable = error
            self._in.put(None)
            raise

    def _fill(self, message: bytes) -> None:
        if self._prefix is None:
            self._prefix = read_prefix(message, self._max_frame)
            self._arriving.begin(self, self._prefix.frame)
            self._memory, self._filled = blank_frame(self._prefix, self._trailer), 0
        end = self._filled + len(message)
        if end > len(self._memory) or not message:
            raise ProtocolError(f"{end} bytes for a frame of {len(self._memory)}")
        self._memory[self._filled : end] = message
        self._filled = end
        if end == len(self._memory):
            self._arriving.end(self)
            self._frames.append(verified(self._memory, self._prefix.frame))
            self.bytes_received += end
            self._prefix, self._memory = None, memoryview(b"")


class WorkerClient:
    """Calls to one worker. Every unary call has a deadline in seconds; raises WorkerUnreachable and WorkerRefused."""

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
            name: self._channel.unary_unary(f"/{SERVICE}/{name}")
            for name in ("Hello", "Heartbeat", "Goodbye", "Status")
        }

    def hello(self, hello: control.Hello, timeout: float) -> control.Welcome:
        return self._call("Hello", hello, control.Welcome, timeout)

    def heartbeat(self, session: str, timeout: float) -> control.Alive:
        return self._call("Heartbeat", control.Heartbeat(session), control.Alive, timeout)

    def goodbye(self, goodbye: control.Goodbye, timeout: float) -> control.Alive:
        return self._call("Goodbye", goodbye, control.Alive, timeout)

    def status(self, timeout: float = 5.0) -> control.WorkerStatus:
        return self._call("Status", control.StatusRequest(), control.WorkerStatus, timeout)

    def stream(self, session: str, max_frame: int, checksummed: bool = False) -> GrpcChannel:
        """The data stream of a session. If the worker refuses it, its first `receive` raises."""
        channel = GrpcChannel(checksummed, self._max_message, max_frame)
        metadata = (*self._metadata, (SESSION_KEY, session), (CHECKSUM_KEY, str(int(checksummed))))
        call = self._channel.stream_stream(f"/{SERVICE}/Batch")(channel.outgoing(), metadata=metadata)
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
            unreachable = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            busy = code is grpc.StatusCode.RESOURCE_EXHAUSTED
            kind = WorkerUnreachable if unreachable else WorkerBusy if busy else WorkerRefused
            raise kind(f"{name} at {self.address}: {_details(error)}") from error
        except ValueError as error:  # gRPC raises it once this side has closed the channel
            raise WorkerUnreachable(f"{name} at {self.address}: {error}") from error
        if data is None:  # gRPC's, for a call that ended well without an answer: bits have changed, or the worker lies
            raise WorkerUnreachable(f"{name} at {self.address}: an answer without a message")
        return control.unpack(reply, data)


def _client_options(max_message: int) -> list[tuple[str, int]]:
    return [
        *channel_options(max_message),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, with this client's credentials
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]


def channel_options(max_message: int) -> list[tuple[str, int]]:
    limit = max(max_message, control.MAX_CONTROL)
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
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


def _details(error: grpc.RpcError) -> str:
    """The reason for a failed call, from the other side or from gRPC."""
    if not isinstance(error, grpc.Call):
        return str(error)
    details = error.details() or "no details"
    if failed := _TLS_FAILED.search(details):
        reason = failed[1].removeprefix("CERTIFICATE_VERIFY_FAILED: ").replace("_", " ")
        details = f"TLS fails: {reason if reason != 'WRONG VERSION NUMBER' else 'the other side speaks none'}"
    return f"{details} ({error.code().name})"
