"""The port to an attention worker elsewhere: handshake, data channel, heartbeat.

The data channel is a Unix socket where both ends share a host, else the gRPC stream, or TCP where that was asked for.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Channel, ChannelClosed, Credentials, split_address
from lamina_protocols.channels.control import CORRUPT, FAREWELL
from lamina_protocols.channels.grpc_client import WorkerBusy, WorkerClient, WorkerRefused
from lamina_protocols.channels.versions import FEATURES, PROTOCOL_VERSION, refused_by_previous, shared
from lamina_protocols.errors import CorruptFrame, LaminaError, ProtocolError
from lamina_protocols.frames import codec
from lamina_protocols.messages.layers import BlockConfig, HolderConfig
from lamina_protocols.messages.messages import Fault, Reply, Request, answered
from lamina_workers.errors import HolderLost
from lamina_workers.ports.data_channel import ChannelOptions, open_channel
from lamina_workers.ports.direct import DirectChannel, direct_channel
from lamina_workers.process.runtime import THREADS, Running, Runtime

logger = logging.getLogger("lamina")

_BUSY_PAUSE = 0.1  # seconds
_GOODBYE_S = 2.0
_FAREWELL_S = 1.0  # for a reason to arrive
_BEAT_S = 0.05, 1.0  # between two heartbeats: the least, the most
_USUAL = ChannelOptions()


@dataclass(frozen=True, slots=True)
class SeatOptions:
    """Which seat at a worker. A worker serves one engine at a time; each seat of it has an attention worker of its own.

    engine: its id, 16 to 64 hexadecimal characters, None: a fresh one. `seat_share`: the part of the worker's memory
    (part, of). `linger`: seconds that the KV stays after the last channel is gone; the longest of all channels counts.
    """

    engine: str | None = None
    seat: int = 0
    seat_share: tuple[int, int] = (1, 1)
    linger: float = 0.0


@dataclass(frozen=True, slots=True)
class Edges:
    """What a port touches outside of this process: calls to a worker, a session's data channel, the clock, threads."""

    client: Callable[[str, Credentials], WorkerClient] = WorkerClient
    channel: Callable[[WorkerClient, control.Welcome, str, ChannelOptions], tuple[Channel, str]] = open_channel
    runtime: Runtime = THREADS


THIS_PROCESS = Edges()


