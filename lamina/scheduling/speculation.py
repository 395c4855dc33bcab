"""How many drafts each sequence gets, by measured acceptance (`Speculation`) and measured steps (`StepCosts`). Pure.

A step verifies the drafts of its rows and gives each sequence one token more than were accepted. It takes longer the
more drafts it has. So drafts are dealt to the positions that are most likely to be accepted, as many as give the most
tokens a second by what was measured; none where that is best.

What steps without drafts take is measured first, and again from time to time. An account is kept of what speculation
has gained or lost against them. While it is overdrawn there are no drafts, and where they do not pay they are tried
only as far as `ALLOWANCE` of the time covers their expected loss.

An engine that is to be deterministic measures nothing: how many tokens are verified together changes how sums are
rounded. There a sequence's own text says how many drafts it gets.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from lamina.kv.request import ScheduledSequence

WINDOW_STEPS = 9  # measurements that count, of steps with the same rows and drafts
MIN_PLAIN_STEPS = 5  # measurements of steps without drafts that are needed
PLAIN_STEPS_AGE = (
    128  # steps with drafts after which those without are measured anew: contexts grow, machines are shared
)
MAX_AGE = 512  # steps with the same rows after which a measurement is forgotten

MAX_DRAFTS = 16  # of a sequence in a step
ALLOWANCE = 0.015  # of the time, that drafts which do not pay may cost
MAX_CREDIT = 4.0  # steps, at most, that gains of before may cover
ASSUMED_ACCEPTANCE = 0.7  # of the drafts at a position, which are assumed to be accepted until some were verified
_WEIGHT = 4.0  # of that, and of all sequences' acceptance beside a sequence's own, in verified drafts
_MEMORY = 0.9  # of a sequence's acceptance, that is left after one more verified position
_SHARED_MEMORY = 0.99  # the same of all sequences' at one position
_FADING = 0.98  # of a sequence's acceptance, that is left after a step in which it had no draft
_PAUSE = 4  # steps from one trial of drafts that do not pay to the next
_UNLIKELY = 0.05  # a chance for which no draft but the first is worth its verification
_LIKELY = 0.4  # a chance below which nothing is drafted where nothing is measured
_EVEN = 0.02  # of a rate, by which drafts must be better than none


class Speculation:
    """Deals at most `most` drafts to a sequence, by what is `measured`, or by its own text alone. Raises ValueError
    where that is not 1 to `MAX_DRAFTS`."""

    def __init__(self, most: int, measured: bool = True) -> None:
        if not 1 <= most <= MAX_DRAFTS:
            raise ValueError(f"at most {most} drafts a sequence; allowed are 1 to {MAX_DRAFTS}")
        self.most, self.measured = most, measured
        self.counts = SpeculationCounts(accepted_at=[0] * most)
        self._all = [_Acceptance() for _ in range(most)]  # by position
        self._acceptances: dict[ScheduledSequence, _Acceptance] = {}
        self._costs = StepCosts()
        self._account: float | None = None  # seconds; None until steps without drafts were measured
        self._tries = False  # the drafts dealt last do not pay by what is known
        self._tried = 0  # steps since they were
        self._deepest = 1  # of the depths dealt last
        self._drafting: deque[float] = deque(maxlen=5)  # seconds that drafting took for each position, in steps with it

    def depths(self, sequences: Sequence[ScheduledSequence]) -> list[int]:
        """How many drafts each of the sequences should get that decode in the next batch, in their order."""
        if not self.measured:
            return list(map(self._likely, sequences))
        rows = len(sequences)
        depths = [0] * rows
        self._tries = False
        if not sequences or self._costs.stale(rows):
            return depths
        if self._account is None:
            self._account = self._costs.seconds(rows)
        if self._account < 0:
            return depths
        gains = sorted(self._gains(sequences), key=lambda gain: -gain[0])
        seconds = self._costs.curve(rows, len(gains))
        drafting, deep = self._drafting_seconds, Counter[int]()
        emitted, best, draft_count, deepest = float(rows), (1 + _EVEN) * rows / seconds[0], 0, 0
        for number, ((gain, index), step) in enumerate(zip(gains, seconds[1:], strict=False), 1):
            emitted += gain
            deep[index] += 1
            deepest = max(deepest, deep[index])
            if (rate := emitted / (step + deepest * drafting)) > best:
                best, draft_count = rate, number
        if not draft_count and len(seconds) > 1:
            draft_count = self._trial(rows, gains, seconds, drafting)
        for _, index in gains[:draft_count]:
            depths[index] += 1
        self._deepest = max(depths)
        return depths

    def _likely(self, sequence: ScheduledSequence) -> int:
        """How many drafts are likely enough to be accepted, by those of the sequence before."""
        acceptance, chance, depth = self._acceptances.get(sequence, _Acceptance()), 1.0, 0
        acceptance.fade()
        for _ in range(min(self.most, left_to_draft(sequence))):
            chance *= acceptance.chance(ASSUMED_ACCEPTANCE)
            depth += chance >= _LIKELY
        return depth

    def _gains(self, sequences: Sequence[ScheduledSequence]) -> Iterator[tuple[float, int]]:
        """The chance of each position to become a token, and the number of its sequence; falling for a sequence."""
        shared = [acceptance.chance(ASSUMED_ACCEPTANCE) for acceptance in self._all]
        for index, sequence in enumerate(sequences):
            acceptance_of_sequence, chance = self._acceptances.get(sequence), 1.0
            for number, prior in enumerate(shared[: left_to_draft(sequence)]):
                chance *= acceptance_of_sequence.chance(prior) if acceptance_of_sequence is not None else prior
                if number and chance < _UNLIKELY:
                    break
                yield chance, index

    def _trial(self, rows: int, gains: Sequence[tuple[float, int]], seconds: Sequence[float], drafting: float) -> int:
        """How many drafts are tried where they do not pay: one for each sequence, if the account covers the
        loss or is as full as it can be."""
        number = min(rows, len(gains), len(seconds) - 1)
        emitted = rows + sum(gain for gain, _ in gains[:number])
        loss = seconds[number] + drafting - emitted / rows * seconds[0]
        covered = (self._account or 0.0) >= min(loss, 0.99 * MAX_CREDIT * seconds[0])
        self._tries = number > 0 and self._tried >= _PAUSE and covered
        return number if self._tries else 0

    @property
    def _drafting_seconds(self) -> float:
        """What drafting takes for each position, without prompts. The first time does not count."""
        return min(self._drafting) if len(self._drafting) > 1 else 0.0

    def recorded(self, sequence: ScheduledSequence, proposed: int, accepted: int) -> None:
        """A row of the sequence had `proposed` drafts, 1 or more; the first `accepted` of them became its tokens."""
        self.counts.drafts += 1
        self.counts.draft_tokens += proposed
        self.counts.accepted_tokens += accepted
        acceptance = self._acceptances.setdefault(sequence, _Acceptance())
        for position in range(min(accepted + 1, proposed)):
            good = position < accepted
            self.counts.accepted_at[position] += good
            self._all[position].add(good, _SHARED_MEMORY)
            acceptance.add(good, _MEMORY)

    def took(self, rows: int, tokens: int, emitted: int, seconds: float, drafting: float = 0.0) -> None:
        """A batch that only decodes was recorded: `tokens` computed in so many rows, drafts included, of which the
        sequences got `emitted`. `seconds` passed since the batch before was recorded, or since work came; the proposer
        took `drafting` of them. Batches with prefill are not given."""
        if not self.measured:
            return
        for acceptance in self._acceptances.values():
            acceptance.fade()
        self._tried = 0 if self._tries else self._tried + 1
        self._costs.measured(rows, tokens - rows, seconds - drafting)
        if self._account is None:
            return
        plain, deepest = self._costs.seconds(rows), max(1, self._deepest)
        if tokens > rows:
            self._drafting.append(drafting / deepest)
            # What such steps take at most times, as of those without drafts: some are slow whatever they compute.
            if usual := self._costs.seconds(rows, tokens - rows):
                self._account += plain * emitted / rows - usual
        # Drafting that takes longer once reads a prompt: where drafts pay, that pays off later.
        self._account -= drafting if self._tries else min(drafting, deepest * self._drafting_seconds)
        self._account = min(self._account + ALLOWANCE * seconds, MAX_CREDIT * plain)

    def ended(self, sequence: ScheduledSequence) -> None:
        self._acceptances.pop(sequence, None)


@dataclass(slots=True)
class SpeculationCounts:
    """What became of all drafts. `drafts` counts the rows that had any, `accepted_at` the accepted ones by position."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Acceptance:
    """Verified drafts and accepted ones, older ones counting less. A draft behind one that was not accepted is not
    verified."""

    verified: float = 0.0
    accepted: float = 0.0

    def add(self, accepted: bool, memory: float) -> None:
        self.verified = memory * self.verified + 1
        self.accepted = memory * self.accepted + accepted

    def fade(self) -> None:
        self.verified *= _FADING
        self.accepted *= _FADING

    def chance(self, prior: float) -> float:
        return (self.accepted + _WEIGHT * prior) / (self.verified + _WEIGHT)


