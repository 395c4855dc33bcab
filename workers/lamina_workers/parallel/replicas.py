"""Whole replicas of a model as one worker: batches move from one to the next, layer by layer, and overlap.

Replica 0 is in this process, the others have processes, each with its own channel to every attention worker: queries,
keys and values never pass through here, only the residual stream and the attention's output between two slices. While
one batch waits for attention, its replica computes another's slice. Knows the commands and which batches may rotate;
knows nothing of processes, of requests, or of why a batch is what it is.

Rotational staggered pipelining: slice k of batch j runs on replica (j + k) mod a. So batches under way begin at
different replicas and follow each other around; how far apart they run comes from queueing at the replicas.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from lamina_protocols.channels import Credentials
from lamina_protocols.messages import Announced, HolderConfig
from lamina_protocols.routes import HolderBatch
from lamina_workers.decoder.sampler import Sampled, sample
from lamina_workers.errors import HolderFault, RankLost
from lamina_workers.model_worker.attention_merge import Waiting
from lamina_workers.model_worker.holder_traffic import SLOWEST
from lamina_workers.model_worker.interface import BatchWork, Returned, Seat
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.model_worker.layer_slices import Context, SlicedBatch, Waits, chosen, plain_rows, rotates, rotation
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.parallel import peer_codec, peer_messages
from lamina_workers.parallel.peers import Peer
from lamina_workers.ports.port import AttentionPort, Transported
from lamina_workers.ports.timing import Link, Times

logger = logging.getLogger("lamina")

_SLACK = 30.0  # seconds that a replica may take for a slice beyond what its holders may

_NOTHING = Context(torch.empty(0), torch.empty(0))

R = TypeVar("R")


class _Replica:
    """A replica in another process. `holders` are those that it has a channel to."""

    def __init__(self, mate: Peer) -> None:
        self.mate = mate
        self.holders: set[int] = set()
        self.asked: deque[int] = deque()  # holders that it was told to connect to, and has not answered for


class PipelineReplicas:
    """All replicas as the engine sees them: see `model_worker.Workers`, which this is.

    `own` is replica 0, `mates` the others. `here` are the holders in this process. `config` is what holders are built
    from, `patience` as for `ModelWorker`.

    A batch rotates where every holder that stores of it answers (see `slices.rotates`). Others run whole on replica 0:
    prompts that this process attends, those at a first token, whatever has no other replica to go to. Replicas that are
    gone are left out until they are back; nothing needs them, so none is ever `missing`.
    """

    missing: tuple[int, ...] = ()

    def __init__(
        self,
        own: ModelWorker,
        mates: Iterable[Peer] = (),
        *,
        here: Iterable[int],
        config: HolderConfig,
        patience: float = 10.0,
    ) -> None:
        self._own = own
        self._here = frozenset(here)
        self._config = config
        self._patience = patience
        self._replicas: dict[int, _Replica] = {}
        self._places: dict[int, peer_messages.Join] = {}  # where each holder at an attention worker is
        self._waits = Waits()
        self._suspended: dict[int, Waiting] = {}  # what each run waits for
        self._runs = 0
        self._turn = 0
        self._replica_attention = 0.0
        self.slices: dict[int, int] = {0: 0}
        """How many slices each replica has computed."""
        for mate in mates:
            self.returned(mate)

    @property
    def attention_seconds(self) -> float:
        """As `Workers` says, and how long slices at other replicas have waited for attention, or computed it. Where
        several wait at the same time that is more than the time that has passed."""
        return self._own.attention_seconds + self._replica_attention

    @property
    def times(self) -> Times:
        return self._own.times

    @property
    def replicas(self) -> int:
        """How many there are now, with the one in this process."""
        return 1 + sum(not replica.mate.closed for replica in self._replicas.values())

    # Batches.

    def announce(self, shares: Mapping[int, HolderBatch]) -> Generator[Waiting, None, tuple[int, dict[int, Announced]]]:
        return self._patiently(self._own.announce(shares))

    def announce_now(self, shares: Mapping[int, HolderBatch]) -> tuple[int, dict[int, Announced]]:
        return self._own.announce_now(shares)

    def execute(
        self, work: BatchWork, batch: int, shares: Mapping[int, HolderBatch], suspends: bool = True
    ) -> Generator[Waiting, None, Sampled]:
        """As `Workers.execute` says. Raises RankLost where a replica is gone that has a part in it; the others go on
        with what is announced next."""
        places = self._able(shares)
        if len(places) == 1:
            return self._patiently(self._own.execute(work, batch, shares, suspends))
        return self._patiently(self._rotate(places, work, batch, shares, suspends))

    def copy(self, moves: Sequence[Move], shares: Mapping[int, HolderBatch]) -> bool:
        return self._own.copy(moves, shares)

    def next_epoch(self) -> None:
        self._own.next_epoch()
        self._tell_epoch()

    def begin_after(self, epoch: int) -> None:
        self._own.begin_after(epoch)
        self._tell_epoch()

    # Holders.

    def join(self, number: int, port: AttentionPort, credentials: Credentials | None = None) -> tuple[Seat, ...]:
        """There is one holder more. Each other replica opens a channel of its own to it; until it has, batches that
        concern this holder do without that replica."""
        self._own.join(number, port)
        if isinstance(port, Transported):
            shown = credentials or Credentials()
            place = peer_messages.Join(
                number, port.name, port.address, 0, 1, 1, shown.ca, shown.cert, shown.key, shown.token
            )
            self._places[number] = place
            for replica in self._replicas.values():
                self._connect(replica, place)
        return ()

    def leave(self, number: int) -> None:
        self._own.leave(number)
        self._places.pop(number, None)
        for replica in self._replicas.values():
            self._disconnect(replica, number)

    def lost(self) -> list[int]:
        return self._own.lost()

    def links(self) -> dict[int, Link]:
        return self._own.links()

    def address(self, number: int) -> str:
        return self._own.address(number)

    # Replicas.

    def returned(self, peer: Peer) -> Returned:
        """A replica is there, for the first time or again, as another process. No KV was lost with it."""
        replica = self._replicas[peer.rank] = _Replica(peer)
        self.slices.setdefault(peer.rank, 0)
        self._tell(replica, peer_messages.BeginEpoch(self._own.epoch))
        for place in self._places.values():
            self._connect(replica, place)
        return Returned([], [], {})

    def _able(self, shares: Mapping[int, HolderBatch]) -> list[_Replica | None]:
        """Who computes a batch, in the order of the rotation; None is this process."""
        if not rotates(shares, self._here):
            return [None]
        numbers = {number for number, share in shares.items() if share.routes}
        able: list[_Replica | None] = [None]
        for _, replica in sorted(self._replicas.items()):
            self._hear(replica)
            if not replica.mate.closed and numbers <= replica.holders:
                able.append(replica)
        return able

    def _rotate(
        self,
        places: Sequence[_Replica | None],
        work: BatchWork,
        batch: int,
        shares: Mapping[int, HolderBatch],
        suspends: bool,
    ) -> Generator[Waiting, None, Sampled]:
        order = rotation(self._turn, len(self._config.layers), len(places))
        self._turn += 1
        taking = [places[at] for at in dict.fromkeys(order)]
        entered = [replica for replica in taking if replica is not None]
        own: SlicedBatch | None = None
        plain = plain_rows(work.sampling)
        allowed = self._allowed(shares)
        left: Context | torch.Tensor | None = None
        try:
            command = peer_codec.enter(batch, work, shares, plain, suspends)
            for replica in entered:  # they prepare while the first slice is computed
                replica.mate.expect(batch)
                replica.mate.tell(command)
            for number, at in enumerate(order):
                context = left if isinstance(left, Context) else None
                place = places[at]
                if place is None:
                    own = own or self._own.enter(work, batch, shares, suspends)
                    left = yield from own.slice(number, context)
                    self.slices[0] += 1
                    continue
                mate = place.mate
                mate.tell(peer_messages.Slice(batch, number, *(context or _NOTHING)))
                if not mate.ready(batch):
                    yield Waiting(mate, batch)
                said = self._take(
                    place, peer_messages.Sliced if number < len(order) - 1 else peer_messages.Chosen, batch, allowed
                )
                self.slices[mate.rank] += 1
                if isinstance(said, peer_messages.Chosen):
                    entered.remove(place)  # it has nothing left of this batch
                    mate.forget(batch)
                    with torch.inference_mode():
                        return chosen(work.sampling, said.tokens, said.logits)
                left = Context(said.hidden, said.attended)
        finally:
            if own is not None:
                own.close()
            self._own.forget(batch, shares)
            for replica in entered:
                replica.mate.forget(batch)
                self._tell(replica, peer_messages.Drop(batch))
        if not isinstance(left, torch.Tensor):
            raise HolderFault(f"batch {batch} has come to its end without logits")
        with torch.inference_mode():
            return sample(left, work.sampling)

    def _take(
        self,
        replica: _Replica,
        kind: type[peer_messages.Sliced] | type[peer_messages.Chosen],
        batch: int,
        timeout: float,
    ) -> peer_messages.Sliced | peer_messages.Chosen:
        mate = replica.mate
        try:
            said = mate.take(kind, batch, timeout)
        except HolderFault:
            for number in sorted(mate.lost):  # this replica's channel: ours may be well
                self._disconnect(replica, number)
                if number in self._places:
                    self._connect(replica, self._places[number])
            raise
        self._replica_attention += said.attention_seconds
        return said

    def _allowed(self, shares: Mapping[int, HolderBatch]) -> float:
        """Seconds that a replica may take for a slice: what its holders may, for each batch that is under way."""
        spec = self._config.layers[0]
        most = max(
            sum(
                (row.read[1] - row.read[0]) * row.count * len(route.heads)
                for route in share.routes
                if (row := route.row).read is not None
            )
            for share in shares.values()
        )
        seconds = self._patience + most * spec.group * (spec.d_k + spec.d_v) / SLOWEST
        return _SLACK + seconds * (1 + len(self._suspended))

    def _patiently(self, run: Generator[Waiting, None, R]) -> Generator[Waiting, None, R]:
        """The run; where it is resumed too early, whichever of all runs can go on first is waited for, not this one."""
        self._runs += 1
        key = self._runs
        try:
            while True:
                try:
                    waiting = next(run)
                except StopIteration as stop:
                    result: R = stop.value
                    return result
                self._suspended[key] = waiting
                yield waiting
                while not waiting.over() and self._waits.until_any(self._suspended.values(), self._patience):
                    if not waiting.over():
                        yield waiting
                del self._suspended[key]
        finally:
            self._suspended.pop(key, None)
            run.close()

    # What a replica is told beside batches. One that is gone is found out by whoever needs it.

    def _tell(self, replica: _Replica, command: peer_messages.Command) -> None:
        with contextlib.suppress(RankLost):
            replica.mate.tell(command)

    def _tell_epoch(self) -> None:
        for replica in self._replicas.values():
            replica.mate.forget()
            self._tell(replica, peer_messages.BeginEpoch(self._own.epoch))

    def _connect(self, replica: _Replica, place: peer_messages.Join) -> None:
        if not replica.mate.closed:
            self._tell(replica, place)
            replica.asked.append(place.number)

    def _disconnect(self, replica: _Replica, number: int) -> None:
        replica.holders.discard(number)
        replica.mate.lost.discard(number)
        self._tell(replica, peer_messages.Leave(number))

    def _hear(self, replica: _Replica) -> None:
        """What has come of the holders that it was told to connect to."""
        mate = replica.mate
        try:
            while replica.asked and mate.answered():
                said = mate.answer(peer_messages.Joined, 0.0)
                number = replica.asked.popleft()
                if isinstance(said, peer_messages.Failed):
                    logger.warning("model worker %d cannot use holder %d: %s", mate.rank, number, said.reason)
                elif number in self._places and number not in replica.asked:
                    replica.holders.add(number)
        except RankLost as error:
            logger.warning("%s", error)
