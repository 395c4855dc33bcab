"""The register of an engine's holders: they join, are let go, and are dropped when they are lost.

Each change goes to the model worker and the control plane first, then to the listeners in their order. Everything is
called between two batches, on the engine's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lamina.kv.placement import Holder
from lamina.scheduling.control_plane import ControlPlane
from lamina_protocols.channels.channels import Credentials
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.interface import Seat, Workers
from lamina_workers.parallel.peers import Peer
from lamina_workers.ports.port import AttentionPort

logger = logging.getLogger("lamina")


@dataclass(frozen=True, slots=True)
class HolderChange:
    """Attention workers have joined, are lost, or are drained and gone. `rebuilt`: tokens of lost KV that are computed
    again for parts of sequences."""

    kind: Literal["joined", "lost", "drained"]
    names: tuple[str, ...]
    rebuilt: int = 0


class HolderListener(Protocol):
    """A part of the engine that is notified when the holders change."""

    def holders_changed(self, change: HolderChange) -> None:
        """Called after the register, the model worker and the control plane have the change."""


def seated(seat: Seat, page_layout: str) -> Holder:
    """A rank's seat at an attention worker with this page layout, as placement sees it."""
    holder = Holder(seat.pages, seat.weight, rank=seat.rank, page_layout=page_layout)
    if seat.kept is not None:
        holder.keeps(seat.kept)
    return holder


class Holders:
    """The holders by number. `names` are those of attention workers; holders in model workers' processes have none.

    `listeners` are set once, before the engine runs.
    """

    def __init__(self, worker: Workers[Peer], control: ControlPlane, names: Mapping[int, str]) -> None:
        self.names = dict(names)
        self.listeners: tuple[HolderListener, ...] = ()
        self._worker = worker
        self._control = control
        self._last = max(names, default=0)

    @property
    def empty(self) -> bool:
        """Whether no holder is left to keep KV."""
        return not self._control.placement.capacity

    @property
    def halted(self) -> bool:
        """Whether nothing can be computed before a holder joins or a model worker comes back."""
        return self.empty or bool(self.missing)

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks of model workers that are gone, and not back yet."""
        return self._worker.missing

    def numbers(self, name: str) -> list[int]:
        """The holders of that name, one a rank; empty for an unknown name."""
        return [number for number, known in self.names.items() if known == name]

    def companions(self, numbers: Sequence[int]) -> list[int]:
        """These holders, and all others at the same attention workers."""
        names = {self.names[number] for number in numbers}
        return [number for number, name in self.names.items() if name in names]

    # Changes.

    def join(self, port: AttentionPort, holder: Holder, credentials: Credentials | None = None) -> None:
        """One attention worker more, with a holder for each rank; new sequences use it. `credentials` are for the other
        ranks, which connect to it too. Raises HolderFault where one of them cannot."""
        first = self._last + 1
        seats = self._worker.join(first, port, credentials)
        holders = [holder, *(seated(seat, port.page_layout) for seat in seats)]
        for number, joining in enumerate(holders, first):
            self.names[number] = joining.name = port.name
            joining.features = self._worker.features(number)
            self._control.joined(number, joining)
        self._last += len(holders)
        grown = self._control.grow(range(first, first + len(holders)))
        pages = " and ".join(map(str, map(sum, zip(*(joining.pages for joining in holders), strict=True))))
        logger.info("attention worker %s joined with %s KV pages; %d sequences grow there", port.name, pages, grown)
        self._changed(HolderChange("joined", (port.name,)))

    def lose(self, numbers: Sequence[int]) -> None:
        """These holders are gone. Their KV is opened elsewhere and computed again. Nothing may be in flight."""
        for number in numbers:
            self._worker.leave(number)
        rebuilt, anew, spared = self._control.lost(numbers)
        names = self._drop(numbers)
        for name in names:
            logger.warning("attention worker %s is lost", name)
        left = ", ".join(dict.fromkeys(self.names.values())) or ("any that joins" if self.empty else "this machine")
        had = f"; spares had {spared}" if spared else ""
        logger.warning("on %s: %d tokens of lost KV are computed again, %d from the start%s", left, rebuilt, anew, had)
        self._changed(HolderChange("lost", names, rebuilt))

    def let_go(self, numbers: Sequence[int]) -> None:
        """These holders are empty, and leave."""
        for number in numbers:
            self._worker.leave(number)
            self._control.left(number)
        self._changed(HolderChange("drained", self._drop(numbers)))

    def emptied(self, numbers: Sequence[int]) -> None:
        """These pools have lost their KV: they are in the process of a model worker that was started again, perhaps of
        another version."""
        for number, holder in self._control.placement.holders.items():
            holder.features = self._worker.features(number)
        if again := self._control.emptied(numbers):
            logger.warning("%d tokens of KV that a model worker kept itself are computed again", again)

    def _drop(self, numbers: Iterable[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.names.pop(number) for number in numbers))

    def _changed(self, change: HolderChange) -> None:
        for listener in self.listeners:
            listener.holders_changed(change)

    def ask_for_room(self, numbers: Iterable[int]) -> None:
        """Have holders apply the operations that wait; these say at least how many pages they have left."""
        placement = self._control.placement
        batches = placement.outgoing() | {number: placement.holders[number].outgoing() for number in numbers}
        try:
            _, answers = self._worker.announce_now(batches)
        except HolderFault as fault:  # the first batch meets it again, and handles it
            logger.warning("%s", fault)
            return
        self._control.answered(batches, answers)
