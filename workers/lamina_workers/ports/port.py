"""The seam to one holder: messages go in, replies come out, in order.

`LocalAttention` calls an attention worker in this process and copies nothing. A port over a transport has the same
methods, so the model worker cannot tell which it has. `Replies` sorts a port's replies by batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from lamina_kernels.exchange.layer_work import LayerWork
from lamina_kernels.states.advance import StateWork
from lamina_protocols.channels.channels import Channel
from lamina_protocols.channels.versions import FEATURES
from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_protocols.messages.messages import (
    Advanced,
    Announced,
    Attended,
    Fault,
    Fetched,
    FetchedPages,
    FetchedSample,
    PartHeld,
    Reply,
    Request,
    Survey,
    Surveyed,
    answered,
)
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.errors import HolderFault, HolderLost
from lamina_workers.ports.direct import enabled
from lamina_workers.ports.remote import RemoteAttention
from lamina_workers.ports.timing import Exchanges, Link

if TYPE_CHECKING:
    import torch

_MOST_FAULTS = 6  # of a holder in a row; a request that is to blame for faults has ended before
_MOST_PARTS = 1 << 18  # of an answered survey
_LEAST_PARTS = 32  # of an answer that is not the last: so many fit where each has 1,500 heads
_FAILURES = 64  # batches with a failure that is not reported yet

R = TypeVar("R", Advanced, Announced, Attended, Fetched, FetchedPages, FetchedSample, Surveyed)


class AttentionPort(Protocol):
    """One holder. Every request that is `answered` gets one reply, in order. Pages of holders of the same `page_layout`
    can be copied as they lie. `features` are those of `versions` that the holder has."""

    name: str
    page_layout: str
    features: frozenset[str]

    @property
    def closed(self) -> bool:
        """Whether the holder is gone for good."""

    def send(self, request: Request) -> None:
        """Hand over one message, at once where there is a transport; its tensors may be read until the next reply.

        Raises HolderLost where the holder is gone.
        """

    def receive(self, timeout: float | None = None) -> Reply:
        """The next reply. A failure at the holder since the last one comes as a `Fault` in its place.

        Raises HolderLost where the holder is gone, or no reply came for `timeout` seconds: then it counts as gone.
        """

    def ready(self) -> bool:
        """Whether `receive` would return or raise at once."""

    def close(self) -> None:
        """Let the holder go. It frees what it keeps."""


@runtime_checkable
class Transported(Protocol):
    """A port over a transport. `bytes_sent` and `bytes_received` count whole frames."""

    address: str
    channel_kind: str

    @property
    def bytes_sent(self) -> int: ...
    @property
    def bytes_received(self) -> int: ...


def survey(port: AttentionPort, timeout: float | None = None, past: int = 0) -> Surveyed:
    """All that a holder keeps, asked before anything else is under way at this port. Epochs up to `past`, and to the
    last that was announced there, are over.

    Raises HolderLost as `receive` does, HolderFault where the holder cannot say.
    """
    parts: tuple[PartHeld, ...] = ()
    while True:
        port.send(Survey(past, 1, parts[-1].handle + 1 if parts else 0))
        reply = port.receive(timeout)
        if isinstance(reply, Fault):
            raise HolderFault(f"{port.name}: {reply.reason}")
        if not isinstance(reply, Surveyed) or not _stands(reply, parts):
            port.close()
            raise HolderLost(f"{port.name}: a survey was asked for, got {reply!r:.200}")
        parts += reply.parts
        if not reply.more:
            return dataclasses.replace(reply, parts=parts)


def _stands(reply: Surveyed, before: tuple[PartHeld, ...]) -> bool:
    """Whether an answer can come after the parts `before`, so that the answers have an end."""
    handles = [part.handle for part in (*before[-1:], *reply.parts)]
    return (
        all(one < other for one, other in pairwise(handles))
        and all(part.lo <= part.held <= part.hi for part in reply.parts)
        and (len(reply.parts) >= _LEAST_PARTS or not reply.more)
        and len(before) + len(reply.parts) <= _MOST_PARTS
    )


class Replies:
    """The replies of one port, sorted by batch: several batches may be under way, each taking its own.

    A reply to a batch that is not expected any more is dropped, faults too: the holder knows itself which KV it lacks.
    Exchanges are measured from `asked` until the answer has been read, and waits bounded, by `clock`, in seconds.
    """

    def __init__(self, port: AttentionPort, clock: Callable[[], float] = time.perf_counter) -> None:
        self.port = port
        self.here: LocalAttention | None = port if isinstance(port, LocalAttention) else None
        self.frames: RemoteAttention | None = port if isinstance(port, RemoteAttention) else None
        self._clock = clock
        self._exchanges = Exchanges()
        self._query_times: dict[int, float] = {}  # seconds, by batch; each has one query under way at a time
        self._waiting: dict[int, deque[Reply]] = {}  # by batch under way
        self._works: dict[int, Sequence[LayerWork | None]] = {}  # by batch, of a holder in this process; see `accepted`
        self._collected: dict[int, Callable[[], bool]] = {}  # by batch: who takes its answers off the channel instead
        self._epoch = 0
        self._faults = 0  # since a batch was computed

    @property
    def channel(self) -> Channel | None:
        """The channel of the replies; None where the holder is in this process."""
        return self.frames.channel if self.frames is not None else None

    def expect(self, epoch: int, batch: int) -> None:
        """Keep replies to this batch until `forget`. A new epoch forgets all others."""
        if epoch > self._epoch:
            self._epoch = epoch
            self._waiting.clear()
            self._works.clear()
            self._query_times.clear()
        self._waiting.setdefault(batch, deque())

    def asked(self, batch: int) -> None:
        """A query of this batch is about to be sent."""
        self._query_times[batch] = self._clock()

    def link(self) -> Link:
        """The traffic so far."""
        port, seconds, counts = self.port, self._exchanges.seconds, tuple(self._exchanges.counts)
        if not isinstance(port, Transported):
            return Link(port.name, "", "in process", True, 0, 0, seconds, counts)
        return Link(
            port.name, port.address, port.channel_kind, False, port.bytes_sent, port.bytes_received, seconds, counts
        )

    def forget(self, batch: int) -> None:
        """Drop further replies to this batch."""
        self._waiting.pop(batch, None)
        self._works.pop(batch, None)
        self._query_times.pop(batch, None)
        self._collected.pop(batch, None)

    def accepted(self, batch: int) -> None:
        """Every holder has accepted a batch with rows here: the holder's work comes with that, where compiled code can
        do it."""
        if self.here is not None:
            self._works[batch] = self.here.works(batch)

    def work(self, batch: int, pool: int) -> LayerWork | None:
        """The work of an accepted batch in the layers of a pool; None where it needs Python."""
        works = self._works.get(batch)
        return works[pool] if works else None

    def collected(self, batch: int, collect: Callable[[], bool] | None) -> None:
        """Until `collect` is None, or the batch is forgotten, it takes the answers of this batch off the channel, and
        says whether the batch is to be resumed: it can go on, or waits for another holder now."""
        if collect is None:
            self._collected.pop(batch, None)
        else:
            self._collected[batch] = collect

    def ready(self, batch: int) -> bool:
        """Whether `take` would not wait, or what is `collected` says that the batch is to be resumed."""
        if (collect := self._collected.get(batch)) is not None:
            return collect()
        while not self._waiting[batch]:
            if not self.port.ready():
                return False
            try:
                self.sort(self.port.receive(0))
            except HolderLost:
                return True  # and `take` says so
        return True

    def heard(self, batch: int) -> bool:
        """Whether a reply to that batch has been read, and not been taken."""
        return bool(self._waiting[batch])

    def read(self, timeout: float) -> None:
        """Wait for a reply, whichever it is, and sort it in. Raises HolderLost."""
        self.sort(self.port.receive(timeout))

    def computed(self) -> None:
        """A batch is computed in which the holder has answered each layer."""
        self._faults = 0

    def measured(self, seconds: Iterable[float]) -> None:
        """Exchanges of a batch took so long which were not read here."""
        for duration in seconds:
            self._exchanges.add(duration)

    def take(self, kind: type[R], batch: int, layer: int | None = None, timeout: float | None = None) -> R:
        """The next reply to that batch, which must be of that kind (and layer); waits for it.

        Raises HolderFault for a fault, HolderLost where the port is gone or gives any other reply.
        """
        replies, remaining = self._waiting[batch], timeout
        until = self._clock() + timeout if timeout is not None and not replies else None
        while not replies:
            self.sort(self.port.receive(remaining))
            if until is not None:
                remaining = max(0.0, until - self._clock())
        reply = replies.popleft()
        if isinstance(reply, Fault):
            self._faults += 1
            if self._faults < _MOST_FAULTS:
                raise HolderFault(f"{self.port.name}: {reply.reason}")
            raise self.unfit(f"it failed {self._faults} times in a row, at last: {reply.reason}")
        if not isinstance(reply, kind) or layer != getattr(reply, "layer", None):
            got = f"{type(reply).__name__} of layer {getattr(reply, 'layer', None)}"
            raise self.unfit(f"{kind.__name__} of layer {layer} was due, got {got}")
        return reply

    def unfit(self, why: str) -> HolderLost:
        """What the holder has answered cannot be: it is let go, or it would answer so again. The error to raise."""
        self.port.close()
        return HolderLost(f"{self.port.name}: {why}")

    def sort(self, reply: Reply) -> None:
        """Keep a reply for its batch, if that is expected."""
        if reply.epoch == self._epoch and reply.batch in self._waiting:
            self._waiting[reply.batch].append(reply)
            if (since := self._query_times.pop(reply.batch, None)) is not None:
                self._exchanges.add(self._clock() - since)


class LocalAttention:
    """The port to an attention worker in this process. A message is handled while it is sent."""

    features = FEATURES

    def __init__(self, worker: AttentionWorker, name: str = "local") -> None:
        self.name = name
        self.page_layout = worker.page_layout
        self._worker = worker
        self._replies: deque[Reply] = deque()
        self._failures: dict[int, str] = {}  # by batch: why a message of it could not be handled

    @property
    def closed(self) -> bool:
        """Never: the worker lives as long as this process."""
        return False

    @property
    def device(self) -> torch.device:
        """Where its KV lies."""
        return self._worker.device

    def send(self, request: Request) -> None:
        """Let the worker handle the message; keep its reply, or its error as a `Fault`.

        The failure of a message without a reply comes as the next reply of its batch. Messages of several batches may
        be interleaved.
        """
        self.settle()
        reply: Reply | None = None
        try:
            reply = self._worker.handle(request)
        except (LaminaError, ValueError) as error:
            if answered(request) or not self._worker.outdated(request):
                self._failed(request.batch, error)
        if not answered(request):
            return
        reason = self._failures.pop(request.batch, "")
        if isinstance(request, Survey):
            self._failures.clear()
        if reason or reply is None:
            reply = Fault(request.epoch, request.batch, reason or "an earlier message went wrong")
        self._replies.append(reply)

    def settle(self) -> None:
        """Let the worker do the work that it has put off until after its last reply."""
        batch = self._worker.unsettled
        try:
            self._worker.settle()
        except (LaminaError, ValueError) as error:
            self._failed(batch or 0, error)

    def failing(self, batch: int) -> bool:
        """Whether a message of that batch has failed, and no reply has said so yet."""
        return batch in self._failures

    def _failed(self, batch: int, error: Exception) -> None:
        self._failures.setdefault(batch, f"{type(error).__name__}: {error}")
        if len(self._failures) > _FAILURES:
            del self._failures[next(iter(self._failures))]  # it was the last message of its batch

    def receive(self, timeout: float | None = None) -> Reply:
        """The oldest reply that was not taken yet. Raises ProtocolError where none is due."""
        if not self._replies:
            raise ProtocolError("no reply is due: nothing that has one was sent")
        return self._replies.popleft()

    def ready(self) -> bool:
        """Whether a reply is there: always, once something that has one was sent."""
        return bool(self._replies)

    def works(self, batch: int) -> Sequence[LayerWork | None]:
        """The work of a batch that was just accepted in the layers of each pool, for compiled callers; None where it
        needs Python."""
        return [self.layer_work(batch, pool) for pool in range(len(self._worker.pools))]

    def layer_work(self, batch: int, pool: int) -> LayerWork | None:
        """As `works`, in the layers of one pool."""
        return self._worker.layer_work(batch, pool) if enabled() else None

    def state_work(self, batch: int, pool: int) -> StateWork | None:
        """Its work in the layers of a pool of states; None where messages are needed."""
        return self._worker.state_work(batch, pool) if enabled() else None

    def worked(self, batch: int, pool: int, layers: range, work: LayerWork) -> None:
        """These layers of it are done, by their numbers within the pool."""
        self._worker.worked(batch, pool, layers, work)

    def close(self) -> None:
        """Nothing to do: the worker ends with its owner."""
