"""An engine's seats at an attention worker, and the sessions by which it reaches them.

A seat has an attention worker of its own, which outlives its sessions where the engine asked for that. A session is one
data channel, from its handshake on.

A new seat attends a first token before any engine waits for it (`warm_up`). Kernels, threads and allocators of a
process are made with their first use, which takes up to some ten milliseconds. Without that, sequences that go on at a
worker which joins would have a pause.
"""

from __future__ import annotations

import hmac
import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate

import torch

from lamina_kernels.exchange.layer_work import LayerWork
from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Channel
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames import codec
from lamina_protocols.frames.tensors import DTYPES
from lamina_protocols.messages.layers import ATTENTION, BlockConfig, ColdTier, HolderConfig, LayerSpec
from lamina_protocols.messages.messages import (
    Advance,
    Announced,
    Announcement,
    BlockTables,
    Exchange,
    Fault,
    Fresh,
    Open,
    Query,
    Request,
    Row,
    Survey,
    answered,
)
from lamina_protocols.messages.pools import pools
from lamina_workers.attention_server.layer_server import LayerServer, ServedBatch
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.batch import Counters
from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.ports.port import LocalAttention

logger = logging.getLogger("lamina")

_MEMORY = 64 << 20  # bytes of KV of the worker that is used for it, at most


@lru_cache(maxsize=8)  # engines ask for any configs
def warm_up(config: HolderConfig, compute_dtype: str, threads: int, device: torch.device) -> None:
    """Have a worker of a few pages attend two tokens in all pools of plain attention, once for each kind of worker.
    Raises as `AttentionWorker` does."""
    settings = config.layers, config.page_size, config.dtype, min(config.kv_memory, _MEMORY)
    config = HolderConfig(*settings, config.sequence_tokens, config.sketches)
    pool_configs = pools(config)
    plain = [
        n for n, pool in enumerate(pool_configs) if all(s.kind == ATTENTION and not s.index for s in pool.config.layers)
    ]
    heads = [tuple(range(pool.config.layers[0].kv_heads)) for pool in pool_configs]
    port = LocalAttention(attention_worker(config, threads, device))
    for batch in (1, 2):
        opens = tuple(Open(n, n, heads[n], 0, config.page_size) for n in plain) if batch == 1 else ()
        rows = tuple(Row(n, batch - 1, 1, (0, batch), True, True) for n in plain)
        port.send(Announcement(1, batch, 0 if batch == 1 else len(plain), opens, rows))
        failed = isinstance(port.receive(), Fault)
        for layer in sorted(layer for n in plain for layer in pool_configs[n].layers):
            spec, dtype = config.layers[layer], DTYPES[compute_dtype]
            sizes = (spec.heads, spec.query_width), (spec.kv_heads, spec.key_width), (spec.kv_heads, spec.own_v)
            q, k, v = (torch.zeros(size, dtype=dtype, device=device) for size in sizes)
            port.send(Exchange(1, batch, layer, q, k, v))
            failed |= isinstance(port.receive(), Fault)
        for n in plain:
            port.layer_work(batch, n)
        if failed:
            logger.debug("a worker of %d layers could not be warmed up", len(config.layers))
            return


_SPARE = 4
_SPARE_BYTES = 16 << 20  # of the frames of further ones: decode batches of many numbers of tokens
# Batches at once, counted in each pool. Each keeps its frames, and an engine decides how large they are.
_MOST_SERVED = 16
_LAYERED = (Query, Fresh, Exchange, Advance)


@dataclass(slots=True)
class Traffic:
    """What sessions have moved and worked: bytes, and seconds spent on messages."""

    bytes_in: int = 0
    bytes_out: int = 0
    busy: float = 0.0

    def add(self, other: Traffic) -> None:
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.busy += other.busy


