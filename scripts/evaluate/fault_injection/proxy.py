"""A TCP proxy that spoils bytes in both directions; tests switch its faults on and off while it runs.

It runs on an event loop in a thread of its own. Its faults are drawn from a seed; the times of the bytes are not.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

CHUNK = 1 << 16


@dataclass(frozen=True)
class Toxic:
    """What happens to each chunk on its way. `delay` and `jitter` in seconds; `slices`: at most so many bytes at a
    time, 0 for all; the others are probabilities: of one flipped bit, of being sent twice, of being cut short before
    the connection ends, of a reset in its place. A `black_hole` takes everything and gives nothing. `way`: only what
    goes "to" the target, or only what comes "from" it, is spoilt."""

    delay: float = 0.0
    jitter: float = 0.0
    slices: int = 0
    flip: float = 0.0
    duplicate: float = 0.0
    truncate: float = 0.0
    reset: float = 0.0
    black_hole: bool = False
    way: str = ""

    def spoil(self, chunk: bytes, rng: random.Random) -> tuple[list[bytes], bool]:
        """What goes on of a chunk, and whether the connection does."""
        if self.black_hole:
            return [], True
        if rng.random() < self.reset:
            return [], False
        if rng.random() < self.flip:
            spoilt = bytearray(chunk)
            spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
            chunk = bytes(spoilt)
        if rng.random() < self.truncate:
            return [chunk[: rng.randrange(len(chunk))]], False
        return list(self._sliced(chunk * (1 + (rng.random() < self.duplicate)), rng)), True

    def _sliced(self, chunk: bytes, rng: random.Random) -> Iterator[bytes]:
        at = 0
        while at < len(chunk):
            size = rng.randint(1, self.slices) if self.slices else len(chunk)
            yield chunk[at : at + size]
            at += size


@dataclass(frozen=True)
class FlipAt(Toxic):
    """Changes one bit of the byte at this place of each chunk of at least so many bytes: what is under a checksum, and
    not, by chance, what a library beneath reads. gRPC ends its process on some bits of HTTP/2."""

    at: int = -1
    least: int = 1

    def spoil(self, chunk: bytes, rng: random.Random) -> tuple[list[bytes], bool]:
        if len(chunk) < self.least:
            return [chunk], True
        spoilt = bytearray(chunk)
        spoilt[self.at] ^= 2
        return [bytes(spoilt)], True


class Proxy:
    """Listens on a port of loopback, by default a free one, and passes everything on to `target`, "host:port", through
    `toxic`.

    A context manager. `toxic` may be replaced at any time; `reset` ends all connections there are.
    """

    def __init__(self, target: str, seed: int = 0, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.toxic = Toxic()
        self.address = ""
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._seed = seed
        self._listen = listen
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    def reset(self) -> None:
        """End every connection, without a word."""
        self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, *self._listen)
        self.address = f"{self._listen[0]}:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        self._cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._pass(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either end closes, or it is reset."""
        ends = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
            ends.append(far_writer)
            pumps = [
                asyncio.ensure_future(self._pump(come, go, random.Random(f"{self._seed} {next(self._numbers)}"), way))
                for come, go, way in ((reader, far_writer, "to"), (far_reader, writer, "from"))
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in ends:
                sock = end.get_extra_info("socket")
                if sock is not None and sock.fileno() >= 0:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, no FIN
                end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random, way: str
    ) -> None:
        while chunk := await reader.read(CHUNK):
            toxic = self.toxic if self.toxic.way in ("", way) else Toxic()
            if toxic.delay or toxic.jitter:
                await asyncio.sleep(toxic.delay + toxic.jitter * rng.random())
            pieces, goes_on = toxic.spoil(chunk, rng)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if len(pieces) > 1:
                    await asyncio.sleep(0)  # each in a segment of its own
            if not goes_on:
                return
