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
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

logger = logging.getLogger("lamina")

WINDOW = 5  # batches that one measurement takes, besides the first after a change
GAIN = 0.01  # of a step, by which a part that is remote must be better than none
HOPE = 1.7  # times as fast a remote tier is taken to be alone as beside the local one, until it is known
SPREAD = 1.9  # times as many tokens, from which on it shows what a call takes besides its tokens
SEARCH = 36  # batches without moves, after which the best place known is settled on
DRIFT = 0.08  # of a step, by which what a tier takes must have changed before the choice is looked at again
SURE = 4  # batches that must say so; by then the first ones after the change are the most of a window
PERSISTENT = 3  # times DRIFT, that these must add up to; twice as many after each search that has ended where it began
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


def whole_step(parts: Sequence[Batch]) -> Batch:
    """The step of all lanes together, of the batches that it is made of."""
    return Batch(
        sum(part.local_tokens for part in parts),
        sum(part.remote_tokens for part in parts),
        sum(part.local_seconds for part in parts),
        sum(part.remote_seconds for part in parts),
        sum(part.answered for part in parts),
        sum(part.waited for part in parts),
        sum(part.seconds for part in parts),
        parts[-1].sequences,
        parts[-1].lanes,
    )


@dataclass(frozen=True, slots=True)
class Alone:
    """What the remote tier took for `tokens` of KV with nobody beside it: `seconds` as it said itself, and `fixed` ones
    until its answers came. `beside`: what it would have taken beside the local tier then, None where that is not
    known."""

    tokens: int
    seconds: float
    fixed: float
    beside: float | None = None

    @property
    def slower(self) -> float:
        """How many times as slow it is beside the local tier."""
        return self.beside / self.seconds if self.beside and self.seconds else 1.0


@dataclass(frozen=True, slots=True)
class Rates:
    """What the tiers take beside each other: seconds a token of KV that is read, for the remote one `call` seconds a
    step besides, however few tokens there are, and `fixed` ones until it has been asked and has answered. None where
    it is not known. Two tiers on the same cores disturb each other: the local one takes `local_alone` of that where it
    works alone; what the remote one takes then has to be seen (None until it was)."""

    local: float | None = None
    remote: float | None = None
    call: float = 0.0
    fixed: float = 0.0
    local_alone: float = 1.0
    alone: Alone | None = None

    def attention(self, share: float, tokens: int) -> float:
        """Seconds of a step until both tiers have attended; those that are not known take no time."""
        local = (self.local or 0.0) * share * tokens
        if share == 1:
            return self.local_alone * local
        if share == 0 and self.alone:
            return self._alone(self.alone, tokens)
        return max(local, self.fixed + self._beside_local((1 - share) * tokens))

    def hoped(self, points: Sequence[Batch]) -> Rates:
        """The best that is possible as long as the remote tier was not seen alone: then it is faster, and answers come
        later by no more than was waited for them beside the local tier, which may have kept the cores from whoever
        brings them. Where these measurements do not tell a call from its tokens, all that it takes may be the call."""
        beside = [point for point in points if point.remote_tokens and point.local_tokens]
        if not beside:
            return self
        tokens, total = [point.remote_tokens for point in beside], beside[-1].tokens
        if max(tokens) < SPREAD * min(tokens):
            seconds = min(point.remote_seconds for point in beside)
        else:
            seconds = self._beside_local(total)
        fixed = min(self.fixed, *(point.waited for point in beside))
        return replace(self, alone=Alone(total, seconds / HOPE, fixed))

    def _beside_local(self, tokens: float) -> float:
        return self.call + (self.remote or 0.0) * tokens

    def _alone(self, seen: Alone, tokens: int) -> float:
        """As it was seen, or less where it has become faster beside the local tier. That it has become slower there may
        be the local tier's doing."""
        of_then = tokens / seen.tokens
        faster = min(1.0, self._beside_local(tokens) / (seen.beside * of_then)) if seen.beside else 1.0
        return seen.fixed + seen.seconds * of_then * faster

    def learned(self, points: Sequence[Batch]) -> Rates:
        """With what these measurements say of the tiers as they are now, the latest last; the rest is as before."""
        rates = self
        both = [point for point in points if point.local_tokens and point.remote_tokens]
        if both:
            rates = rates._beside(both)
        for point in points:
            if not point.remote_tokens:
                rates = rates._here(point, known=bool(both))
            elif not point.local_tokens:
                rates = rates._there(point, known=bool(both))
        return rates

    def _beside(self, points: Sequence[Batch]) -> Rates:
        last = points[-1]
        few, many = (pick(points, key=lambda point: point.remote_tokens) for pick in (min, max))
        call = self.call
        if many.remote_tokens >= SPREAD * few.remote_tokens:
            slope = (many.remote_seconds - few.remote_seconds) / (many.remote_tokens - few.remote_tokens)
            call = max(0.0, few.remote_seconds - max(0.0, slope) * few.remote_tokens)
        call = min(call, last.remote_seconds)
        fixed = max(0.0, last.answered - last.remote_seconds)
        if last.waited <= 0.05 * last.answered:  # only where it was waited for is it known when the answer came
            fixed = min(self.fixed, fixed)
        local = sum(point.local_seconds for point in points) / sum(point.local_tokens for point in points)
        return replace(
            self, local=local, remote=(last.remote_seconds - call) / last.remote_tokens, call=call, fixed=fixed
        )

    def _here(self, alone: Batch, known: bool) -> Rates:
        """`known`: what it takes beside the remote tier was measured by now, so that this says what alone is like."""
        seconds = alone.local_seconds / alone.local_tokens
        if known and self.local and seconds:
            return replace(self, local_alone=seconds / self.local)
        return replace(self, local=seconds / self.local_alone)

    def _there(self, alone: Batch, known: bool) -> Rates:
        tokens, seconds = alone.remote_tokens, alone.remote_seconds
        fixed = max(0.0, alone.answered - seconds)
        if known:
            return replace(self, alone=Alone(tokens, seconds, fixed, self._beside_local(tokens)))
        slower = self.alone.slower if self.alone else 1.0
        beside = seconds * slower
        call = min(self.call, beside)
        seen = Alone(tokens, seconds, fixed, beside)
        return replace(self, remote=(beside - call) / tokens, call=call, fixed=fixed * slower, alone=seen)


