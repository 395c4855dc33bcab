"""Whole replicas of a model as one worker: batches move from one to the next, layer by layer, and overlap.

Replica 0 is in this process, the others have processes, each with its own channel to every attention worker: queries,
keys and values never pass through here, only the residual stream and the attention's output between two slices. While
one batch waits for attention, its replica computes another's slice.

Rotational staggered pipelining: slice k of batch j runs on replica (j + k) mod a. So batches under way begin at
different replicas and follow each other around; how far apart they run comes from queueing at the replicas.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from lamina_protocols.channels.channels import Credentials
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Announced
from lamina_protocols.messages.pools import pools
from lamina_protocols.messages.routes import HolderBatch
from lamina_workers.decoder.sampler import Sampled, sample
from lamina_workers.errors import HolderFault, RankLost
from lamina_workers.model_worker.holder_traffic import slowest_seconds
from lamina_workers.model_worker.interface import BatchWork, Returned, Seat, Waiting, accepts
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.model_worker.layer_slices import Context, SlicedBatch, Waits, chosen, plain_rows, rotates, rotation
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.parallel import peer_messages
from lamina_workers.parallel.peers import Peer
from lamina_workers.ports.port import AttentionPort, Transported
from lamina_workers.ports.timing import Link, Times

logger = logging.getLogger("lamina")

_SLACK = 30.0  # seconds for a slice beyond the time of its holders

_NOTHING = Context(torch.empty(0), torch.empty(0))

R = TypeVar("R")


class _Replica:
    """A replica in another process. `holders`: the numbers of the holders that it has a channel to."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.holders: set[int] = set()
        self.asked: deque[int] = deque()  # holders of `Join` commands without an answer yet


