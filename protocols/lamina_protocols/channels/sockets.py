"""Channels over Unix sockets and TCP, with TLS or without, and how the two ends of one come together.

The connecting side first sends a secret of 32 bytes, and one byte that says whether each frame is followed by its
checksum. The listening side (`Listener`) answers a right secret with one byte. After that both sides send frames
(`SocketChannel`).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from weakref import WeakSet

from lamina_protocols.channels.channels import (
    CHECKSUM_SIZE,
    SECRET_SIZE,
    TLS_NOT_NOW,
    ChannelClosed,
    TlsContext,
    check_size,
    checksum,
    handshake,
    is_corrupt,
    is_loopback,
    is_tls,
    join_address,
    verified,
)
from lamina_protocols.errors import CorruptFrame, LaminaError, ProtocolError
from lamina_protocols.frames.frames import MAX_FRAME, PREFIX_SIZE, Arriving, Prefix, blank_frame, read_prefix

BUFFER = 4 << 20  # bytes of a socket's buffers where the system allows it: a layer's K and V of many rows
_HELD = 256 << 20  # bytes of received frames above which a blocked `send` reads no more
_LAST_READS = 16  # of a channel that is closed: who goes on sending is not listened to for ever
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_SMALL = 64 << 10  # bytes: TLS copies its input, so smaller buffers are joined rather than sent one by one

_NOT_NOW = (BlockingIOError, *TLS_NOT_NOW)

_sockets: WeakSet[socket.socket] = WeakSet()


def _let_go() -> None:
    """In a forked child: it has every connection too, and the other side would not see this program's end."""
    for sock in list(_sockets):
        if (descriptor := sock.detach()) >= 0:
            os.close(descriptor)


os.register_at_fork(after_in_child=_let_go)