class LocalShare:
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
        self._searched = 0  # batches of this search in which nothing moved
        self._bounds = (0.0, 1.0)  # what can be reached: holders may be full
        self._reference: Batch | None = None  # what the choice that holds was measured to yield
        self._begun_at = 1.0  # the share before the search
        self._doubts: list[float] = []  # of batches in a row, by how many times DRIFT
        self._persistent = PERSISTENT
        self._held = 0
        self._spent = 0.0  # seconds of this search beyond what its batches would have taken without it
        self._base = 0.0  # seconds of a batch without it
        self._pause = FEWEST_BETWEEN  # batches until a tier that does nothing is asked again

    @property
    def settled(self) -> bool:
        """Whether nothing is being tried."""
        return self._settled or not self._auto

    def reset(self) -> None:
        """Holders have come or gone: what was measured is of no use."""
        if self._auto:
            self._begin()
            self._rates, self._pause = Rates(), FEWEST_BETWEEN

    def interrupted(self) -> None:
        """What ran since the last decode batch teaches nothing, nor does the next batch."""
        self._window.clear()
        self._fresh = True

    def completed(self, batch: Batch, moving: bool = False) -> None:
        """A decode batch is over. While sequences are moving it tells nothing but what that costs."""
        if not self._auto or not batch.tokens:
            return
        if self._base and not (self._settled and self._held):  # on the way back, too
            self._spent += batch.seconds - self._base
        self._searched += not moving
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
        if self._held == 1:
            self._pause = max(FEWEST_BETWEEN, int(self._spent / (PROBE_COST * max(now.seconds, 1e-9))))
        if reference is None or reference.lanes != now.lanes:
            self._reference, self._base, self._doubts = now, now.seconds, []
            return
        if self._unlike(now, reference):
            self._begin()
            return
        drift = self._drift(now, reference)
        self._doubts = [*self._doubts, drift / DRIFT] if drift > DRIFT else []
        silent = not now.local_tokens or not now.remote_tokens
        doubted = len(self._doubts) >= SURE and sum(self._doubts) >= self._persistent
        if doubted or (silent and self._held >= self._pause):
            self._base = now.seconds
            self._begin()
            self._measured(now)

    def _unlike(self, now: Batch, then: Batch) -> bool:
        """Whether the load has changed so much that a choice for one is none for the other."""
        pairs = ((now.sequences, then.sequences), (now.tokens, then.tokens))
        return any(max(pair) > CHANGE * min(pair) for pair in pairs)

    def _drift(self, now: Batch, then: Batch) -> float:
        """By how much of a step a tier takes more or less for the same work."""
        off = abs(now.waited - then.waited)
        if now.local_tokens and then.local_tokens:
            before = then.local_seconds / then.local_tokens
            off = max(off, abs(now.local_seconds / now.local_tokens - before) * now.local_tokens)
        if now.remote_tokens and then.remote_tokens:
            before = then.remote_seconds / then.remote_tokens
            off = max(off, abs(now.remote_seconds / now.remote_tokens - before) * now.remote_tokens)
        return off / max(1e-9, min(now.seconds, then.seconds))

    # The search.

    def _begin(self) -> None:
        self._settled, self._search, self._searched = False, [], 0
        self._bounds, self._begun_at, self._held, self._doubts = (0.0, 1.0), self.share, 0, []
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
        self._rates = self._rates.learned(self._search)
        target = self._next(now, grain) if self._searched < SEARCH else None
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
        target = self._promising(self._rates, now, grain)
        if target is None and self._rates.alone is None:
            target = self._promising(self._rates.hoped(self._search), now, grain)
        if target is None and not now.remote_tokens and self._silent(remote=True):
            target = self._free(1 - grain, grain)
        if target is None and not now.local_tokens and self._silent(remote=False):
            target = self._free(grain, grain)
        return target

    def _promising(self, rates: Rates, now: Batch, grain: float) -> float | None:
        """Of the places that were not measured, the one with the shortest step by all that is known of the tiers."""
        if rates.local is None or rates.remote is None:
            return None
        places = [at / now.sequences for at in range(now.sequences + 1)]
        places = [place for place in places if self._free(place, grain) == place]
        chosen = min(places, key=lambda share: rates.attention(share, now.tokens), default=None)
        if chosen is None:
            return None
        rest = now.seconds - (now.answered if now.remote_tokens else now.local_seconds)  # of a step, besides attention
        best = min(point.seconds for point in self._search)
        return chosen if rest + rates.attention(chosen, now.tokens) < (1 - GAIN) * best else None

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
        self._reference, self._doubts = best, []
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
