"""A proposer that knows the texts: its drafts are right, wrong, or right up to a drawn place."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from lamina.engine.drafting import Wanted
from lamina.kv.request import ScheduledSequence
from lamina.scheduling.speculation import Speculation, left_to_draft

Texts = Mapping[tuple[tuple[int, ...], int], Sequence[int]]
"""What is generated, by prompt and number of the sample."""


class Scripted:
    """Drafts of `texts`, of which the first `right` of each row are right ("some": a drawn number), the others wrong;
    none of other sequences. `ended_ones` has the sequences that have ended."""

    def __init__(self, texts: Texts, right: int | str, vocabulary: int, seed: int = 0) -> None:
        self._texts, self._right, self._vocabulary = texts, right, vocabulary
        self._random = random.Random(seed)
        self.ended_ones: list[ScheduledSequence] = []

    def propose(self, wanted: Sequence[Wanted]) -> list[tuple[int, ...]]:
        return [self._drafts(each) for each in wanted]

    def _drafts(self, wanted: Wanted) -> tuple[int, ...]:
        sequence = wanted.sequence
        prompt = sequence.request.prompt
        text = self._texts.get((prompt, sequence.sample), ())
        at = len(sequence.tokens) - len(prompt)
        right = self._random.randint(0, wanted.depth) if self._right == "some" else int(self._right)
        depth = self._random.randint(1, wanted.depth) if self._right == "some" else wanted.depth
        drafts = list(text[at : at + depth])
        wrong = self._random.randrange(1, self._vocabulary)
        return tuple((draft + wrong * (i >= right)) % self._vocabulary for i, draft in enumerate(drafts))

    def ended(self, sequence: ScheduledSequence) -> None:
        self.ended_ones.append(sequence)


class Always(Speculation):
    """Deals every sequence as many drafts as it can have."""

    def depths(self, sequences: Sequence[ScheduledSequence]) -> list[int]:
        return [min(self.most, left_to_draft(sequence)) for sequence in sequences]


def texts_of(prompts: Iterable[Sequence[int]], answers: Iterable[Sequence[Sequence[int]]]) -> Texts:
    """The texts of prompts whose answers, one list a sample, are known."""
    return {
        (tuple(prompt), sample): text
        for prompt, samples in zip(prompts, answers, strict=True)
        for sample, text in enumerate(samples)
    }
