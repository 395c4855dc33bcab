"""Scores of prompts' tokens: log probabilities of the tokens that follow, or sums of hidden states.

A prompt has many more tokens than are sampled, so their logits never stand whole: they are made a block of rows at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lamina_workers.decoder.logprobs import PromptScores, PromptTokens, RowLogprobs
from lamina_workers.decoder.sampler import report

_BLOCK = 1 << 24  # logits at a time, 64 MiB of float32

Logits = Callable[[torch.Tensor], torch.Tensor | None]
"""Float32 logits, `[n, vocab]`, of some of a scorer's `rows`, given by their int64 indices `[n]`; None at ranks beyond
0."""


class PromptScorer:
    """Scores `parts` of one batch's prompts, over a vocabulary of `vocab_size`.

    rows: int64 `[R]` on `device`, the indices of all their tokens in the batch. A forward pass calls `score` once; from
    then on `scores` has the answers, in order, at ranks beyond 0 without log probabilities.
    """

    def __init__(self, parts: Sequence[PromptTokens], vocab_size: int, device: torch.device) -> None:
        self._parts = parts
        self._block = max(1, _BLOCK // vocab_size)
        places = [place for part in parts for place in range(part.first, part.first + part.count)]
        self.rows = torch.tensor(places, dtype=torch.int64, device=device)
        self.scores: list[PromptScores] = []

    def score(self, logits: Logits, hidden: torch.Tensor | None) -> None:
        """hidden: `[R, hidden_size]` of the rows, what leaves the last norm; None where only log probabilities are
        asked. All ranks make the same calls of `logits`."""
        reports, ranks = self._reports(logits)
        first = scored = 0
        for part in self._parts:
            end, last = first + part.count, scored + len(part.targets)
            if part.targets or hidden is None:
                self.scores.append(PromptScores(part.start, tuple(reports[scored:last]), tuple(ranks[scored:last])))
            else:
                total = hidden[first:end].float().sum(0)
                self.scores.append(PromptScores(part.start, hidden=tuple(total.tolist())))
            first, scored = end, last

    def _reports(self, logits: Logits) -> tuple[list[RowLogprobs], list[int]]:
        """The report and the rank of each target."""
        numbers, targets, tops = list[int](), list[int](), list[int]()
        place = 0
        for part in self._parts:
            numbers += range(place, place + len(part.targets))
            targets += part.targets
            tops += [part.top] * len(part.targets)
            place += part.count
        reports, ranks = list[RowLogprobs](), list[int]()
        for first in range(0, len(numbers), self._block):
            end = first + self._block
            block = logits(torch.tensor(numbers[first:end], device=self.rows.device))
            if block is not None:
                logits_of_targets = block.gather(1, torch.tensor(targets[first:end], device=block.device).unsqueeze(1))
                ranks += ((block > logits_of_targets).sum(1) + 1).tolist()
                reports += report(block, targets[first:end], tops[first:end])
        return reports, ranks