class PipelineReplicas:
    """All replicas as the engine sees them: the `Workers` of an engine with several replicas.

    `own` is replica 0, `peers` the others. `here` are the holders in this process. `config` is the one that holders are
    built from, `patience` as for `ModelWorker`.

    A batch rotates where every holder that stores some of it answers (see `layer_slices.rotates`). Other batches run
    whole on replica 0: prompts that this process attends or that are scored, rows at a first token, and all batches
    where there is no other replica. A lost replica is left out until it is back; nothing needs it, so none is
    ever `missing`.
    """

    missing: tuple[int, ...] = ()

    def __init__(
        self,
        own: ModelWorker,
        peers: Iterable[Peer] = (),
        *,
        here: Iterable[int],
        config: HolderConfig,
        patience: float = 10.0,
        waits: Waits | None = None,
    ) -> None:
        self._worker = own
        self._local_holders = frozenset(here)
        self._config = config
        self._patience = patience
        self._replicas: dict[int, _Replica] = {}
        self._joins: dict[int, peer_messages.Join] = {}  # where each holder at an attention worker is
        self._waits = waits or Waits()
        self._suspended: dict[int, Waiting] = {}  # what each run waits for
        self._runs = 0
        self._turn = 0
        self._replica_attention = 0.0
        self.slices: dict[int, int] = {0: 0}
        """How many slices each replica has computed."""
        for peer in peers:
            self.returned(peer)

    @property
    def attention_seconds(self) -> float:
        """As `Workers` says, plus the time in which slices at other replicas waited for attention or computed it. Where
        several wait at the same time that is more than the time that has passed."""
        return self._worker.attention_seconds + self._replica_attention

    @property
    def experts_read(self) -> tuple[int, int]:
        return self._worker.experts_read

    @property
    def times(self) -> Times:
        return self._worker.times

    @property
    def replicas(self) -> int:
        """How many there are now, with the one in this process."""
        return 1 + sum(not replica.peer.closed for replica in self._replicas.values())

    # Batches.

    def announce(self, shares: Mapping[int, HolderBatch]) -> Generator[Waiting, None, tuple[int, dict[int, Announced]]]:
        return self._patiently(self._worker.announce(shares))

    def announce_now(self, shares: Mapping[int, HolderBatch]) -> tuple[int, dict[int, Announced]]:
        return self._worker.announce_now(shares)

    def execute(
        self, work: BatchWork, batch: int, shares: Mapping[int, HolderBatch], suspends: bool = True
    ) -> Generator[Waiting, None, Sampled]:
        """As `Workers.execute` says. Raises RankLost where a replica is gone that has a part in it; the next batch runs
        on the others."""
        replicas = [None] if self._worker.samples(batch) or work.scored else self._able(shares)
        if len(replicas) == 1:
            return self._patiently(self._worker.execute(work, batch, shares, suspends))
        return self._patiently(self._rotate(replicas, work, batch, shares, suspends))

    def copy(
        self, moves: Sequence[Move], shares: Mapping[int, HolderBatch], accepted: Callable[[], None] = accepts
    ) -> Generator[Waiting, None, bool]:
        return self._worker.copy(moves, shares, accepted)

    def next_epoch(self) -> None:
        self._worker.next_epoch()
        self._tell_epoch()

    def begin_after(self, epoch: int) -> None:
        self._worker.begin_after(epoch)
        self._tell_epoch()

    # Holders.

    def join(self, number: int, port: AttentionPort, credentials: Credentials | None = None) -> tuple[Seat, ...]:
        """A holder has joined. Each other replica opens a channel of its own to it; until it has, batches that
        concern this holder do without that replica."""
        self._worker.join(number, port)
        if isinstance(port, Transported):
            self._joins[number] = join = peer_messages.join(number, port.name, port.address, credentials)
            for replica in self._replicas.values():
                self._connect(replica, join)
        return ()

    def prepare(self, port: AttentionPort) -> None:
        self._worker.prepare(port)

    def leave(self, number: int) -> None:
        self._worker.leave(number)
        self._joins.pop(number, None)
        for replica in self._replicas.values():
            self._disconnect(replica, number)

    def lost(self) -> list[int]:
        return self._worker.lost()

    def links(self) -> dict[int, Link]:
        return self._worker.links()

    def address(self, number: int) -> str:
        return self._worker.address(number)

    def features(self, number: int) -> frozenset[str]:
        """Replica 0 alone announces operations, so the others' versions do not matter."""
        return self._worker.features(number)

    # Replicas.

    def returned(self, peer: Peer) -> Returned:
        """A replica is there, for the first time or again, as another process. No KV was lost with it."""
        replica = self._replicas[peer.rank] = _Replica(peer)
        self.slices.setdefault(peer.rank, 0)
        self._tell(replica, peer_messages.BeginEpoch(self._worker.epoch))
        for join in self._joins.values():
            self._connect(replica, join)
        return Returned([], [])

    def _able(self, shares: Mapping[int, HolderBatch]) -> list[_Replica | None]:
        """The replicas that compute a batch, in the order of the rotation; None is this process."""
        if not rotates(shares, self._local_holders):
            return [None]
        numbers = {number for number, share in shares.items() if share.routes}
        able: list[_Replica | None] = [None]
        for _, replica in sorted(self._replicas.items()):
            self._read_joined(replica)
            if not replica.peer.closed and numbers <= replica.holders:
                able.append(replica)
        return able

    def _rotate(
        self,
        replicas: Sequence[_Replica | None],
        work: BatchWork,
        batch: int,
        shares: Mapping[int, HolderBatch],
        suspends: bool,
    ) -> Generator[Waiting, None, Sampled]:
        order = rotation(self._turn, len(self._config.layers), len(replicas))
        self._turn += 1
        taking = [replicas[index] for index in dict.fromkeys(order)]
        started = [replica for replica in taking if replica is not None]
        local_batch: SlicedBatch | None = None
        plain = plain_rows(work.sampling)
        allowed = self._allowed(shares)
        output: Context | torch.Tensor | None = None
        try:
            command = peer_messages.start_batch(batch, work, shares, plain, suspends)
            for helper in started:  # they prepare while the first slice is computed
                helper.peer.expect(batch)
                helper.peer.tell(command, allowed)
            for number, index in enumerate(order):
                context = output if isinstance(output, Context) else None
                replica = replicas[index]
                last = number + len(replicas) >= len(order) - 1  # of its slices that end with an attention
                if replica is None:
                    local_batch = local_batch or self._worker.enter(work, batch, shares, suspends)
                    output = yield from local_batch.slice(number, context, last)
                    self.slices[0] += 1
                    continue
                peer = replica.peer
                peer.tell(peer_messages.Slice(batch, number, last, *(context or _NOTHING)), allowed)
                if not peer.ready(batch):
                    yield Waiting(peer, batch)
                answer = self._take(
                    replica, peer_messages.Sliced if number < len(order) - 1 else peer_messages.Chosen, batch, allowed
                )
                self.slices[peer.rank] += 1
                if isinstance(answer, peer_messages.Chosen):
                    started.remove(replica)  # it has nothing left of this batch
                    peer.forget(batch)
                    with torch.inference_mode():
                        return chosen(work.sampling, answer.tokens, answer.logits)
                output = Context(answer.hidden, answer.attended)
        finally:
            if local_batch is not None:
                local_batch.close()
            self._worker.forget(batch, shares)
            for helper in started:
                helper.peer.forget(batch)
                self._tell(helper, peer_messages.Drop(batch))
        if not isinstance(output, torch.Tensor):
            raise HolderFault(f"batch {batch} has come to its end without logits")
        with torch.inference_mode():
            return sample(output, work.sampling)

    def _take(
        self,
        replica: _Replica,
        kind: type[peer_messages.Sliced] | type[peer_messages.Chosen],
        batch: int,
        timeout: float,
    ) -> peer_messages.Sliced | peer_messages.Chosen:
        peer = replica.peer
        try:
            answer = peer.take(kind, batch, timeout)
        except HolderFault:
            for number in sorted(peer.lost):  # only this replica's channel is lost for certain
                self._disconnect(replica, number)
                if number in self._joins:
                    self._connect(replica, self._joins[number])
            raise
        self._replica_attention += answer.attention_seconds
        return answer

    def _allowed(self, shares: Mapping[int, HolderBatch]) -> float:
        """Seconds that a replica may take for a slice: the time of its holders, for each batch that is under way."""
        slowest = max(
            slowest_seconds(pool.config.layers[0], (route for route in share.routes if route.pool == number))
            for number, pool in enumerate(pools(self._config))
            for share in shares.values()
        )
        seconds = self._patience + slowest
        return _SLACK + seconds * (1 + len(self._suspended))

    def _patiently(self, run: Generator[Waiting, None, R]) -> Generator[Waiting, None, R]:
        """The run. Where it is resumed too early, it waits until any of all suspended runs can go on."""
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

    # Commands beside batches. A lost replica is noticed when a batch needs it.

    def _tell(self, replica: _Replica, command: peer_messages.Command) -> None:
        with contextlib.suppress(RankLost):
            replica.peer.tell(command)

    def _tell_epoch(self) -> None:
        for replica in self._replicas.values():
            replica.peer.forget()
            self._tell(replica, peer_messages.BeginEpoch(self._worker.epoch))

    def _connect(self, replica: _Replica, join: peer_messages.Join) -> None:
        if not replica.peer.closed:
            self._tell(replica, join)
            replica.asked.append(join.number)

    def _disconnect(self, replica: _Replica, number: int) -> None:
        replica.holders.discard(number)
        replica.peer.lost.discard(number)
        self._tell(replica, peer_messages.Leave(number))

    def _read_joined(self, replica: _Replica) -> None:
        """Read its answers to `Join`: which holders it has a channel to now."""
        peer = replica.peer
        try:
            while replica.asked and peer.answered():
                answer = peer.answer(peer_messages.Joined, 0.0)
                number = replica.asked.popleft()
                if isinstance(answer, peer_messages.Failed):
                    logger.warning("model worker %d refuses attention worker %d: %s", peer.rank, number, answer.reason)
                elif number in self._joins and number not in replica.asked:
                    replica.holders.add(number)
        except RankLost as error:
            logger.warning("%s", error)