class RemoteAttention:
    """An `AttentionPort` over a channel. Made by `connect`; once lost or closed it stays so.

    `capacity` is the KV memory of its seat in bytes, `channel_kind` "local", "tcp" or "grpc", `page_layout` the
    name of its pages' layout, `features` what both sides have. `resumed`: the seat was there already and keeps its KV,
    which `port.survey` lists. One thread sends and receives; `close` may come from any. `on_corrupt` is called before
    the port is lost where a frame came with changed bits, to this side or to the worker.

    Whatever the worker does costs this port alone: it is lost where the worker does not read a frame in `patience`
    seconds, sends what is no reply, or one more reply than is `due`.
    """

    def __init__(
        self,
        name: str,
        client: WorkerClient,
        hello: control.Hello,
        welcome: control.Welcome,
        channel: Channel,
        channel_kind: str,
        lost_after: float,
        runtime: Runtime = THREADS,
    ) -> None:
        self.name = name
        self.address = client.address
        self.worker_name = welcome.name
        self.capacity = welcome.kv_memory
        self.resumed = welcome.resumed
        self.page_layout = welcome.page_layout
        self.features = shared(welcome.features)
        self.channel_kind = channel_kind
        self._client = client
        self._session = hello.session
        self._goodbye = control.Goodbye(hello.engine, hello.seat, hello.session)
        self._channel = channel
        self._direct = direct_channel(channel)
        self._lost = ""  # why
        self._lost_after = lost_after
        self.patience = lost_after
        self.due = 0
        self._on_lost: Callable[[str], None] = lambda name: None
        self.on_corrupt: Callable[[], None] = lambda: None
        self._runtime = runtime
        self._closed = runtime.signal()
        self._on_draining: Callable[[str], None] = lambda name: None
        self._lock = threading.Lock()
        self._parts = self._keeps = False
        self._parting: Running | None = None
        interval = max(_BEAT_S[0], min(welcome.lease / 6, _BEAT_S[1]))
        self._heart = runtime.start(lambda: self._beat(interval), "lamina-heartbeat")

    @property
    def channel(self) -> Channel:
        """What messages travel over."""
        return self._channel

    @property
    def bytes_sent(self) -> int:
        return self._channel.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._channel.bytes_received

    @property
    def closed(self) -> bool:
        """Whether the holder is gone, or was let go."""
        return self._closed.is_set()

    def watch(self, on_lost: Callable[[str], None], on_draining: Callable[[str], None] = lambda name: None) -> None:
        """Have `on_lost` called with the port's name where heartbeats find it to be lost, on their thread, or at once
        where it is: nobody else may be about to ask the worker for anything. `on_draining`: with each heartbeat of a
        worker that is about to end, and asks that its KV be moved elsewhere."""
        self._on_lost, self._on_draining = on_lost, on_draining
        if self.closed:
            on_lost(self.name)

    def send(self, request: Request) -> None:
        self.due += answered(request)
        self.send_frame(codec.encode(request))

    def receive(self, timeout: float | None = None) -> Reply:
        return self.reply_of(self.receive_frame(timeout))

    def send_frame(self, frame: Sequence[bytes | memoryview]) -> None:
        """Send one frame, given as buffers in order. Raises HolderLost, as all below. Whoever lets layers' frames pass
        as they are counts the replies that are `due`."""
        try:
            self._channel.send(frame, self.patience)
        except (ChannelClosed, ProtocolError, TimeoutError) as error:  # the second: more than the worker takes
            if isinstance(error, CorruptFrame):  # who waits for room reads meanwhile
                self.on_corrupt()
            raise self._gone(str(error)) from error

    def receive_frame(self, timeout: float | None = None) -> memoryview:
        try:
            return self._channel.receive(timeout)
        except TimeoutError as error:
            raise self.overdue(timeout or 0.0) from error
        except (ChannelClosed, ProtocolError) as error:
            if isinstance(error, CorruptFrame):
                self.on_corrupt()
            raise self._gone(str(error)) from error

    def reply_of(self, frame: memoryview) -> Reply:
        try:
            reply = codec.decode(frame)
        except ProtocolError as error:
            raise self._gone(str(error)) from error
        if not isinstance(reply, Reply):
            raise self._gone(f"it sent a {type(reply).__name__}")
        if isinstance(reply, Fault) and (reply.epoch, reply.batch) in (FAREWELL, CORRUPT):
            if (reply.epoch, reply.batch) == CORRUPT:
                self.on_corrupt()
            raise self._gone(f"it ended the session: {reply.reason}")
        self.due -= 1
        if self.due < 0:
            raise self._gone(f"it sent a {type(reply).__name__} that nobody has asked for")
        return reply

    def ready(self) -> bool:
        return self._channel.ready()

    @property
    def direct(self) -> DirectChannel | None:
        """The channel's compiled side; None where Python must carry its frames."""
        return self._direct

    def flush(self) -> None:
        """Send what is left to be sent."""
        try:
            if not self._channel.flush():
                self._channel.send((), self.patience)
        except (ChannelClosed, TimeoutError) as error:
            raise self._gone(str(error)) from error

    def overdue(self, timeout: float) -> HolderLost:
        """The holder has not answered in time, and counts as gone: the error to raise."""
        return self._gone(f"no reply within {timeout:.1f} seconds")

    def close(self, keeps: bool = False) -> None:
        """End the session in order: with the seat's last channel the worker frees its KV, even where it would have
        kept it for a lost engine. With `keeps` it ends as that of a lost engine does. A `receive` that waits raises
        HolderLost. Waits for nobody: a thread says goodbye, and `parted` waits for that."""
        self._end("closed on this side")
        with self._lock:
            if self._parts:
                return
            self._parts = True
            self._keeps = keeps
            try:
                self._parting = self._runtime.start(self._part, "lamina-closing", daemon=False)
                return
            except RuntimeError:  # when Python ends there are no new threads, in some versions
                pass
        self._part()

    def parted(self) -> None:
        """Wait until a closed port has said goodbye, for some seconds at most."""
        if self._parting is not None:
            self._parting.join()

    def _part(self) -> None:
        try:
            if not self._keeps:
                self._client.goodbye(self._goodbye, _GOODBYE_S)
        except LaminaError as error:  # a worker that does not hear it keeps the KV a while
            logger.debug("attention worker %s: %s", self.name, error)
        self._client.close()  # so that a heartbeat without an answer is not waited for
        self._heart.join()

    def status(self, timeout: float = 5.0) -> control.WorkerStatus:
        """Raises WorkerUnreachable or WorkerRefused."""
        return self._client.status(timeout)

    def _gone(self, reason: str) -> HolderLost:
        self._end(reason)
        return HolderLost(f"attention worker {self.name} at {self.address} is lost: {self._lost}")

    def _end(self, reason: str) -> None:
        self._lost = self._lost or reason
        self._closed.set()
        self._channel.close()

    def _beat(self, interval: float) -> None:
        """Send heartbeats, and end the port when the worker has not answered one for too long."""
        deadline = min(interval, self._lost_after / 2)
        answered_at = self._runtime.monotonic()
        while not self._closed.wait(min(interval, self._lost_after / 4)):
            try:
                state = self._client.heartbeat(self._session, deadline).state
            except LaminaError as error:
                silent = self._runtime.monotonic() - answered_at
                if silent > self._lost_after and not self._closed.is_set():
                    self._end(f"no heartbeat for {silent:.1f} seconds: {error}")
                    self._on_lost(self.name)
                continue
            answered_at = self._runtime.monotonic()
            if state == "draining":
                self._on_draining(self.name)
            # The reason comes over the channel, to the one that reads there, and may still be on its way.
            if state == "ended" and not self._closed.wait(_FAREWELL_S):
                self._end("the worker has ended the session")
                self._on_lost(self.name)


