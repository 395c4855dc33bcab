"""The ranks of one model as one worker: rank 0 in this process, the others over their channels.

Every batch runs on all ranks at the same time, each with the holders of its own heads. One batch at a time: all ranks
must come to the same sums in the same order. A failure is blamed on the rank or holder that caused it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Generator, Mapping, Sequence

import torch

from lamina_protocols.channels.channels import Credentials
from lamina_protocols.channels.versions import shared
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Announced, Surveyed
from lamina_protocols.messages.routes import HolderBatch
from lamina_workers.attention_worker.page_layout import page_counts
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.sampler import Sampled, sample
from lamina_workers.errors import HolderFault, HolderLost, RankLost, faults
from lamina_workers.model_worker.interface import BatchWork, Returned, Seat, Waiting, accepts, result
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.parallel import peer_messages
from lamina_workers.parallel.peers import SLACK, Peer, RankGroup
from lamina_workers.ports.port import AttentionPort, Transported
from lamina_workers.ports.timing import Link, Times

logger = logging.getLogger("lamina")

_WEIGHT_UNIT = 1 << 20  # bytes of KV memory that one unit of a holder's weight stands for


def seat(rank: int, capacity: int, config: HolderConfig) -> Seat:
    """A rank's holder of `capacity` bytes."""
    pages = page_counts(dataclasses.replace(config, kv_memory=capacity))
    return Seat(rank, pages, max(1, capacity // _WEIGHT_UNIT))


class TensorParallelWorkers:
    """All ranks as the engine sees them: the `Workers` of an engine with tensor parallelism.

    `own` is rank 0, `decoder` its decoder, `group` the other ranks. `pools`: of each holder in the process of a rank
    beyond 0, by its number, the rank. `heads` are the KV heads of each rank, by which seats at attention workers share
    memory; `config` is the config of rank 0's holders.

    There is one batch under way at a time, so an engine over this has one lane.
    """

    def __init__(
        self,
        own: ModelWorker,
        decoder: Decoder,
        group: RankGroup,
        *,
        pools: Mapping[int, int],
        heads: Sequence[int],
        config: HolderConfig,
    ) -> None:
        self._worker = own
        self._decoder = decoder
        self._group = group
        self._peers = group.peers
        self._heads = tuple(heads)
        self._config = config
        self._owner = dict(pools)  # the rank beyond 0 that has a holder, by the holder's number
        self._joins: dict[int, peer_messages.Join] = {}  # where each holder at an attention worker is
        self._features: dict[int, frozenset[str]] = {}  # of the holders of other ranks
        self._batch = 0
        self._group_left = False  # the ranks have left their group, and must form it again
        self._under_way: tuple[int, int, dict[int, HolderBatch]] | None = None
        """A batch that all have accepted: its number, the number at rank 0, and rank 0's shares."""
        for number, rank in pools.items():
            answer = self._peers[rank].ask(peer_messages.Join(number), peer_messages.Joined, self._wait)
            if isinstance(answer, peer_messages.Failed):
                raise RankLost(f"model worker {rank} has no pool: {answer.reason}")
            self._features[number] = shared(answer.features)

    @property
    def missing(self) -> tuple[int, ...]:
        return self._group.missing

    @property
    def experts_read(self) -> tuple[int, int]:
        return self._worker.experts_read

    @property
    def times(self) -> Times:
        return self._worker.times

    @property
    def attention_seconds(self) -> float:
        return self._worker.attention_seconds

    # Batches.

    def announce(self, shares: Mapping[int, HolderBatch]) -> Generator[Waiting, None, tuple[int, dict[int, Announced]]]:
        self._require_all()
        self._forget()
        if self._group_left:
            self._decoder.collective = self._group.form()
            self._group_left = False
        self._batch += 1
        batch, runs = self._batch, any(share.routes for share in shares.values())
        shares_by_rank: dict[int, dict[int, HolderBatch]] = {}
        for rank, peer in self._peers.items():
            concerned = self._of(rank, shares)
            if runs or concerned:
                peer.expect(batch)
                peer.tell(peer_messages.Announce(batch, runs, concerned))
                shares_by_rank[rank] = concerned
        answers: dict[int, Announced] = {}
        faults: list[HolderFault] = []
        local_number, local_shares = 0, self._of(0, shares)
        try:
            local_number, answers = yield from self._worker.announce(local_shares)
        except HolderFault as fault:
            faults.append(fault)
        for rank, concerned in shares_by_rank.items():
            try:
                answers |= self._answers(self._peers[rank], batch, concerned)
            except HolderFault as fault:
                faults.append(fault)
        if missing := self.lost():
            faults.append(HolderLost(f"attention workers {missing} are lost"))
        refused = not all(answer.accepted for answer in answers.values())
        if runs:
            self._under_way = batch, local_number, local_shares
            if faults or refused:
                self._forget()
        if faults:
            raise max(faults, key=_severity)
        return batch, {number: answers[number] for number in shares}

    def announce_now(self, shares: Mapping[int, HolderBatch]) -> tuple[int, dict[int, Announced]]:
        return result(self.announce(shares))

    def execute(
        self, work: BatchWork, batch: int, shares: Mapping[int, HolderBatch], suspends: bool = True
    ) -> Generator[Waiting, None, Sampled]:
        """As `Workers.execute` says, but it is never suspended: the other ranks would wait in the midst of a sum."""
        if self._under_way is None or self._under_way[0] != batch:
            raise HolderFault(f"batch {batch} was given up")
        (_, local_number, local_shares), self._under_way = self._under_way, None
        command = peer_messages.execute(batch, work)
        try:
            for peer in self._peers.values():
                peer.expect(batch)
                peer.tell(command)
            with faults():
                logits, scores = yield from self._worker.compute(work, local_number, local_shares, False)
        except HolderFault as fault:
            self._leave_group(fault, batch)
        finally:
            for peer in self._peers.values():
                peer.forget(batch)
        with torch.inference_mode():
            return sample(logits, work.sampling, scores)

    def copy(
        self, moves: Sequence[Move], shares: Mapping[int, HolderBatch], accepted: Callable[[], None] = accepts
    ) -> Generator[Waiting, None, bool]:
        self._require_all()
        ranks = {self._owner.get(number, 0) for move in moves for number in (move.origin, move.to)}
        if len(ranks) != 1:
            raise HolderFault(f"KV is to be copied between workers of the ranks {sorted(ranks)}; each has other heads")
        (rank,) = ranks
        if rank == 0:
            return (yield from self._worker.copy(moves, shares, accepted))
        self._batch += 1
        batch, peer = self._batch, self._peers[rank]
        peer.expect(batch)
        try:
            peer.tell(peer_messages.Copy(batch, tuple(moves), shares))
            yield Waiting(peer, batch)
            room = peer.take(peer_messages.Copied, batch, self._wait).room
            if room:
                accepted()
            return room
        except GeneratorExit:
            self._try_to_tell(peer, peer_messages.Drop(batch))
            raise
        finally:
            peer.forget(batch)

    def next_epoch(self) -> None:
        self._worker.next_epoch()
        self._under_way = None
        for peer in self._peers.values():
            peer.forget()
            self._try_to_tell(peer, peer_messages.BeginEpoch(self._worker.epoch))

    def begin_after(self, epoch: int) -> None:
        self._worker.begin_after(epoch)
        for peer in self._peers.values():
            self._try_to_tell(peer, peer_messages.BeginEpoch(self._worker.epoch))

    # Holders.

    def join(self, number: int, port: AttentionPort, credentials: Credentials | None = None) -> tuple[Seat, ...]:
        self._require_all()
        if not isinstance(port, Transported):
            raise HolderLost(f"{port.name} is no attention worker that other ranks could reach")
        joins = [
            peer_messages.join(
                number + rank, port.name, port.address, credentials, rank, self._heads[rank], sum(self._heads)
            )
            for rank in self._peers
        ]
        seats, resumed, failed = list[Seat](), list[bool](), ""
        for join in joins:
            self._peers[join.seat].tell(join)
        for join in joins:  # all answers are read before one is blamed
            answer = self._peers[join.seat].answer(peer_messages.Joined, self._wait)
            if isinstance(answer, peer_messages.Failed):
                failed = failed or f"model worker {join.seat} cannot use attention worker {join.name}: {answer.reason}"
            else:
                seats.append(seat(join.seat, answer.capacity, self._config))
                resumed.append(answer.resumed)
                self._features[join.number] = shared(answer.features)
        try:
            if any(resumed) and not failed:
                seats = [
                    seat_at_worker._replace(kept=self._survey(seat_at_worker.rank, number + seat_at_worker.rank))
                    for seat_at_worker in seats
                ]
        except RankLost:
            raise
        except HolderFault as fault:
            failed = str(fault)
        if failed:
            for join in joins:
                self._try_to_tell(self._peers[join.seat], peer_messages.Leave(join.number))
            port.close()
            raise HolderLost(failed)
        self._worker.join(number, port)
        for join in joins:
            self._owner[join.number], self._joins[join.number] = join.seat, join
        return tuple(seats)

    def prepare(self, port: AttentionPort) -> None:
        self._worker.prepare(port)

    def leave(self, number: int) -> None:
        rank = self._owner.pop(number, 0)
        self._joins.pop(number, None)
        self._features.pop(number, None)
        if rank == 0:
            self._worker.leave(number)
            return
        self._peers[rank].lost.discard(number)
        self._try_to_tell(self._peers[rank], peer_messages.Leave(number))

    def lost(self) -> list[int]:
        lost = [number for peer in self._peers.values() for number in sorted(peer.lost) if number in self._owner]
        return self._worker.lost() + lost

    def links(self) -> dict[int, Link]:
        return self._worker.links()

    def address(self, number: int) -> str:
        if number not in self._owner:
            return self._worker.address(number)
        join = self._joins.get(number)
        return join.address if join is not None else f"rank {self._owner[number]}"

    def features(self, number: int) -> frozenset[str]:
        return self._features[number] if number in self._owner else self._worker.features(number)

    def _survey(self, rank: int, number: int) -> Surveyed:
        """The parts that a holder of another rank keeps; nothing may be under way. Earlier epochs are over there.
        Raises HolderFault."""
        answer = self._peers[rank].ask(peer_messages.SurveySeat(number), peer_messages.SeatSurveyed, self._wait)
        if isinstance(answer, peer_messages.Failed):
            raise HolderFault(f"model worker {rank}: {answer.reason}")
        return answer.held

    # Ranks.

    def returned(self, peer: Peer) -> Returned:
        """A rank that was missing is there again, as another process with the same model. It takes up its seats at
        attention workers.

        Raises RankLost where it is lost already.
        """
        rank = peer.rank
        self._peers[rank] = peer
        self._group_left = True
        peer.tell(peer_messages.BeginEpoch(self._worker.epoch))
        back = Returned([], [])
        for number in [number for number, owner in self._owner.items() if owner == rank]:
            join = self._joins.get(number)
            answer = peer.ask(join or peer_messages.Join(number), peer_messages.Joined, self._wait)
            if isinstance(answer, peer_messages.Joined):
                self._features[number] = shared(answer.features)
            if join is None and isinstance(answer, peer_messages.Joined):
                back.pools.append(number)
            elif isinstance(answer, peer_messages.Failed) or not answer.resumed:
                why = answer.reason if isinstance(answer, peer_messages.Failed) else "it has let go of the KV"
                name = "its own pool" if join is None else join.name
                logger.warning("model worker %d cannot take up %s: %s", rank, name, why)
                back.gone.append(number)
            else:
                try:
                    self._survey(rank, number)  # so that the seat refuses what the rank's previous process still sends
                except RankLost:
                    raise
                except HolderFault as fault:
                    logger.warning("model worker %d cannot say what attention worker %d keeps: %s", rank, number, fault)
                    back.gone.append(number)
        return back

    def _leave_group(self, fault: HolderFault, batch: int) -> None:
        """A batch failed at rank 0, perhaps because another rank has left the group: have all leave it, read their
        reports, and raise the fault that is to blame."""
        self._group.leave()  # it wakes the ranks that wait for rank 0
        self._group_left = True
        self._group.disband(self._wait)
        if not isinstance(fault, RankLost):
            raise fault
        for peer in self._peers.values():
            for report in peer.faults(batch):
                if not report.alone:
                    raise (HolderLost if report.lost else HolderFault)(f"model worker {peer.rank}: {report.reason}")
        raise HolderFault(f"the ranks lost each other: {fault}")

    def _answers(self, peer: Peer, batch: int, shares: Mapping[int, HolderBatch]) -> Mapping[int, Announced]:
        try:
            answers = peer.take(peer_messages.Answers, batch, self._wait).answers
        finally:
            peer.forget(batch)
        if answers.keys() != shares.keys():
            raise peer.give_up(f"it answered for the attention workers {sorted(answers)}, asked were {sorted(shares)}")
        return answers

    def _forget(self) -> None:
        """The batch that was announced last will not be executed."""
        if self._under_way is not None:
            (batch, local_number, local_shares), self._under_way = self._under_way, None
            self._worker.forget(local_number, local_shares)
            for peer in self._peers.values():
                peer.tell(peer_messages.Drop(batch))

    def _of(self, rank: int, shares: Mapping[int, HolderBatch]) -> dict[int, HolderBatch]:
        return {number: share for number, share in shares.items() if self._owner.get(number, 0) == rank}

    def _require_all(self) -> None:
        if missing := self.missing:
            raise RankLost(f"model worker {', '.join(map(str, missing))} is not there")

    @property
    def _wait(self) -> float:
        """Seconds that a rank may take for an answer."""
        return self._group.timeout + SLACK

    @staticmethod
    def _try_to_tell(peer: Peer, command: peer_messages.Command) -> None:
        with contextlib.suppress(RankLost):  # it is missing, which the next batch finds
            peer.tell(command)


def _severity(fault: HolderFault) -> int:
    """What is lost besides a batch: 0 nothing for certain, 1 a holder, 2 a rank, without which no batch can run."""
    return 2 if isinstance(fault, RankLost) else int(isinstance(fault, HolderLost))
