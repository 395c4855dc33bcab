"""Drafts from a sequence's own text: what followed where its last tokens stood before (prompt lookup). Pure.

The tokens that follow the longest match are proposed. What was copied from before is copied further, as long as the
text follows it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lamina.engine.proposer import Wanted
from lamina.kv.request import ScheduledSequence

LONGEST = 3  # tokens of an n-gram that are looked for
_COMPARED = 32  # tokens before two matches that are compared, to find the longer one
_BITS = 24  # of a token id in a key


class NgramProposer:
    """`Proposer` by n-grams of 3 tokens to 1. Each token is indexed once."""

    def __init__(self) -> None:
        self._texts: dict[ScheduledSequence, _Text] = {}

    def propose(self, wanted: Sequence[Wanted]) -> list[tuple[int, ...]]:
        """As `Proposer.propose`. After a match of one or two tokens there are no more drafts than these."""
        return [self._text(each.sequence).drafts(each.depth) for each in wanted]

    def _text(self, sequence: ScheduledSequence) -> _Text:
        text = self._texts.get(sequence)
        if text is None or text.indexed > len(sequence.tokens):
            text = self._texts[sequence] = _Text(sequence.tokens)
        return text

    def ended(self, sequence: ScheduledSequence) -> None:
        """Forget a sequence. Harmless for one that is not known."""
        self._texts.pop(sequence, None)


class _Text:
    """The n-grams of a list of tokens that grows. `indexed`: so many tokens were seen."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._after: list[dict[int, int]] = [{} for _ in range(LONGEST)]  # n-gram -> position behind its last one
        self._source = 0  # the position that the last draft was copied from; 0 without one
        self.indexed = 0

    def drafts(self, depth: int) -> tuple[int, ...]:
        """At most `depth` tokens that may follow."""
        grown = len(self._tokens) - self.indexed
        self._index()
        source, length = self._best(self._source + grown if self._source else 0)
        self._source = source
        if not source:
            return ()
        count = depth if length >= LONGEST else min(depth, length)
        text = self._tokens[source : source + count]
        while len(text) < count:  # the match overlaps the end: the text repeats itself
            text.append(text[len(text) - (len(self._tokens) - source)])
        return tuple(text)

    def _index(self) -> None:
        """Enter the n-grams that end before the last token: what follows them is known."""
        tokens = self._tokens
        for end in range(max(1, self.indexed), len(tokens)):
            key = 0
            for size, after in enumerate(self._after[:end], 1):
                key |= tokens[end - size] << (size - 1) * _BITS
                after[key] = end
        self.indexed = len(tokens)

    def _best(self, copied: int) -> tuple[int, int]:
        """The position behind the longest match of the text's end and its length; (0, 0) without one. `copied`: where
        the last draft's source goes on, 0 without one."""
        tokens, key, found = self._tokens, 0, 0
        for size, after in enumerate(self._after[: len(tokens)], 1):
            key |= tokens[-size] << (size - 1) * _BITS
            if key not in after:
                break
            found = after[key]
        candidates = [at for at in (found, copied) if at]
        lengths = [(self._length(at), at) for at in candidates]
        length, at = max(lengths, default=(0, 0))
        return (at, length) if length else (0, 0)

    def _length(self, at: int) -> int:
        """How many tokens before `at` are those at the text's end, `_COMPARED` at most."""
        tokens, length = self._tokens, 0
        while length < min(_COMPARED, at) and tokens[at - 1 - length] == tokens[-1 - length]:
            length += 1
        return length
