"""The dense side of the cut: announces a batch to the holders, runs the decoder over it, samples.

Owns the decoder, the resolver, the ports to the holders, and the numbering of epochs and batches. Knows nothing of
requests, of queues, or of why a row is in a batch: whoever plans hands it spans of tokens and the routes of their rows.
Announcing and executing are generators, suspended while they wait for a holder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lamina_protocols.messages import Announced, Announcement, Fetch, Fetched, Fresh, HolderConfig
from lamina_workers.attention_port import AttentionPort, Replies
from lamina_workers.errors import HolderFault, HolderLost
from lamina_workers.exchanges import Link, Stopwatch
from lamina_workers.model import Batch, Decoder
from lamina_workers.resolver import Resolver, Waiting
from lamina_workers.routes import HolderShare, Span
from lamina_workers.sampler import RowSampling, Sampled, sample


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens of a batch. token_ids: all spans' ids, one after the other. `sampled` are indices into them whose
    next token is wanted, `sampling` says how, one entry each. rope_lengths: one a token (see `model.Batch`)."""

    spans: tuple[Span, ...]
    token_ids: Sequence[int]
    rope_lengths: Sequence[int]
    sampled: tuple[int, ...]
    sampling: tuple[RowSampling, ...]


class Move(NamedTuple):
    """Positions [lo, hi) of part `source` at holder `origin` are to be copied to part `target` at holder `to`."""

    origin: int
    source: int
    to: int
    target: int
    lo: int
    hi: int


