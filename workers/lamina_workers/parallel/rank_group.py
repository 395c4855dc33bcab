"""How the ranks of one model find each other, as rank 0 sees it: again and again, for after each failure they part.

Knows the other ranks' channels and `collectives`. Knows nothing of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lamina_workers.decoder.collective import Collective
from lamina_workers.errors import RankLost
from lamina_workers.parallel import collectives, peer_messages
from lamina_workers.parallel.peers import Peer

SLACK = 5.0  # seconds that a rank may take for an answer beyond what it may have to wait for others itself


class RankGroup:
    """How the ranks find each other, again and again: after each failure they form another group.

    `meeting(generation)` is where. `timeout`: seconds that a rank may wait for another's part of a sum, which is as
    long as that one may wait for its holders.
    """

    def __init__(
        self,
        mates: Sequence[Peer],
        meeting: Callable[[int], collectives.Meeting],
        device: torch.device,
        timeout: float,
    ) -> None:
        self.mates = {mate.rank: mate for mate in mates}
        self.timeout = timeout
        self._meeting = meeting
        self._device = device
        self._generation = 0
        self._current: Collective | None = None
        self._met: collectives.Meeting | None = None  # where the last one met

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(rank for rank, mate in self.mates.items() if mate.closed)

    def meet(self) -> Collective:
        """A new group of all ranks. Raises RankLost where one does not come."""
        self.leave()
        self._generation += 1
        meeting = self._met = self._meeting(self._generation)
        place = peer_messages.JoinGroup(self._generation, meeting.path, meeting.host, meeting.port, self.timeout)
        for mate in self.mates.values():
            mate.tell(place)
        cause: RankLost | None = None
        try:
            self._current = group = collectives.join(0, 1 + len(self.mates), meeting, self.timeout, self._device)
        except RankLost as error:
            cause = error
        for mate in self.mates.values():  # all are heard, or an answer would be taken for one to the next meeting
            try:
                met = mate.answer(peer_messages.JoinedGroup, self.timeout + SLACK)
            except RankLost as error:
                cause = error
                continue
            if isinstance(met, peer_messages.Failed) or met.generation != self._generation:
                cause = mate.give_up(f"it met another group than {self._generation}")
            elif met.reason:
                cause = cause or RankLost(met.reason)
        if cause is not None:
            self.leave()
            raise cause
        return group

    def leave(self) -> None:
        """Leave the group, where there is one: others that wait for this rank are woken."""
        if self._current is not None:
            self._current.close()
            self._current = None
        if self._met is not None:
            self._met.over()
            self._met = None

    def part(self, wait: float) -> None:
        """Have all leave the group and wait for commands: then whatever they had to say has been heard.

        Raises RankLost where one is gone, or does not come back within `wait` seconds.
        """
        gone: RankLost | None = None
        told = []
        for mate in self.mates.values():
            try:
                mate.tell(peer_messages.LeaveGroup())
                told.append(mate)
            except RankLost as error:
                gone = error
        for mate in told:
            try:
                mate.answer(peer_messages.LeftGroup, wait)
            except RankLost as error:
                gone = error
        if gone is not None:
            raise gone
