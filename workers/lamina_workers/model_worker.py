"""The dense side of the cut: announces a batch to the holders, runs the decoder over it, samples.

Owns the decoder, the resolver and the numbering of batches. Knows nothing of requests, of queues, or of why a row is
in a batch: whoever plans hands it spans of tokens and the routes of their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lamina_protocols.messages import Announced, Announcement, HolderConfig, Operation, Row
from lamina_workers.attention_port import AttentionPort, receive
from lamina_workers.errors import HolderFault
from lamina_workers.model import Batch, Decoder
from lamina_workers.resolver import Resolver, Route, Span
from lamina_workers.sampler import RowSampling, Sampled, sample


@dataclass(frozen=True, slots=True)
class HolderShare:
    """What one batch asks of one holder: operations, the first of which has number `first`, and routed rows."""

    first: int
    operations: tuple[Operation, ...]
    routes: tuple[Route, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows as the announcement carries them."""
        return tuple(route.row for route in self.routes)


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens of a batch. token_ids: all spans' ids, one after the other. `sampled` are indices into them whose
    next token is wanted, `sampling` says how, one entry each. rope_lengths: one a token (see `model.Batch`)."""

    spans: tuple[Span, ...]
    token_ids: Sequence[int]
    rope_lengths: Sequence[int]
    sampled: tuple[int, ...]
    sampling: tuple[RowSampling, ...]


class ModelWorker:
    """Runs batches over one decoder. One thread, one batch at a time."""

    def __init__(
        self, decoder: Decoder, holder: HolderConfig, ports: Sequence[AttentionPort], threads: int = 1
    ) -> None:
        self._decoder = decoder
        self._ports = tuple(ports)
        self._resolver = Resolver(holder, self._ports, threads)
        self._epoch = 1
        self._batch = 0

    def announce(self, shares: Sequence[HolderShare]) -> list[Announced]:
        """Announce the next batch, one share a holder; every holder's reply, refusals included.

        Raises HolderFault where a holder answers with a fault.
        """
        self._batch += 1
        for port, share in zip(self._ports, shares, strict=True):
            port.send(Announcement(self._epoch, self._batch, share.first, share.operations, share.rows))
        replies, faults = [], []
        for port in self._ports:  # all are heard before one is blamed
            try:
                replies.append(receive(port, Announced, self._epoch, self._batch))
            except HolderFault as fault:
                faults.append(fault)
        if faults:
            raise faults[0]
        return replies

    @torch.inference_mode()
    def execute(self, work: Work, shares: Sequence[HolderShare]) -> Sampled:
        """Run the batch that every holder has just accepted. Raises HolderFault; then nothing counts as done."""
        logits = self._resolver.run(
            self._decoder.forward(self._to_device(work)),
            self._epoch,
            self._batch,
            work.spans,
            [share.routes for share in shares],
        )
        return sample(logits, work.sampling)

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
