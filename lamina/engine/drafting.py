"""Drafts: guesses of the next tokens of sequences, which the model verifies (see `lamina/scheduling/scheduler.py`).

`Drafting` has them proposed before a batch is planned, and measures afterwards what they were worth. A `Proposer` makes
them. `NgramProposer` takes them from a sequence's own text: what followed where its last tokens stood before (prompt
lookup). The tokens that follow the longest match are proposed. What was copied from before is copied further, as long
as the text follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from lamina.engine.masks import MaskAdvance, Masks
from lamina.engine.observers import EngineStats
from lamina.kv.request import Outcome, Plan, PlannedRow, ScheduledSequence
from lamina.messages.engine_request import EngineRequest
from lamina.scheduling.scheduler import before_the_end
from lamina.scheduling.speculation import Speculation, SpeculationCounts

if TYPE_CHECKING:
    import torch

    from lamina.engine.observers import BatchDone
    from lamina.engine.request_registry import RequestRegistry


class Wanted(NamedTuple):
    """A sequence that decodes, its request, and how many drafts it should get, 1 or more. Drafts follow
    `sequence.tokens`."""

    sequence: ScheduledSequence
    request: EngineRequest
    depth: int


class Proposer(Protocol):
    """Guesses the next tokens. Called on the engine's thread, before a batch is planned. It raises nothing that a
    request could cause."""

    def propose(self, wanted: Sequence[Wanted]) -> list[tuple[int, ...]]:
        """For each entry its drafts, `depth` at most, fewer or none where nothing is likely. All are token ids of the
        model's vocabulary."""

    def ended(self, sequence: ScheduledSequence) -> None:
        """Forget a sequence. Harmless for one that is not known. It may come back, with other tokens."""


@runtime_checkable
class Hearing(Proposer, Protocol):
    """A proposer that is told what the model has computed."""

    def computed(self, rows: Sequence[PlannedRow], hidden: torch.Tensor) -> None:
        """A batch of these rows is recorded; `hidden` is what entered the head, of all its tokens, `[T, hidden]`."""


LONGEST = 3  # tokens of an n-gram that are looked for
_COMPARED = 32  # tokens before two matches that are compared, to find the longer one
_BITS = 24  # of a token id in a key


class NgramProposer:
    """`Proposer` by n-grams of 3 tokens to 1. Each token is indexed once."""

    def __init__(self) -> None:
        self._texts: dict[ScheduledSequence, _Text] = {}

    def propose(self, wanted: Sequence[Wanted]) -> list[tuple[int, ...]]:
        """As `Proposer.propose`. After a match of one or two tokens there are no more drafts than these."""
        return [self._text(want.sequence).drafts(want.depth) for want in wanted]

    def _text(self, sequence: ScheduledSequence) -> _Text:
        text = self._texts.get(sequence)
        if text is None or text.indexed > len(sequence.tokens):
            text = self._texts[sequence] = _Text(sequence.tokens)
        return text

    def ended(self, sequence: ScheduledSequence) -> None:
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
        tokens, key, longest = self._tokens, 0, 0
        for size, after in enumerate(self._after[: len(tokens)], 1):
            key |= tokens[-size] << (size - 1) * _BITS
            if key not in after:
                break
            longest = after[key]
        candidates = [position for position in (longest, copied) if position]
        lengths = [(self._length(position), position) for position in candidates]
        length, position = max(lengths, default=(0, 0))
        return (position, length) if length else (0, 0)

    def _length(self, at: int) -> int:
        """How many tokens before `at` are those at the text's end, `_COMPARED` at most."""
        tokens, length = self._tokens, 0
        while length < min(_COMPARED, at) and tokens[at - 1 - length] == tokens[-1 - length]:
            length += 1
        return length


