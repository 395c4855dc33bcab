"""Drafts from a smaller model of the same vocabulary, which has KV of its own in this process.

A draft is drawn from the small model's logits with the random number that the large model's token of that position is
drawn with. So the two are the same wherever the distributions put that number into the same token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lamina.engine.drafting import Wanted
from lamina.kv.request import ScheduledSequence
from lamina.messages.engine_request import EngineRequest
from lamina_protocols.messages.messages import Close, Open, Operation, Row
from lamina_protocols.messages.routes import HolderBatch, Route, Span
from lamina_workers.decoder.sampler import RowSampling
from lamina_workers.errors import HolderFault, faults
from lamina_workers.model_worker.interface import BatchWork, result
from lamina_workers.model_worker.model_worker import ModelWorker

logger = logging.getLogger("lamina")

LOCAL = 0  # the number of the draft model's one holder
CHUNK = 512  # tokens that are read in a call, besides those that were sampled since the last one
_TRIES = 3  # failures in a row, after which there are no drafts any more
Piece = tuple[Wanted, list[int], bool]  # tokens of a sequence that are read in a call, and whether these are all


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A draft model that is loaded. `worker` has one holder, whose pools have so many KV `heads` each. It takes
    `context` tokens at most. Both models know the token ids below `vocabulary`; no draft follows or has others."""

    worker: ModelWorker
    heads: tuple[int, ...]
    context: int
    vocabulary: int


@dataclass(slots=True)
class Read:
    """What the draft model has read of a sequence. `fed` has KV; it begins with the first `same` tokens of the
    sequence, then come drafts, which may not have become tokens. `call` is the number of the last call with it."""

    handle: int
    fed: list[int] = field(default_factory=list)
    same: int = 0
    call: int = 0

    def cut(self, tokens: Sequence[int]) -> None:
        """Forget what the sequence has not, and its last token, which is fed again: its logits are wanted."""
        if self.same > len(tokens):
            self.same = 0
        end = min(len(self.fed), len(tokens) - 1)
        while self.same < end and self.fed[self.same] == tokens[self.same]:
            self.same += 1
        self.same = min(self.same, end)
        del self.fed[self.same :]


