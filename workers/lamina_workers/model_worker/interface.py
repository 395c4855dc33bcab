"""`Workers`, the interface between an engine and its model workers, and the values that cross it.

What takes time there is a run: a generator that is suspended while it is `Waiting` for a reply, so that one thread can
drive several.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch

from lamina_protocols.channels.channels import Channel, Credentials
from lamina_protocols.messages.messages import Announced, Surveyed
from lamina_protocols.messages.routes import HolderBatch, Span
from lamina_workers.decoder.logprobs import PromptTokens
from lamina_workers.decoder.sampler import RowSampling, Sampled
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.ports.port import AttentionPort
from lamina_workers.ports.timing import Link, Times

R = TypeVar("R")


class Replying(Protocol):
    """A source of replies to batches: a port's `Replies`, a process that computes for this one, or a feeder of runs."""

    @property
    def channel(self) -> Channel | None:
        """What replies come over; None where they come from this process."""

    def ready(self, batch: int) -> bool:
        """Whether a reply to that batch is there, or will never come."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a run is suspended: a reply of `replies` to `batch` is not there yet. A run that is resumed earlier waits."""

    replies: Replying
    batch: int

    def over(self) -> bool:
        """Whether the run is to be resumed: it would go on at once, or names another holder to wait for."""
        return self.replies.ready(self.batch)


def result(run: Generator[Waiting, None, R]) -> R:
    """What a run returns, each of its waits waited out."""
    try:
        while True:
            next(run)
    except StopIteration as stop:
        returned: R = stop.value
        return returned


Suspended = Generator[Waiting, None, torch.Tensor]


@dataclass(frozen=True, slots=True)
class BatchWork:
    """The tokens of a batch. `prompts`: the length of each span's prompt. token_ids: all spans' ids, one after the
    other. `sampled` are indices into them whose next token is wanted, `sampling` says how, one entry each. `scored` are
    tokens of prompts that are scored. `hidden`: see `Batch`; a rank of one alone fills it."""

    spans: tuple[Span, ...]
    prompts: tuple[int, ...]
    token_ids: Sequence[int]
    sampled: tuple[int, ...]
    sampling: tuple[RowSampling, ...]
    scored: tuple[PromptTokens, ...] = ()
    hidden: list[torch.Tensor] | None = None


class Seat(NamedTuple):
    """A holder of one rank at an attention worker: the pages of each of its pools, its weight among the holders of the
    rank, and the parts that it keeps from the previous engine."""

    rank: int
    pages: tuple[int, ...]
    weight: int
    kept: Surveyed | None = None


class Returned(NamedTuple):
    """The holders of a model worker that is there again, by number: its own `pools`, which are empty now, and the seats
    at attention workers that are `gone` with their KV. Its other seats have kept theirs."""

    pools: list[int]
    gone: list[int]


class ReturnedPeer(Protocol):
    """A model worker that is there again. Each implementation of `Workers` has its own kind."""

    @property
    def rank(self) -> int:
        """Its number, 1 and up."""


def accepts() -> None:
    """The `accepted` of a copy that nobody counts."""


P = TypeVar("P", bound=ReturnedPeer, contravariant=True)


class Workers(Protocol[P]):
    """All model workers of an engine, as it sees them: one `ModelWorker`, or several processes that act as one.

    For one thread. Holders go by number, whatever worker they belong to. Besides the errors below, every method raises
    RankLost where a model worker is gone: then it is among the `missing`, nothing of the batches under way counts, and
    until it is back nothing can be announced.
    """

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks of model workers that are gone, and not back yet."""

    @property
    def times(self) -> Times:
        """What attention took in the batch that was executed last."""

    @property
    def attention_seconds(self) -> float:
        """How long this thread has computed attention, or waited for it or for holders to accept a batch."""

    @property
    def experts_read(self) -> tuple[int, int]:
        """In this process: bytes of experts, each counted once a batch that chose it, and pairs of a token and one."""

    def begin_after(self, epoch: int) -> None:
        """The holders know epochs up to this one from the previous engine."""

    def address(self, number: int) -> str:
        """Of a holder's process; "" for this one."""

    def features(self, number: int) -> frozenset[str]:
        """Those of `versions` that a holder has, and every process on the way to it."""

    def announce(self, shares: Mapping[int, HolderBatch]) -> Generator[Waiting, None, tuple[int, dict[int, Announced]]]:
        """Announce the next batch to the holders concerned. Returns its number, and every reply, refusals included.

        Raises HolderFault where a holder answers with a fault, HolderLost where it is gone.
        """

    def announce_now(self, shares: Mapping[int, HolderBatch]) -> tuple[int, dict[int, Announced]]:
        """As `announce`, waiting for the answers."""

    def execute(
        self, work: BatchWork, batch: int, shares: Mapping[int, HolderBatch], suspends: bool = True
    ) -> Generator[Waiting, None, Sampled]:
        """Run the batch that every holder has just accepted. Raises HolderFault; then nothing counts as done."""

    def copy(
        self, moves: Sequence[Move], shares: Mapping[int, HolderBatch], accepted: Callable[[], None] = accepts
    ) -> Generator[Waiting, None, bool]:
        """Copy KV between holders while batches go on, see `ModelWorker.copy`. Whether every target had room; then
        `accepted` is called, as soon as that is known."""

    def join(self, number: int, port: AttentionPort, credentials: Credentials | None = None) -> tuple[Seat, ...]:
        """There is one holder more at rank 0, and where there are further ranks one of each, which connect to the same
        attention worker with these credentials: their numbers follow `number`, in the order that is returned.

        Raises HolderLost where one of them cannot; then none has joined.
        """

    def prepare(self, port: AttentionPort) -> None:
        """A holder is about to join at rank 0: what takes time is done now. Any thread may call."""

    def leave(self, number: int) -> None:
        """A holder is gone, or not wanted any more: let it go."""

    def lost(self) -> list[int]:
        """The holders that are found to be gone, and have not left."""

    def links(self) -> dict[int, Link]:
        """The traffic with each holder of rank 0 so far."""

    def next_epoch(self) -> None:
        """Whatever is under way is given up: holders drop it, and late replies to it are not heard."""

    def returned(self, peer: P) -> Returned:
        """A model worker that was missing is there again."""
