"""Drafts from the head for a token more (MTP) that some models have: a draft model of one layer which reads, with each
token of a sequence, the hidden state that the model has computed before it.

The engine gives it those of each batch. What a sequence has of them may begin behind its first token: prefixes that
were cached are not computed, and of what was not asked for the last `CHUNK` are kept. Then it reads from there on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lamina.engine.draft_model import CHUNK, DraftModel, DraftModelProposer, Piece
from lamina.kv.request import PlannedRow, ScheduledSequence
from lamina_workers.decoder.mtp import MtpDecoder


@dataclass(slots=True)
class _States:
    """Hidden states that are not read yet, of the tokens from `first` on. `begin`: the token that what was read began
    with. `own`: the head's own hidden state, behind what it has read last, `[1, hidden]`."""

    begin: int
    first: int
    parts: deque[torch.Tensor] = field(default_factory=deque)
    own: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def stop(self) -> int:
        return self.first + sum(map(len, self.parts))

    def drop(self, count: int) -> None:
        self.first += count
        while count:
            part = self.parts.popleft()
            if count < len(part):
                self.parts.appendleft(part[count:])
            count -= min(count, len(part))


class MtpProposer(DraftModelProposer):
    """`Proposer` by the head `decoder`, which is that of the draft model's worker."""

    def __init__(self, model: DraftModel, decoder: MtpDecoder) -> None:
        super().__init__(model)
        self._decoder = decoder
        self._states: dict[ScheduledSequence, _States] = {}

    def computed(self, rows: Sequence[PlannedRow], hidden: torch.Tensor) -> None:
        """A batch of these rows is recorded, with the hidden states of all its tokens."""
        end = 0
        for row in rows:
            sequence, begin, end = row.sequence, end, end + row.count
            stop = min(row.start + row.count, sequence.computed)  # rejected drafts lie behind that
            if sequence.finish_reason is not None or stop <= row.start:
                continue
            states = self._states.get(sequence)
            if states is None or states.stop < row.start:
                self.ended(sequence)
                states = self._states[sequence] = _States(row.start, row.start)
            if states.stop >= stop:
                continue
            states.parts.append(hidden[begin + states.stop - row.start : begin + stop - row.start])
            if (more := states.stop - states.first - CHUNK) > 0:
                super().ended(sequence)
                states.drop(more)
            states.parts[-1] = states.parts[-1].clone()  # not all of the batch

    def ended(self, sequence: ScheduledSequence) -> None:
        super().ended(sequence)
        self._states.pop(sequence, None)

    def _piece(self, sequence: ScheduledSequence) -> list[int]:
        states = self._states.get(sequence)
        if states is None or states.stop != len(sequence.tokens) - 1:
            return []
        if (read := self._read.get(sequence)) is None:
            read, states.begin = self._open(sequence), states.first
        read.call = self._call
        read.same = states.first - states.begin
        del read.fed[read.same :]
        return sequence.tokens[states.first + 1 :]

    def _given(self, pieces: Sequence[Piece]) -> list[torch.Tensor] | None:
        rows = []
        for want, ids, _ in pieces:
            states = self._states[want.sequence]
            rows.append(torch.cat(tuple(states.parts))[: len(ids)] if states.parts else states.own)
        self._decoder.given = torch.cat(rows)
        return []

    def _taken(self, pieces: Sequence[Piece], hidden: list[torch.Tensor] | None) -> None:
        end = 0
        for want, ids, _ in pieces:
            states, end = self._states[want.sequence], end + len(ids)
            if states.parts:
                states.drop(len(ids))
            if hidden:
                states.own = hidden[-1][end - 1 : end]