class DraftModelProposer:
    """`Proposer` by a draft model. A sequence whose text it has not read has no drafts until it has: it reads `CHUNK`
    tokens a call. Where its memory is full, what it has not used for longest is forgotten."""

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self._read: dict[ScheduledSequence, Read] = {}
        self._operations: list[Operation] = []  # for the holder, not accepted yet
        self._accepted = 0
        self._handle = 0
        self._call = 0
        self._failures = 0

    def propose(self, wanted: Sequence[Wanted]) -> list[tuple[int, ...]]:
        self._call += 1
        drafts: dict[ScheduledSequence, list[int]] = {want.sequence: [] for want in wanted}
        if self._failures < _TRIES:
            try:
                with faults():
                    self._draft(wanted, drafts)
                self._failures = 0
            except HolderFault as fault:
                self._failed(fault)
                return [()] * len(wanted)
        return [tuple(drafts[want.sequence]) for want in wanted]

    def ended(self, sequence: ScheduledSequence) -> None:
        if (read := self._read.pop(sequence, None)) is not None:
            self._operations += [Close(self._part(read, pool)) for pool in range(len(self._model.heads))]

    def _draft(self, wanted: Sequence[Wanted], drafts: Mapping[ScheduledSequence, list[int]]) -> None:
        """Read what is new, then draft one token of each sequence at a time."""
        unread = self._unread([want for want in wanted if len(want.sequence.tokens) < self._model.context])
        while unread:
            drawn = self._run(unread, drafts)
            going = []
            for want, token in drawn:
                if token is None or token >= self._model.vocabulary:
                    continue
                so_far = drafts[want.sequence]
                so_far.append(token)
                if len(so_far) < min(want.depth, self._model.context - len(want.sequence.tokens)):
                    going.append(want)
            unread = [(want, drafts[want.sequence][-1:], True) for want in going]

    def _unread(self, wanted: Sequence[Wanted]) -> list[Piece]:
        """For each sequence the tokens that are to be read now, and whether these are all: short ones first, of which
        several fit into a chunk."""
        budget = CHUNK
        texts = [(want, self._piece(want.sequence)) for want in wanted]
        pieces = [(want, piece) for want, piece in texts if piece and max(piece) < self._model.vocabulary]
        chosen = []
        for want, piece in sorted(pieces, key=lambda piece: len(piece[1])):
            count = len(piece) if len(piece) <= want.depth + 2 else min(len(piece), budget)
            budget -= count if len(piece) > want.depth + 2 else 0
            if count:
                chosen.append((want, piece[:count], count == len(piece)))
        return chosen

    def _piece(self, sequence: ScheduledSequence) -> list[int]:
        """The tokens of a sequence that are to be read."""
        read = self._read.get(sequence) or self._open(sequence)
        read.call = self._call
        read.cut(sequence.tokens)
        return sequence.tokens[read.same :]

    def _open(self, sequence: ScheduledSequence) -> Read:
        self._handle += 1
        read = self._read[sequence] = Read(self._handle)
        for pool, heads in enumerate(self._model.heads):
            self._operations.append(Open(self._part(read, pool), pool, tuple(range(heads)), 0, self._model.context))
        return read

    def _part(self, read: Read, pool: int) -> int:
        return read.handle * len(self._model.heads) + pool

    def _run(
        self, pieces: Sequence[Piece], drafts: Mapping[ScheduledSequence, list[int]]
    ) -> list[tuple[Wanted, int | None]]:
        """Read these tokens of each sequence, and draw a token where they are all. Fewer are drawn where the memory is
        full."""
        worker = self._model.worker
        while True:
            routes = tuple(self._routes(pieces))
            share = {LOCAL: HolderBatch(self._accepted, tuple(self._operations), routes)}
            batch, answers = worker.announce_now(share)
            if answers[LOCAL].accepted:
                break
            if not self._make_room():
                pieces = pieces[: len(pieces) // 2]
                if not pieces:
                    return []
        self._accepted += len(self._operations)
        self._operations.clear()
        reads = [self._read[want.sequence] for want, _, _ in pieces]
        spans = tuple(Span(len(read.fed), len(ids)) for read, (_, ids, _) in zip(reads, pieces, strict=True))
        token_ids = [token for _, ids, _ in pieces for token in ids]
        ends, end = [], 0
        for _, ids, _ in pieces:
            end += len(ids)
            ends.append(end - 1)
        drawing = [(want, position) for (want, _, complete), position in zip(pieces, ends, strict=True) if complete]
        work = BatchWork(
            spans,
            tuple(len(want.sequence.request.prompt) for want, _, _ in pieces),
            token_ids,
            tuple(position for _, position in drawing),
            tuple(sampling(want.request, want.sequence, len(drafts[want.sequence])) for want, _ in drawing),
            hidden=self._given(pieces),
        )
        sampled = result(worker.execute(work, batch, share, suspends=False))
        for read, (_, ids, _) in zip(reads, pieces, strict=True):
            read.fed += ids
        self._taken(pieces, work.hidden)
        return [(want, token) for (want, _), token in zip(drawing, sampled.tokens, strict=True)]

    def _given(self, pieces: Sequence[Piece]) -> list[torch.Tensor] | None:
        """What gets hidden states: nothing."""

    def _taken(self, pieces: Sequence[Piece], hidden: list[torch.Tensor] | None) -> None:
        """These pieces are read."""

    def _routes(self, pieces: Sequence[Piece]) -> list[Route]:
        routes = []
        for pool, heads in enumerate(self._model.heads):
            for source, (want, ids, _) in enumerate(pieces):
                read = self._read[want.sequence]
                start, end = len(read.fed), len(read.fed) + len(ids)
                row = Row(self._part(read, pool), start, len(ids), (0, end), True, chooses=len(ids) == 1)
                routes.append(Route(source, tuple(range(heads)), row, (start, end), pool))
        return routes

    def _make_room(self) -> bool:
        """Forget the sequence that was used longest ago, before this call; whether there was one."""
        oldest = min(self._read, key=lambda sequence: self._read[sequence].call, default=None)
        if oldest is None or self._read[oldest].call == self._call:
            return False
        self.ended(oldest)
        return True

    def _failed(self, fault: HolderFault) -> None:
        """Forget everything that was read: what the holder has of the batch is not known."""
        self._failures += 1
        more = "it is given up" if self._failures == _TRIES else "what it has read is read again"
        logger.warning("the draft model failed, and %s: %s", more, fault)
        for sequence in list(self._read):
            self.ended(sequence)
        self._model.worker.next_epoch()


def sampling(request: EngineRequest, sequence: ScheduledSequence, ahead: int) -> RowSampling:
    """How the draft `ahead` positions behind the sequence's next token is drawn: as the token is, without what depends
    on the tokens before, such as penalties and schemas."""
    params = request.params
    return RowSampling(
        temperature=params.temperature or 0.0,
        top_p=params.top_p or 1.0,
        top_k=max(0, params.top_k or 0),
        min_p=params.min_p or 0.0,
        logit_bias=params.logit_bias,
        seed=request.seed,
        sample_index=sequence.sample,
        position=len(sequence.tokens) - len(request.request.prompt) + ahead,
    )