class EngineSeat:
    """One attention worker of an engine: what the handshake asked for, and the worker once `build` has made it.

    `built` is done when the worker was made, or could not be. `build`, `handle` and `free` belong to one thread.
    """

    def __init__(
        self, hello: control.Hello, kv_memory: int, clock: Callable[[], float], cold: ColdTier | None = None
    ) -> None:
        self.number = hello.seat
        self.model = hello.model
        self.share = hello.share
        self.linger = hello.linger
        settings = hello.layers, hello.page_size, hello.kv_dtype, kv_memory, hello.sequence_tokens, hello.sketches, cold
        self.config = BlockConfig(*settings, hello.blocks, hello.tables) if hello.blocks else HolderConfig(*settings)
        self.built: Future[None] = Future()
        self.sessions: dict[str, Session] = {}  # the live ones
        self.opened = 0  # sessions so far
        self.away_since = clock()  # while there is no session: the end of the last one
        self.ended = ""  # why
        self.counters = Counters()
        self.traffic = Traffic()  # of sessions that have ended
        self._compute_dtype = hello.compute_dtype
        self._surveyed = 0  # the last session that has asked what is kept
        self._worker: AttentionWorker | None = None
        self._port: LocalAttention | None = None
        self._layers: LayerServer | None = None
        # by number and pool: the batches whose layers are done without Python
        self._served: dict[tuple[int, int], ServedBatch] = {}
        self._spare: list[ServedBatch] = []  # the last ones, to be used again

    @property
    def worker(self) -> AttentionWorker | None:
        """The worker, while there is one. For reading counts only."""
        return self._worker

    @property
    def page_layout(self) -> str:
        """How the worker's pages are laid out, "" without a worker."""
        worker = self._worker
        return worker.page_layout if worker else ""

    def check(self, hello: control.Hello) -> None:
        """Raise ProtocolError for a handshake that asks for another kind of seat than this one."""
        place = f"of place {self.number}"
        control.check(f"model {place}", hello.model, self.model)
        control.check(f"compute dtype {place}", hello.compute_dtype, self._compute_dtype)
        control.check(f"KV dtype {place}", hello.kv_dtype, self.config.dtype)
        control.check(f"page size {place}", hello.page_size, self.config.page_size)
        control.check(f"tokens of a sequence {place}", hello.sequence_tokens, self.config.sequence_tokens)
        control.check(f"sketches {place}", hello.sketches, self.config.sketches)
        control.check(f"share {place}", hello.share, self.share)
        blocks = (self.config.blocks, self.config.tables) if isinstance(self.config, BlockConfig) else (0, ())
        control.check(f"blocks, and block tables of the layers, {place}", (hello.blocks, hello.tables), blocks)
        control.check(f"number of layers {place}", len(hello.layers), len(self.config.layers))
        for number, (theirs, ours) in enumerate(zip(hello.layers, self.config.layers, strict=True)):
            for name in _LAYER_FIELDS:
                control.check(f"{name} of layer {number} {place}", getattr(theirs, name), getattr(ours, name))

    def build(self, threads: int, name: str, device: torch.device, layers: LayerServer) -> None:
        """Make the worker, whose decode batches are offered to `layers`. Raises as `AttentionWorker` does."""
        self._layers = layers
        warm_up(self.config, self._compute_dtype, threads, device)
        self._worker = attention_worker(self.config, threads, device)
        self._port = LocalAttention(self._worker, name)
        self.counters = self._worker.counters

    def handle(self, frame: memoryview, reply: Callable[[list[bytes | memoryview]], None], session: int) -> None:
        """Handle one message of the `session` with that number: `reply` first, then `settle`. Raises ProtocolError for
        a frame that is no request, and for an announcement of a session that a later one has followed."""
        port = self._port
        if port is None:
            raise ProtocolError(f"place {self.number} is gone")
        if self._carried(frame, reply):
            return
        request = codec.decode(frame)
        if not isinstance(request, Request):
            raise ProtocolError(f"an engine sends requests, got a {type(request).__name__}")
        self._check_order(request, session)
        port.send(request)
        answer = port.receive() if answered(request) else None
        if answer is not None:
            reply(codec.encode(answer))
        port.settle()
        if isinstance(request, BlockTables) and isinstance(answer, Fault):
            raise ProtocolError(answer.reason)  # its engine counts otherwise than this worker
        # An announcement that was refused says nothing of the batch of that number which may be in flight.
        accepted = isinstance(answer, Announced) and answer.accepted
        failed = isinstance(answer, Fault) or port.failing(request.batch)
        self._take_back(request, accepted, failed)
        if accepted:
            self._offer(request, port)

    def _check_order(self, request: Request, session: int) -> None:
        """An engine that comes back asks what is kept, and counts on it from then on. What it announced over a session
        before, which it has settings up, may still be on its way."""
        if not isinstance(request, Announcement | BlockTables | Survey):
            return
        if session < self._surveyed:
            raise ProtocolError(
                f"session {session} of place {self.number} announces, session {self._surveyed} has taken over"
            )
        if isinstance(request, Survey):
            self._surveyed = session

    def _carried(self, frame: memoryview, reply: Callable[[list[bytes | memoryview]], None]) -> bool:
        """Whether this was a layer's frame of a served batch, over a channel that compiled code cannot read."""
        batch = next((batch for batch in self._served.values() if batch.takes(frame)), None)
        if batch is None:
            return False
        answer = batch.answer()
        if len(answer):
            reply([answer])
        batch.count()
        return True

    def _take_back(self, request: Request, accepted: bool, failed: bool) -> None:
        """Take back the offered batches that are over, or that Python has done something of."""
        layers, worker = self._layers, self._worker
        if layers is None or worker is None:
            return
        for key, batch in list(self._served.items()):
            number = batch.number
            strayed = accepted and request.batch == number  # a new epoch has a batch of the same number
            if isinstance(request, _LAYERED) and (batch.epoch, number) == (request.epoch, request.batch):
                # Python alone tells the engine of a failure, with the next reply.
                strayed = failed or not batch.passed(request.layer)
            if strayed or not batch.live or not worker.in_flight(number):
                layers.withdraw(batch)
                spare = [self._served.pop(key), *self._spare]
                total = accumulate(allocation.largest for allocation in spare)
                self._spare = [
                    allocation
                    for n, (allocation, size) in enumerate(zip(spare, total, strict=True))
                    if n < _SPARE or (size <= _SPARE_BYTES and n < _MOST_SERVED)
                ]

    def _offer(self, request: Request, port: LocalAttention) -> None:
        """Offer the batch that was accepted just now, if it is one."""
        layers, worker = self._layers, self._worker
        if layers is None or worker is None or not worker.in_flight(request.batch):
            return
        for pool in range(len(worker.pools)):
            self._offer_pool(request, port, pool, layers)

    def _offer_pool(self, request: Request, port: LocalAttention, pool: int, layers: LayerServer) -> None:
        """Offer the rows of a batch in one pool, where there is room for its frames."""
        if len(self._served) >= _MOST_SERVED:
            return
        work = port.layer_work(request.batch, pool)
        dtype = DTYPES[self._compute_dtype]
        if work is None or work.query != dtype or work.loaded != dtype:
            return
        alike = (batch for batch in self._spare if batch.work is work)
        try:
            served = next(alike, None) or self._serving(port, pool, work)
        except (ProtocolError, MemoryError):  # its frames are larger than any may be
            return
        self._spare = [batch for batch in self._spare if batch is not served]
        served.begin(request.epoch, request.batch)
        self._served[request.batch, pool] = served
        sessions = list(self.sessions.values())  # at once: other threads add some
        layers.offer(served, {session.channel for session in sessions if session.channel is not None})

    def _serving(self, port: LocalAttention, pool: int, work: LayerWork) -> ServedBatch:
        def done(number: int, those: range, seconds: float) -> None:
            port.worked(number, pool, those, work)
            self.traffic.busy += seconds

        return ServedBatch(work, pools(self.config)[pool].config.layers[0], done)

    def free(self) -> None:
        """Free the worker, and its KV with it."""
        for batch in self._served.values():
            if self._layers is not None:
                self._layers.withdraw(batch)
        self._served.clear()
        self._spare.clear()
        self._worker = self._port = None


