"""Channels over Unix sockets and TCP, with TLS or without, once both ends are connected (`socket_connections`)."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from weakref import WeakSet

from lamina_protocols.channels import CHECKSUM_SIZE, ChannelClosed, check_size, checksum, verified
from lamina_protocols.errors import CorruptFrame, LaminaError, ProtocolError
from lamina_protocols.frames import MAX_FRAME, PREFIX_SIZE, Arriving, Prefix, blank_frame, read_prefix
from lamina_protocols.tls import TLS_NOT_NOW, is_corrupt, is_tls

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
        self._both = select.poll()
        self._both.register(sock, select.POLLIN | select.POLLOUT)
        self._room = select.poll()
        self._room.register(sock, select.POLLOUT)
        self._unsent: list[memoryview] = []
        self._frames: deque[memoryview] = deque()
        self._held = 0  # bytes of them
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
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"a frame was not read within {timeout} seconds")
                self._wait_for_room(left)

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
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"no frame within {timeout} seconds")
                self._arrivals.poll(None if left is None else left * 1e3 + 1)
            frame = self._frames.popleft()
            self._held -= len(frame)
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
        if self._held > _HELD:
            self._room.poll(milliseconds)
        elif any(event & ~select.POLLOUT for _, event in self._both.poll(milliseconds)):
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
        self._held += len(frame)
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