class ModelWorker:
    """Runs batches over one decoder. One thread; several batches may be under way, each suspended in turn.

    `patience`: seconds that a holder may take for a reply, above what its work is expected to take. `early_query`:
    have the model compute q before k and v, and send it at once. `clock`, in seconds, is what time is measured by.
    """

    def __init__(
        self,
        decoder: Decoder,
        holder: HolderConfig,
        ports: Mapping[int, AttentionPort],
        threads: int = 1,
        patience: float = 10.0,
        early_query: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._decoder = decoder
        self._clock = clock
        self._watch = Stopwatch(clock)
        self._replies = {number: Replies(port, clock) for number, port in ports.items()}
        early_query = early_query and decoder.compute_query_first()
        self._resolver = Resolver(holder, threads, early_query, patience, self._watch)
        self._layers = len(holder.layers)
        self._patience = patience
        self._epoch = 1
        self._batch = 0

    def join(self, number: int, port: AttentionPort) -> None:
        """There is one holder more."""
        self._replies[number] = Replies(port, self._clock)

    def leave(self, number: int) -> None:
        """A holder is gone, or not wanted any more: let it go."""
        self._replies.pop(number).port.close()

    def next_epoch(self) -> None:
        """Whatever is under way is given up: holders drop it, and late replies to it are not heard."""
        self._epoch += 1

    def announce(self, shares: Mapping[int, HolderShare]) -> Generator[Waiting, None, tuple[int, dict[int, Announced]]]:
        """Announce the next batch to the holders concerned. Returns its number, and every reply, refusals included.

        Raises HolderFault where a holder answers with a fault, HolderLost where it is gone.
        """
        self._batch += 1
        batch = self._batch
        answers: dict[int, Announced] = {}
        faults: dict[int, HolderFault] = {}
        told = []
        for number, share in shares.items():
            self._replies[number].expect(self._epoch, batch)
            try:
                self._send(number, Announcement(self._epoch, batch, share.first, share.operations, share.rows))
                told.append(number)
            except HolderFault as fault:
                faults[number] = fault
        for number in told:  # all are heard before one is blamed
            try:
                answers[number] = yield from self._answer(number, batch)
                self._check(answers[number], shares[number], self._replies[number].port.name)
            except HolderFault as fault:
                faults[number] = fault
        if faults:
            self._forget(batch, shares)
            worst = max(faults, key=lambda number: isinstance(faults[number], HolderLost))
            for number in faults.keys() - {worst}:  # what tells of lost keys must not go unheard
                self._replies[number].unheard = str(faults[number])
            raise faults[worst]
        if not any(share.routes for share in shares.values()) or not all(reply.accepted for reply in answers.values()):
            self._forget(batch, shares)
        return batch, answers

    def announce_now(self, shares: Mapping[int, HolderShare]) -> tuple[int, dict[int, Announced]]:
        """As `announce`, waiting for the answers."""
        announcing = self.announce(shares)
        while True:
            try:
                next(announcing)
            except StopIteration as stop:
                answered: tuple[int, dict[int, Announced]] = stop.value
                return answered

    @torch.inference_mode()
    def execute(
        self, work: Work, batch: int, shares: Mapping[int, HolderShare], suspends: bool = True
    ) -> Generator[Waiting, None, Sampled]:
        """Run the batch that every holder has just accepted. Raises HolderFault; then nothing counts as done.

        It is suspended while it waits, unless told that there is nothing else to go on with.
        """
        routes = {self._replies[number]: share.routes for number, share in shares.items()}
        try:
            forward = self._decoder.forward(self._to_device(work))
            logits = yield from self._resolver.run(forward, self._epoch, batch, work.spans, routes, suspends)
        finally:
            self._forget(batch, shares)
        return sample(logits, work.sampling)

    def copy(self, moves: Sequence[Move], shares: Mapping[int, HolderShare]) -> bool:
        """Copy KV between holders. `shares` open the parts and announce rows that store what is moved, in this order
        at each target. Blocks until all is sent. Returns whether every target had room; where one has not, nothing
        counts as done."""
        batch, answers = self.announce_now(shares)
        if not all(reply.accepted for reply in answers.values()):
            return False
        origins = {move.origin for move in moves}
        for number in origins:
            self._replies[number].expect(self._epoch, batch)
        for layer in range(self._layers):
            arrived: dict[int, list[Fetched]] = {}
            for move in moves:
                self._send(move.origin, Fetch(self._epoch, batch, layer, move.source, move.lo, move.hi))
                arrived.setdefault(move.to, []).append(
                    self._replies[move.origin].take(Fetched, batch, layer, self._patience)
                )
            for number, pieces in arrived.items():
                k, v = torch.cat([piece.k for piece in pieces]), torch.cat([piece.v for piece in pieces])
                self._send(number, Fresh(self._epoch, batch, layer, k, v))
        for number in origins:
            self._replies[number].forget(batch)
        return True

    @property
    def attention_seconds(self) -> float:
        """How long the thread has computed attention, or waited for it or for holders to accept a batch; the time in
        which a batch was suspended is not its own."""
        return self._watch.seconds

    def links(self) -> dict[int, Link]:
        """What has crossed the way to each holder so far."""
        return {number: replies.link() for number, replies in self._replies.items()}

    def lost(self) -> list[int]:
        """The holders whose ports have closed."""
        return [number for number, replies in self._replies.items() if replies.port.closed]

    def _send(self, number: int, message: Announcement | Fetch | Fresh) -> None:
        self._replies[number].port.send(message)

    def _answer(self, number: int, batch: int) -> Generator[Waiting, None, Announced]:
        replies = self._replies[number]
        if not replies.ready(batch):
            yield Waiting(replies, batch)
        self._watch.start()
        try:
            return replies.take(Announced, batch, timeout=self._patience)
        finally:
            self._watch.stop()

    @staticmethod
    def _check(answer: Announced, share: HolderShare, name: str) -> None:
        told = (len(answer.floors), len(answer.usages) or len(share.rows))
        if answer.accepted and told != (len(share.rows), len(share.rows)):
            raise HolderFault(f"{name}: floors and usages of {told} rows, {len(share.rows)} were announced")

    def _forget(self, batch: int, shares: Mapping[int, HolderShare]) -> None:
        for number in shares:
            if number in self._replies:
                self._replies[number].forget(batch)

    def _to_device(self, work: Work) -> Batch:
        device = self._decoder.device
        positions = [p for span in work.spans for p in range(span.start, span.start + span.count)]
        dynamic = self._decoder.config.rope.kind == "dynamic"
        return Batch(
            token_ids=torch.tensor(work.token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            sampled=torch.tensor(work.sampled, dtype=torch.int64, device=device),
            rope_lengths=torch.tensor(work.rope_lengths, device=device) if dynamic else None,
        )
