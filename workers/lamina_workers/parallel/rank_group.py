"""How rank 0 gathers the ranks of one model: into a new group after each failure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lamina_workers.decoder.shard import Collective
from lamina_workers.errors import RankLost
from lamina_workers.parallel import collectives, peer_messages
from lamina_workers.parallel.peers import Peer

SLACK = 5.0  # seconds for an answer beyond the time in which the rank itself may wait for others


class RankGroup:
    """The ranks beyond 0, and the groups that they form with rank 0: after each failure another one.

    `meeting(generation)` says where. `timeout`: seconds that a rank may wait for another one's part of a sum, which is
    as long as that one may wait for its holders.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        meeting: Callable[[int], collectives.Meeting],
        device: torch.device,
        timeout: float,
    ) -> None:
        self.peers = {peer.rank: peer for peer in peers}
        self.timeout = timeout
        self._meeting = meeting
        self._device = device
        self._generation = 0
        self._current: Collective | None = None
        self._met: collectives.Meeting | None = None  # where the last one met

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(rank for rank, peer in self.peers.items() if peer.closed)

    def form(self) -> Collective:
        """A new group of all ranks. Raises RankLost where one does not come."""
        self.leave()
        self._generation += 1
        meeting = self._met = self._meeting(self._generation)
        command = peer_messages.JoinGroup(self._generation, meeting.path, meeting.host, meeting.port, self.timeout)
        for peer in self.peers.values():
            peer.tell(command)
        cause: RankLost | None = None
        try:
            self._current = group = collectives.join(0, 1 + len(self.peers), meeting, self.timeout, self._device)
        except RankLost as error:
            cause = error
        for peer in self.peers.values():  # each answer is read, or it would be taken for one to the next meeting
            try:
                met = peer.answer(peer_messages.JoinedGroup, self.timeout + SLACK)
            except RankLost as error:
                cause = error
                continue
            if isinstance(met, peer_messages.Failed) or met.generation != self._generation:
                cause = peer.give_up(f"it met another group than {self._generation}")
            elif met.reason:
                cause = cause or RankLost(met.reason)
        if cause is not None:
            self.leave()
            raise cause
        return group

    def leave(self) -> None:
        """Leave the group, where there is one. It wakes the ranks that wait for this one."""
        if self._current is not None:
            self._current.close()
            self._current = None
        if self._met is not None:
            self._met.over()
            self._met = None

    def disband(self, wait: float) -> None:
        """Have all leave the group and wait for commands: then all their reports are here.

        Raises RankLost where one is gone, or does not come back within `wait` seconds.
        """
        gone: RankLost | None = None
        asked = []
        for peer in self.peers.values():
            try:
                peer.tell(peer_messages.LeaveGroup())
                asked.append(peer)
            except RankLost as error:
                gone = error
        for peer in asked:
            try:
                peer.answer(peer_messages.LeftGroup, wait)
            except RankLost as error:
                gone = error
        if gone is not None:
            raise gone