def left_to_draft(sequence: ScheduledSequence) -> int:
    """How many drafts can become tokens of the sequence: the last token that it may have is never a draft's."""
    return max(0, len(sequence.request.prompt) + sequence.request.max_tokens - len(sequence.tokens) - 1)


@dataclass(slots=True)
class _Steps:
    """Steps of the same number of rows: by the number of their drafts the seconds that they took, and the number of the
    last one. `warm` has the numbers of drafts of which a step has run; the first such step loads what it needs, and
    does not count."""

    seconds: dict[int, deque[float]] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    warm: set[int] = field(default_factory=lambda: {0})
    steps: int = 0


class StepCosts:
    """Measured steps. Numbers below 16 stand alone; above, those that differ by less than an eighth are one."""

    def __init__(self) -> None:
        self._rows: dict[int, _Steps] = {}

    def measured(self, rows: int, drafts: int, seconds: float) -> None:
        """A step of so many rows verified so many drafts, and took so many seconds."""
        steps, drafts = self._rows.setdefault(_rounded(rows), _Steps()), _rounded(drafts)
        if not drafts and steps.steps - steps.last.get(0, 0) > PLAIN_STEPS_AGE:
            steps.seconds.pop(0, None)
        steps.steps += 1
        if drafts not in steps.warm:
            steps.warm.add(drafts)
            return
        steps.last[drafts] = steps.steps
        steps.seconds.setdefault(drafts, deque(maxlen=WINDOW_STEPS)).append(seconds)
        for old in [number for number, last in steps.last.items() if number and last < steps.steps - MAX_AGE]:
            del steps.last[old], steps.seconds[old]

    def stale(self, rows: int) -> bool:
        """Whether steps without drafts are to be measured, for the first time or anew."""
        steps = self._rows.get(_rounded(rows))
        return (
            steps is None
            or len(steps.seconds.get(0, ())) < MIN_PLAIN_STEPS
            or steps.steps - steps.last[0] > PLAIN_STEPS_AGE
        )

    def seconds(self, rows: int, drafts: int = 0) -> float:
        """What a step with exactly so many drafts takes; 0 where none was measured."""
        steps, drafts = self._rows.get(_rounded(rows)), _rounded(drafts)
        return median(steps.seconds[drafts]) if steps is not None and drafts in steps.seconds else 0.0

    def curve(self, rows: int, most: int) -> list[float]:
        """What a step takes with 0, 1, ... drafts, `most` at most: between two measured numbers in proportion, beyond
        the highest as that one, and never less for more drafts. It ends a draft a row or twice as far as was measured,
        so that drafts become more by degrees. Steps without drafts must have been measured."""
        steps = self._rows[_rounded(rows)]
        marks = sorted(steps.seconds)
        curve = [median(steps.seconds[0])]
        for low, high in pairwise(marks):
            below = curve[-1]
            above = max(below, median(steps.seconds[high]))
            curve += [below + (above - below) * step / (high - low) for step in range(1, high - low + 1)]
        curve += curve[-1:] * max(rows, marks[-1])
        return curve[: most + 1]


def _rounded(number: int) -> int:
    """The lowest number that is not told from this one: it has the same four leading bits."""
    shift = max(0, number.bit_length() - 4)
    return number >> shift << shift
