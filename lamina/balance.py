"""How much of the KV is attended beside the model, and how much by attention workers, decided by measured times. Pure.

Two tiers attend at once: the local holder, and the attention workers, who cost a round trip a layer besides. A model of
both, from what they were measured to take, says where they would end a step together; how long whole steps take there
has the last word, because tiers that share cores or memory disturb each other as no model of each tells. Knows
sequences as numbers of tokens; is told the time of each batch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

logger = logging.getLogger("lamina")

WINDOW = 5  # batches that one measurement takes, besides the first after a change
GAIN = 0.01  # of a step, by which a part that is remote must be better than none
TOLERANCE = 0.06  # of a step, by which a place beside the best may be predicted to be worse and is measured anyway
HOPE = 3.0  # times as fast, at most, a tier may be alone and on many tokens as beside the other and on few
TRIALS = 7  # places that are measured before one is settled on
DRIFT = 0.08  # of a step, by which what a tier takes must have changed before the choice is looked at again
PERSISTENT = 3  # batches that must say so; twice as many after each search that has ended where it began
LONGEST_DOUBT = 96
CHANGE = 1.5  # of the number of sequences or of their tokens, after which a choice is looked at again
PROBE_COST = 0.01  # of the time, at most, goes into asking again whether a tier that does nothing should do something
FEWEST_BETWEEN = 150  # batches from one such probe to the next, at least


def prefers_local(local: int, total: int, tokens: int, share: float) -> bool:
    """Whether a sequence of so many tokens should be local, for `share` of all to be: `local` of `total` are by now."""
    return share > 0 and local + tokens / 2 <= share * (total + tokens)


def to_move(candidates: Sequence[int], off: float, most: int) -> list[int]:
    """Which sequences, given as numbers of tokens, should change their tier for `off` tokens to do so: their places,
    `most` of them at most. What brings the sum hardly closer is left alone."""
    left, chosen = dict(enumerate(candidates)), list[int]()
    while left and len(chosen) < most:
        at = min(left, key=lambda place: abs(off - left[place]))
        tokens = left.pop(at)
        if off - abs(off - tokens) <= 0.2 * tokens:
            break
        chosen.append(at)
        off -= tokens
    return chosen


class Batch(NamedTuple):
    """One decode batch. `local_tokens` and `remote_tokens` of KV were read in it. The local holder took
    `local_seconds` to attend, the slowest remote one `remote_seconds`, as it says itself; `answered` seconds went by
    until its answers were taken, the last `waited` of them with nothing else to do. The step took `seconds` in all,
    for `sequences` sequences in all `lanes` together."""

    local_tokens: int
    remote_tokens: int
    local_seconds: float
    remote_seconds: float
    answered: float
    waited: float
    seconds: float
    sequences: int
    lanes: int = 1

    @property
    def tokens(self) -> int:
        return self.local_tokens + self.remote_tokens

    @property
    def share(self) -> float:
        return self.local_tokens / max(1, self.tokens)


@dataclass(frozen=True, slots=True)
class Rates:
    """What the tiers take: seconds a token of KV that is read, and the `fixed` seconds a step of having anything
    remote at all. None where it is not known."""

    local: float | None = None
    remote: float | None = None
    fixed: float = 0.0

    def updated(self, batch: Batch) -> Rates:
        """With what that batch tells."""
        local, remote, fixed = self.local, self.remote, self.fixed
        if batch.local_tokens:
            local = batch.local_seconds / batch.local_tokens
        if batch.remote_tokens:
            remote = batch.remote_seconds / batch.remote_tokens
            # Only where it was waited for is it known when the answer came.
            if batch.waited > 0.05 * batch.answered:
                fixed = max(0.0, batch.answered - batch.remote_seconds)
            else:
                fixed = min(fixed, max(0.0, batch.answered - batch.remote_seconds))
        return Rates(local, remote, fixed)

    def attention(self, share: float, tokens: int) -> float:
        """Seconds of a step until both tiers have attended; those that are not known take no time."""
        local = (self.local or 0.0) * share * tokens
        remote = self.fixed + (self.remote or 0.0) * (1 - share) * tokens if share < 1 else 0.0
        return max(local, remote)


class Balance:
    """`share` of the KV tokens that are read in decode should be local. A number is kept as it is; "auto" begins with
    everything local, and goes where steps are shortest."""

    def __init__(self, share: float | None = None) -> None:
        self.share = 1.0 if share is None else share
        self._auto = share is None
        self._settled = False
        self._window: deque[Batch] = deque(maxlen=WINDOW)
        self._fresh = True  # the next batch is the first after a change
        self._rates = Rates()
        self._search: list[Batch] = []  # what was measured at each place, medians
        self._trials = 0
        self._heading, self._stride = 1, 0  # which way places beside the best are tried, and sequences of the last step
        self._bounds = (0.0, 1.0)  # what can be reached: holders may be full
        self._reference: Batch | None = None  # what the choice was measured to yield
        self._begun_at = 1.0  # the share before the search
        self._doubtful = 0  # batches in a row that say that something has changed
        self._persistent = PERSISTENT
        self._held = 0
        self._spent = 0.0  # seconds of this search beyond what its batches would have taken without it
        self._base = 0.0  # seconds of a batch without it
        self._pause = FEWEST_BETWEEN  # batches until a tier that does nothing is asked again

    @property
    def settled(self) -> bool:
        """Whether nothing is being tried."""
        return self._settled or not self._auto

    @property
    def automatic(self) -> bool:
        """Whether `share` is chosen here."""
        return self._auto

    def reset(self) -> None:
        """Holders have come or gone: what was measured is of no use."""
        if self._auto:
            self._begin()
            self._rates, self._pause = Rates(self._rates.local), FEWEST_BETWEEN

    def interrupted(self) -> None:
        """What ran since the last decode batch teaches nothing, nor does the next batch."""
        self._window.clear()
        self._fresh = True

    def completed(self, batch: Batch, moving: bool = False) -> None:
        """A decode batch is over. While sequences are moving it tells nothing but what that costs."""
        if not self._auto or not batch.tokens:
            return
        if self._base and self._reference is None:  # on the way back, too
            self._spent += batch.seconds - self._base
        if moving or self._fresh:
            self._window.clear()
            self._fresh = moving
            return
        self._window.append(batch)
        if len(self._window) < WINDOW:
            return
        now = _median(self._window)
        if self._settled:
            self._hold(now)
        else:
            self._measured(now)

    # While a choice holds.

    def _hold(self, now: Batch) -> None:
        self._held += 1
        reference = self._reference
        if reference is None:
            self._pause = max(FEWEST_BETWEEN, int(self._spent / (PROBE_COST * max(now.seconds, 1e-9))))
        if reference is None or reference.lanes != now.lanes:
            self._reference, self._base = now, now.seconds
            return
        if self._unlike(now, reference):
            self._begin()
            return
        self._doubtful = self._doubtful + 1 if self._drifted(now, reference) else 0
        silent = not now.local_tokens or not now.remote_tokens
        if self._doubtful >= self._persistent or (silent and self._held >= self._pause):
            self._base = now.seconds
            self._begin()
            self._measured(now)

    def _unlike(self, now: Batch, then: Batch) -> bool:
        """Whether the load has changed so much that a choice for one is none for the other."""
        pairs = ((now.sequences, then.sequences), (now.tokens, then.tokens))
        return any(max(pair) > CHANGE * min(pair) for pair in pairs)

    def _drifted(self, now: Batch, then: Batch) -> bool:
        """Whether a tier takes so much more or less for the same work that it shows in the step."""
        before, after = Rates().updated(then), Rates().updated(now)
        off = abs(now.waited - then.waited)
        if before.local is not None and after.local is not None:
            off = max(off, abs(after.local - before.local) * now.local_tokens)
        if before.remote is not None and after.remote is not None:
            off = max(off, abs(after.remote - before.remote) * now.remote_tokens)
        return off > DRIFT * min(now.seconds, then.seconds)

    # The search.

    def _begin(self) -> None:
        self._settled, self._search, self._trials = False, [], 0
        self._heading, self._stride = 1, 0
        self._bounds, self._begun_at, self._held, self._doubtful = (0.0, 1.0), self.share, 0, 0
        self._spent = 0.0
        self._reference = None
        self.interrupted()

    def _measured(self, now: Batch) -> None:
        """What it is like at this share is known: go to the next one to try, or settle."""
        if self._search and self._unlike_points(now):
            self._search.clear()
        grain = 1 / now.sequences
        low, high = self._bounds
        if now.share < self.share - 0.75 * grain:  # there is no room for more
            high = now.share
        elif now.share > self.share + 0.75 * grain:
            low = now.share
        self._bounds = min(low, high), max(low, high)
        self._search = [point for point in self._search if not _near(point.share, now.share, grain)]
        self._search.append(now)
        self._base = self._base or now.seconds
        self._rates = self._rates.updated(now)
        self._trials += 1
        target = self._next(now, grain) if self._trials < TRIALS else None
        if target is None:
            self._settle(now)
            return
        self.share = target
        self.interrupted()

    def _unlike_points(self, now: Batch) -> bool:
        first = self._search[0]
        return self._unlike(now, first) or abs(now.sequences - first.sequences) > 0.25 * first.sequences

    def _next(self, now: Batch, grain: float) -> float | None:
        """The share to try next; None where nothing promises more."""
        if not now.remote_tokens and self._silent(remote=True):
            return self._free(1 - grain, grain)
        if not now.local_tokens and self._silent(remote=False):
            return self._free(grain, grain)
        best = min(self._search, key=lambda point: point.seconds)
        here = self._rates.attention(now.share, now.tokens)
        rest = now.seconds - max(here, now.answered if now.remote_tokens else 0.0)  # of the step, besides attention
        places = [at / now.sequences for at in range(now.sequences + 1)]
        chosen = min(places, key=lambda share: self._rates.attention(share, now.tokens))
        if rest + self._rates.attention(chosen, now.tokens) < (1 - GAIN) * best.seconds:
            target = self._free(chosen, grain)
            if target is not None:
                return target
        end = self._end(best, now, grain, rest)
        return end if end is not None else self._beside(best, now, grain, rest)

    def _end(self, best: Batch, now: Batch, grain: float, rest: float) -> float | None:
        """All remote, where that was not measured and may be better than the best place: there that tier works alone,
        and on many tokens. Beside the local one it may be slower, and on few each token bears more of a call."""
        alone = [point for point in self._search if not point.remote_tokens]
        beside = [point for point in self._search if point.remote_tokens and point.local_tokens]
        if not alone or not beside:
            return None
        slowest = max(point.local_seconds / point.local_tokens for point in beside)
        disturbed = slowest > (1 + DRIFT) * alone[0].local_seconds / alone[0].local_tokens
        if not disturbed and any(point.share <= 0.5 for point in beside):
            return None
        rest = min(rest, alone[0].seconds - alone[0].local_seconds)
        hoped = rest + self._rates.fixed + (self._rates.remote or 0.0) / HOPE * now.tokens
        free = self._free(0.0, grain)
        return free if free == 0.0 and hoped < (1 - GAIN) * best.seconds else None

    def _beside(self, best: Batch, now: Batch, grain: float, rest: float) -> float | None:
        """A place beside the best one, where the tiers may be other together than the model says: towards all local
        first, then towards none, in strides that double while steps get shorter."""
        if self._stride and best is not now:  # this way they get longer
            self._heading, self._stride = self._heading - 2, 0
        while self._heading >= -1:
            self._stride = 2 * self._stride or 1
            target = min(1.0, max(0.0, best.share + self._heading * self._stride * grain))
            predicted = rest + self._rates.attention(target, now.tokens)
            free = self._free(target, grain)
            if free is not None and predicted < (1 + TOLERANCE) * best.seconds:
                return free
            self._heading, self._stride = self._heading - 2, 0
        return None

    def _silent(self, remote: bool) -> bool:
        """Whether nothing of this search says how fast that tier is."""
        return not any(point.remote_tokens if remote else point.local_tokens for point in self._search)

    def _free(self, share: float, grain: float) -> float | None:
        """That share, if it can be reached and was not measured in this search."""
        low, high = self._bounds
        share = min(high, max(low, share))
        return None if any(_near(point.share, share, grain) for point in self._search) else share

    def _settle(self, now: Batch) -> None:
        best = min(self._search, key=lambda point: point.seconds)
        most = max(self._search, key=lambda point: point.share)
        if not most.remote_tokens and most.seconds <= (1 + GAIN) * best.seconds:
            best = most  # nothing remains remote where that does not pay
        self.share = 1.0 if not best.remote_tokens else best.share if best.local_tokens else 0.0
        again = abs(self.share - self._begun_at) < 0.5 / now.sequences
        self._persistent = min(LONGEST_DOUBT, 2 * self._persistent) if again else PERSISTENT
        self._settled, self._base, self._held = True, best.seconds, 0
        self.interrupted()
        logger.info("%s", self._said(best, now))

    def _said(self, best: Batch, now: Batch) -> str:
        rates = self._rates
        known = [f"local {rates.local * 1e6:.3g}"] if rates.local is not None else []
        if rates.remote is not None:
            known.append(f"remote {rates.remote * 1e6:.3g} and {rates.fixed * 1e3:.2g} ms a step")
        steps = ", ".join(f"{p.share:.2f}: {p.seconds * 1e3:.2f}" for p in sorted(self._search, key=lambda p: p.share))
        return (
            f"{self.share:.0%} of the KV is read locally, for {now.sequences} sequences of {now.tokens} tokens; "
            f"us a token measured: {', '.join(known)}; ms a step measured by share: {steps}"
        )


def _near(one: float, other: float, grain: float) -> bool:
    return abs(one - other) < 0.5 * grain


def _median(batches: Iterable[Batch]) -> Batch:
    """Of each number of its own; counts are those of the last."""
    several = list(batches)
    last = several[-1]

    return last._replace(
        local_seconds=median(batch.local_seconds for batch in several),
        remote_seconds=median(batch.remote_seconds for batch in several),
        answered=median(batch.answered for batch in several),
        waited=median(batch.waited for batch in several),
        seconds=median(batch.seconds for batch in several),
    )
