"""How both ends of a socket channel come together: the listening side, the connecting side, and their greeting.

The connecting side first sends a secret of 32 bytes, and one byte that says whether each frame is followed by its
checksum. The listening side answers a right secret with one byte. After that both sides send frames.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

from lamina_protocols.channels import SECRET_SIZE, ChannelClosed, is_loopback, join_address
from lamina_protocols.errors import LaminaError
from lamina_protocols.frames import MAX_FRAME, Arriving
from lamina_protocols.socket_channel import BUFFER, SocketChannel
from lamina_protocols.tls import TlsContext, handshake

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
            most = max(Counter(self._greetings.values()).items(), key=lambda item: item[1])[0]
            oldest = next(each for each, source in self._greetings.items() if source == most)
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
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in found:
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