class SocketChannel:
    """A `Channel` over a connected stream socket, which it owns. `arriving` counts its frames among others'."""

    def __init__(
        self, sock: socket.socket, checksummed: bool, max_frame: int = MAX_FRAME, arriving: Arriving | None = None
    ) -> None:
        sock.setblocking(False)
        _sockets.add(sock)
        self.bytes_sent = 0
        self.bytes_received = 0
        self._socket = sock
        self._tls = is_tls(sock)
        self._trailer = CHECKSUM_SIZE if checksummed else 0
        self.max_frame = max_frame  # bytes of the largest that is taken
        self._arriving = arriving or Arriving(2 * max_frame)
        self._busy = threading.RLock()  # held while the socket is in use, so that `close` waits
        self._closed = ""  # why
        self._unreadable: ProtocolError | None = None  # what came in is no frame; sending still works
        self._arrivals = select.poll()
        self._arrivals.register(sock, select.POLLIN)
        self._readiness = select.poll()
        self._readiness.register(sock, select.POLLIN | select.POLLOUT)
        self._room = select.poll()
        self._room.register(sock, select.POLLOUT)
        self._unsent: list[memoryview] = []
        self._frames: deque[memoryview] = deque()
        self._queued_size = 0  # bytes of them
        self._prefix_memory = memoryview(bytearray(PREFIX_SIZE))
        self._prefix: Prefix | None = None  # of the frame that is arriving
        self._memory = self._missing = self._prefix_memory  # its memory, and the part still to be filled

    def send(self, buffers: Sequence[bytes | memoryview], timeout: float | None = None) -> None:
        with self._busy:
            self._enqueue(buffers)
            deadline = None
            while not self.flush():
                if timeout is not None and deadline is None:
                    deadline = time.monotonic() + timeout
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise TimeoutError(f"a frame was not read within {timeout} seconds")
                self._wait_for_room(remaining)

    def post(self, buffers: Sequence[bytes | memoryview]) -> None:
        with self._busy:
            self._enqueue(buffers)
            if not self.flush():
                self._unsent = [memoryview(b"".join(self._unsent))]  # the buffers are the caller's

    def flush(self) -> bool:
        with self._busy:
            unsent = self._unsent
            while unsent:
                self._check_open()
                try:
                    sent = self._write(unsent)
                except _NOT_NOW:
                    return False
                except OSError as error:
                    raise self._broken(error) from error
                while unsent and sent >= len(unsent[0]):
                    sent -= len(unsent.pop(0))
                if sent:
                    unsent[0] = unsent[0][sent:]
            return True

    def watch(self, wake: Callable[[], None]) -> int | None:
        return self._socket.fileno()

    def unseen(self) -> bool:
        return bool(self._frames or self._unsent or self._tls or self._closed or self._unreadable)

    def receive(self, timeout: float | None = None) -> memoryview:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._busy:
            if not (self._frames or self._tls or self._closed or self._unreadable):
                # A reply has seldom arrived yet, and waiting costs less than an empty read. TLS is read without
                # waiting: it may hold bytes that no poll reports.
                self._arrivals.poll(None if timeout is None else timeout * 1e3)
            while not self._frames and not self._pump():
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise TimeoutError(f"no frame within {timeout} seconds")
                self._arrivals.poll(None if remaining is None else remaining * 1e3 + 1)
            frame = self._frames.popleft()
            self._queued_size -= len(frame)
            return frame

    def ready(self) -> bool:
        with self._busy:
            try:
                return bool(self._frames) or self._pump()
            except LaminaError:
                return True

    @property
    def plain(self) -> bool:
        """Whether frames stand in the socket as they are, without TLS or checksums."""
        return not (self._tls or self._trailer)

    @property
    def unsettled(self) -> bool:
        """Whether a frame waits to be received, or has begun to arrive."""
        return bool(self._frames) or self._prefix is not None or len(self._missing) < PREFIX_SIZE

    def lend(self) -> int | None:
        """The descriptor of a `plain` channel, for a caller that receives and sends whole frames itself until
        `reclaim`, on this thread; None where that cannot be now. `close` waits meanwhile, but wakes it by the end of
        the stream."""
        self._busy.acquire()
        if self._closed or self._unreadable or self._unsent or self.unsettled or not self.plain:
            self._busy.release()
            return None
        return self._socket.fileno()

    def reclaim(self, received: int, sent: int, begun: memoryview, unsent: memoryview) -> None:
        """The channel is used as before. `received` and `sent` bytes are counted; `begun` has come of a frame that is
        arriving, and `unsent` is left of one that was being sent, both to be copied."""
        try:
            self.bytes_received += received
            self.bytes_sent += sent
            if len(unsent):
                self._unsent = [memoryview(bytes(unsent))]
            if len(begun):
                self._begin(begun)
                self._memory[: len(begun)] = begun
                self._missing = self._memory[len(begun) :]
        finally:
            self._busy.release()

    def close(self) -> None:
        self._closed = self._closed or "closed on this side"
        with contextlib.suppress(OSError):  # wakes threads in poll; TLS's own shutdown would lose its state
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        with self._busy:
            # If bytes were left unread, the system would reset the connection, and the last frames sent would be lost.
            with contextlib.suppress(OSError):
                for _ in range(_LAST_READS):
                    if not socket.socket.recv(self._socket, BUFFER):
                        break
            self._socket.close()
            self._arriving.end(self)

    def _enqueue(self, buffers: Sequence[bytes | memoryview]) -> None:
        size = check_size(buffers, self.max_frame)
        frame = [memoryview(buffer) for buffer in buffers if len(buffer)]
        if self._trailer:
            frame.append(memoryview(checksum(buffers)))
        if self._tls and size < _SMALL:
            frame = [memoryview(b"".join(frame))]
        self._unsent += frame
        self.bytes_sent += size + self._trailer

    def _write(self, pending: list[memoryview]) -> int:
        if self._tls:
            return self._socket.send(pending[0])
        return self._socket.sendmsg(pending[:_IOV_MAX])

    def _wait_for_room(self, seconds: float | None) -> None:
        """Wait until more can be sent, so long at most. Incoming frames are read meanwhile, else two large frames could
        wait for each other; above a bound they are not."""
        milliseconds = None if seconds is None else seconds * 1e3 + 1
        if self._queued_size > _HELD:
            self._room.poll(milliseconds)
        elif any(event & ~select.POLLOUT for _, event in self._readiness.poll(milliseconds)):
            self._pump()

    def _pump(self) -> bool:
        """Read what has arrived, without waiting, up to the end of one frame. Returns whether a frame is whole."""
        self._check_open()
        if self._unreadable is not None:
            raise type(self._unreadable)(str(self._unreadable))
        try:
            while True:
                count = self._socket.recv_into(self._missing)
                if not count:
                    raise self._broken(None)
                self._missing = self._missing[count:]
                if not self._missing and self._next_part():
                    return True
        except _NOT_NOW:
            return False
        except ProtocolError as error:
            self._unreadable = error
            raise
        except OSError as error:
            if is_corrupt(error):
                self._unreadable = CorruptFrame(f"TLS: bits have changed on the way: {error}")
                raise self._unreadable from error
            raise self._broken(error) from error

    def _begin(self, begun: memoryview) -> Prefix:
        """A frame arrives that begins with these bytes. Returns its prefix."""
        prefix = read_prefix(begun, self.max_frame)
        self._arriving.begin(self, prefix.frame)
        self._memory, self._prefix = blank_frame(prefix, self._trailer), prefix
        return prefix

    def _next_part(self) -> bool:
        """The prefix or the rest of a frame is complete. Returns whether the frame is whole."""
        prefix = self._prefix
        if prefix is None:
            prefix = self._begin(self._prefix_memory)
            self._memory[:PREFIX_SIZE] = self._prefix_memory
            self._missing = self._memory[PREFIX_SIZE:]
            if self._missing:
                return False
        self._arriving.end(self)
        frame = verified(self._memory, prefix.frame)
        self._frames.append(frame)
        self._queued_size += len(frame)
        self.bytes_received += len(self._memory)
        self._prefix, self._memory, self._missing = None, self._prefix_memory, self._prefix_memory
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed(self._closed)

    def _broken(self, error: OSError | None) -> ChannelClosed:
        inside = self._prefix is not None or len(self._missing) < PREFIX_SIZE
        how = f"the connection broke: {error}" if error else "closed by the other side"
        self._closed = self._closed or (f"{how}, inside a frame" if inside else how)
        return ChannelClosed(self._closed)