def connect(
    address: str,
    name: str,
    holder: HolderConfig,
    compute_dtype: str,
    model: str,
    seat: SeatOptions = SeatOptions(),
    channel: ChannelOptions = _USUAL,
    edges: Edges = THIS_PROCESS,
) -> RemoteAttention:
    """Open a channel to a seat at the worker that listens at `address`.

    A channel to a seat that exists is added to it, or takes it up again where its last channel is gone: its KV stays
    for `seat.linger` seconds after that, unless the channels were closed in order. Only one channel may announce.
    Frames of two channels come in any order. A channel that stores over another one's keys lets its last `Fresh` of a
    batch be followed by a request that is answered, such as a `Fetch` of nothing, before the next batch.

    `holder` describes the KV; its `kv_memory` does not count, a worker has its own. `model` is the model's fingerprint.
    Raises WorkerUnreachable where nothing answers, WorkerRefused where the worker does not want this session.
    """
    split_address(address)
    session = secrets.token_hex(16)
    hello = control.Hello(
        PROTOCOL_VERSION,
        control.package_version(),
        session,
        model,
        compute_dtype,
        holder.dtype,
        holder.page_size,
        holder.layers,
        channel.local_channel,
        channel.data_channel,
        secrets.token_hex(16) if seat.engine is None else seat.engine,
        seat.seat,
        seat.seat_share,
        seat.linger,
        holder.sequence_tokens,
        holder.sketches,
        tuple(sorted(FEATURES)),
        *((holder.blocks, holder.tables) if isinstance(holder, BlockConfig) else ()),
    )
    client = edges.client(address, channel.shown)
    try:
        welcome = _greet(client, hello, channel.timeout, edges.runtime)
        opened, kind = _opened(client, hello, welcome, channel, edges)
    except BaseException:
        client.close()
        raise
    logger.info("attention worker %s at %s (%.80s): data over %s", name, address, welcome.name, kind)
    return RemoteAttention(name, client, hello, welcome, opened, kind, channel.lost_after, edges.runtime)


def _opened(
    client: WorkerClient, hello: control.Hello, welcome: control.Welcome, channel: ChannelOptions, edges: Edges
) -> tuple[Channel, str]:
    """The data channel of the session and its kind. Where none can be opened the session ends, so that it does not keep
    others away; a seat that was there before is kept."""
    try:
        return edges.channel(client, welcome, hello.session, channel)
    except LaminaError:
        if not welcome.resumed:
            with contextlib.suppress(LaminaError):
                client.goodbye(control.Goodbye(hello.engine, hello.seat, hello.session), _GOODBYE_S)
        raise


def _greet(client: WorkerClient, hello: control.Hello, timeout: float, runtime: Runtime) -> control.Welcome:
    """Say hello; again for a while where the worker is busy, since the previous engine may be about to leave, and as
    the previous version does where the worker is of that."""
    deadline = runtime.monotonic() + timeout
    while True:
        try:
            return client.hello(hello, timeout)
        except WorkerBusy:
            if runtime.monotonic() + _BUSY_PAUSE > deadline:
                raise
        except WorkerRefused as refusal:
            previous = hello.protocol == PROTOCOL_VERSION and not hello.blocks  # which knows no blocks
            if not previous or not refused_by_previous(str(refusal)):  # it is asked once more
                raise
            hello = control.as_previous(hello)
            logger.info("the worker at %s has protocol version %d", client.address, hello.protocol)
            continue
        runtime.sleep(_BUSY_PAUSE)