_LAYER_FIELDS = tuple(field.name for field in fields(LayerSpec))


class Session:
    """`id` names it; `secret` opens its socket channel; `clock` gives seconds."""

    def __init__(self, id_: str, seat: EngineSeat, secret: bytes, lease: float, clock: Callable[[], float]) -> None:
        self.id = id_
        self.seat = seat
        self.ended = ""  # why
        seat.opened += 1
        self._number = seat.opened
        self.channel: Channel | None = None
        self.channel_kind = ""
        self._busy = 0.0
        self._secret = secret
        self._claim = threading.Lock()  # taken by the one connection that the secret opens, and never settings back
        self._lease = lease
        self._clock = clock
        self._heard_at = math.inf  # the lease begins with the end of the handshake, which has its own limit

    @property
    def traffic(self) -> Traffic:
        """What it has moved so far, and worked but for layers that were done without Python, which its seat counts."""
        channel = self.channel
        return Traffic(channel.bytes_received, channel.bytes_sent, self._busy) if channel else Traffic()

    def heard(self) -> None:
        """The engine gave a sign of life."""
        self._heard_at = self._clock()

    def overdue(self) -> bool:
        """Whether the lease ran out."""
        return self._clock() - self._heard_at > self._lease

    def knows(self, secret: bytes) -> bool:
        """Whether the secret is that of this session, which has not ended."""
        return hmac.compare_digest(secret, self._secret) and not self.ended

    def admits(self, secret: bytes) -> bool:
        """Whether a connection that shows the secret may be the session's channel: the first one that does."""
        return self.knows(secret) and self.channel is None and self._claim.acquire(blocking=False)

    def attach(self, channel: Channel, kind: str) -> None:
        """Take the data channel. Raises ProtocolError where there is one already, or the session has ended."""
        if self.channel is not None or self.ended:
            raise ProtocolError(f"session {self.id:.8} " + (self.ended or "has a data channel already"))
        self.channel, self.channel_kind = channel, kind
        self.heard()

    def step(self) -> None:
        """Take the message that has come, and answer it."""
        channel = self.channel
        if channel is None:
            raise ProtocolError("a session without a channel")
        frame = channel.receive(0)
        start_time = self._heard_at = self._clock()
        self.seat.handle(frame, channel.post, self._number)
        self._busy += self._clock() - start_time