LOCAL_FOLDER, LOCAL_SOCKET = "lamina-", "data"  # begin of a folder's name, and the Unix socket of a session in it
_PLAIN, _CHECKSUMMED = b"\x00", b"\x01"
_WELCOME = b"\x01"
_GREETINGS = 64  # the most connections that have not sent their secret yet
_GREETING_S = 5.0

_LINUX = sys.platform == "linux"
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # Linux's numbers; the socket module has no names for them


class Listener:
    """Accepts connections on a thread of its own, and gives each one with the right secret to `deliver`.

    Strangers who say nothing cannot keep others away: where the connections without a secret are too many, the oldest
    one of the address that has most of them is closed.

    `admit` says whether a secret is right, and is called once per connection; `deliver` takes over the channel, and
    gets the secret too. Both are called on threads of the listener. `tls` may be changed: new connections use it.
    """

    def __init__(
        self,
        sock: socket.socket,
        admit: Callable[[bytes], bool],
        deliver: Callable[[SocketChannel, bytes], None],
        tls: TlsContext | None = None,
        max_frame: int = MAX_FRAME,
        arriving: Arriving | None = None,
    ) -> None:
        self._socket = sock
        self._admit = admit
        self._deliver = deliver
        self.tls = tls
        self._max_frame = max_frame
        self._arriving = arriving
        self._lock = threading.Lock()
        self._greetings: dict[socket.socket, str] = {}  # and the address of each, the oldest first
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="lamina-listener", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The TCP port that is listened on."""
        port: int = self._socket.getsockname()[1]
        return port

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):  # wakes the thread in accept
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, address = self._socket.accept()
                sock.settimeout(_GREETING_S)
                if (tls := self.tls) is not None:
                    sock = tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            except OSError:
                if not self._closed:
                    time.sleep(0.05)  # out of file descriptors, for example: the next connection may succeed
                continue
            self._make_room(sock, address[0] if sock.family != socket.AF_UNIX else "")
            threading.Thread(target=self._greet, args=(sock,), name="lamina-greeting", daemon=True).start()

    def _make_room(self, sock: socket.socket, address: str) -> None:
        """Count the connection among those without a secret, and close one where they are too many."""
        with self._lock:
            self._greetings[sock] = address
            if len(self._greetings) <= _GREETINGS:
                return
            crowded = max(Counter(self._greetings.values()).items(), key=lambda item: item[1])[0]
            oldest = next(greeting for greeting, source in self._greetings.items() if source == crowded)
            del self._greetings[oldest]
            with contextlib.suppress(OSError):  # its thread wakes and closes it
                socket.socket.shutdown(oldest, socket.SHUT_RDWR)

    def _greet(self, sock: socket.socket) -> None:
        try:
            if self._closed:
                raise ChannelClosed("nobody listens any more")
            handshake(sock)
            greeting = _read_greeting(sock)
            if not self._admit(greeting[:SECRET_SIZE]):
                raise ChannelClosed("a wrong secret")
            with self._lock:
                self._greetings.pop(sock, None)
            sock.sendall(_WELCOME)
            _tune(sock)
            channel = SocketChannel(sock, greeting[SECRET_SIZE:] == _CHECKSUMMED, self._max_frame, self._arriving)
            self._deliver(channel, greeting[:SECRET_SIZE])
        except (OSError, LaminaError):
            sock.close()  # without an answer: the other side may be a stranger
        finally:
            with self._lock:
                self._greetings.pop(sock, None)


def listen_unix(path: str) -> socket.socket:
    """A Unix socket that listens at `path`; the folder's mode decides who may connect."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    return _listening(sock, path)