class Drafting:
    """Drafts of `proposer`, as many as `speculation` says; none without these. `clock`: seconds. For the engine's
    thread."""

    def __init__(
        self, proposer: Proposer | None, speculation: Speculation | None, stats: EngineStats, clock: Callable[[], float]
    ) -> None:
        self._proposer = proposer
        self._speculation = speculation
        self._stats = stats
        self._clock = clock
        self._last: float | None = None  # when the batch before was recorded, idle seconds not counted
        self._took = 0.0  # seconds that drafts have taken since

    @property
    def on(self) -> bool:
        return self._proposer is not None and self._speculation is not None

    @property
    def hears(self) -> bool:
        """Whether hidden states are wanted."""
        return self.on and isinstance(self._proposer, Hearing)

    @property
    def counts(self) -> SpeculationCounts | None:
        return None if self._speculation is None else self._speculation.counts

    def propose(self, decoding: Sequence[ScheduledSequence], registry: RequestRegistry, masks: Masks) -> None:
        """Set the `drafts` of sequences that will decode, but for those that have some from before. Where text is
        constrained, its masks along the drafts are there, or the sequence is held until they are."""
        if self._proposer is None or self._speculation is None or not decoding:
            return
        began = self._clock()
        depths = zip(decoding, self._speculation.depths(decoding), strict=True)
        wants = [
            Wanted(sequence, registry.requests[sequence.request.id], depth)
            for sequence, depth in depths
            if depth > 0 and not sequence.drafts and not (self._speculation.measured and _slow(registry, sequence))
        ]
        if not wants:
            return
        looks = []
        for (sequence, _, depth), proposed in zip(wants, self._proposer.propose(wants), strict=True):
            drafts = before_the_end(sequence, proposed[:depth])
            constraint = registry.constraints.get(sequence)
            if drafts and constraint is not None:
                looks.append(MaskAdvance(sequence, constraint, drafts, drafts=True))
            else:
                sequence.drafts = drafts
        for look in masks.begin(looks, _foreseen) if looks else ():
            _foreseen(look)
        self._took += self._clock() - began

    def recorded(self, plan: Plan, outcomes: Sequence[Outcome], requests: Mapping[str, EngineRequest]) -> None:
        """A batch is recorded, with these outcomes: count what was accepted."""
        if self._speculation is None:
            return
        tokens: dict[ScheduledSequence, list[int]] = {}
        for outcome in outcomes:
            if outcome.token is not None:
                tokens.setdefault(outcome.sequence, []).append(outcome.token)
        for row in plan.rows:
            if row.drafts and (new := tokens.get(row.sequence)):
                matches = takewhile(lambda pair: pair[0] == pair[1], zip(row.drafts, new, strict=False))
                accepted = sum(1 for _ in matches)
                self._speculation.recorded(row.sequence, len(row.drafts), accepted)
                request = requests[row.sequence.request.id]
                request.drafted += len(row.drafts)
                request.accepted += accepted

    def batch_done(self, done: BatchDone) -> None:
        if done.hidden and isinstance(self._proposer, Hearing):
            self._proposer.computed(done.plan.rows, done.hidden[-1])
        last, drafting = self._last, self._took
        self._last, self._took = done.now - self._stats.idle_seconds, 0.0
        if self._speculation is None or last is None or done.prefill or not done.sampled:
            return
        tokens = sum(row.count for row in done.plan.rows)
        self._speculation.took(len(done.plan.rows), tokens, done.sampled, self._last - last, drafting)

    def ended(self, sequence: ScheduledSequence) -> None:
        if self._proposer is not None and self._speculation is not None:
            self._proposer.ended(sequence)
            self._speculation.ended(sequence)


def _slow(registry: RequestRegistry, sequence: ScheduledSequence) -> bool:
    """Whether the masks along drafts would take long."""
    constraint = registry.constraints.get(sequence)
    return constraint is not None and constraint.slow


def _foreseen(look: MaskAdvance) -> None:
    """A constraint has looked ahead along drafts."""
    if look.sequence.finish_reason is None and look.error is None:
        look.sequence.drafts = tuple(look.tokens[: len(look.constraint.foreseen)])