def listen_tcp(host: str, port: int) -> socket.socket:
    """A TCP socket that listens; port 0 takes a free one."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return _listening(sock, (host, port))


def is_here(host: str) -> bool:
    """Whether a host name or IP address is this host's own: packets to it come from it."""
    if is_loopback(host):
        return True
    try:
        addresses = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                if probe.getsockname()[0] == address[0]:
                    return True
        except OSError:
            continue
    return False


def connect_unix(path: str, secret: bytes, timeout: float, max_frame: int = MAX_FRAME) -> SocketChannel:
    """Raises ChannelClosed where no process listens, or the secret is refused."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise ChannelClosed(f"no local channel at {path}: {error}") from error
    return _introduced(sock, secret, False, max_frame)


def connect_tcp(
    host: str,
    port: int,
    secret: bytes,
    timeout: float,
    tls: TlsContext | None = None,
    max_frame: int = MAX_FRAME,
    checksummed: bool = False,
) -> SocketChannel:
    """Raises ChannelClosed where no process listens, TLS fails, or the secret is refused."""
    try:
        sock = socket.create_connection((host, port), timeout)
    except OSError as error:
        raise ChannelClosed(f"no data channel at {join_address(host, port)}: {error}") from error
    if tls is not None:
        try:
            sock = tls.wrap_socket(sock, server_hostname=host)
        except OSError as error:
            sock.close()
            raise ChannelClosed(f"TLS with {join_address(host, port)}: {error}") from error
    return _introduced(sock, secret, checksummed, max_frame)


def _listening(sock: socket.socket, address: str | tuple[str, int]) -> socket.socket:
    try:
        sock.bind(address)
        sock.listen()
    except OSError:
        sock.close()
        raise
    return sock


def _introduced(sock: socket.socket, secret: bytes, checksummed: bool, max_frame: int) -> SocketChannel:
    try:
        sock.sendall(secret + (_CHECKSUMMED if checksummed else _PLAIN))
        if sock.recv(1) != _WELCOME:
            raise ChannelClosed("the other side did not take the secret of this session")
    except OSError as error:
        sock.close()
        raise ChannelClosed(f"the other side did not take the secret of this session: {error}") from error
    except ChannelClosed:
        sock.close()
        raise
    _tune(sock)
    return SocketChannel(sock, checksummed, max_frame)


def _read_greeting(sock: socket.socket) -> bytes:
    greeting = b""
    deadline = time.monotonic() + _GREETING_S
    while len(greeting) <= SECRET_SIZE:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        part = sock.recv(SECRET_SIZE + 1 - len(greeting))
        if not part:
            raise ChannelClosed("closed before the secret was sent")
        greeting += part
    return greeting


def _tune(sock: socket.socket) -> None:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # The forced sizes need a privilege. Without it a Unix socket gets the most that the system allows. A TCP socket
    # keeps its automatic size, which may grow beyond that limit.
    for forced, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            if not _LINUX:
                raise OSError("no forced sizes")
            sock.setsockopt(socket.SOL_SOCKET, forced, BUFFER)
        except OSError:
            if sock.family == socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, plain, BUFFER)
