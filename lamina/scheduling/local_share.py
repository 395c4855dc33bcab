"""How much of the KV is kept in the local pool, and how much at attention workers, decided by measured times. Pure.

Two tiers attend at once: the local pool, and attention workers, which take a round trip for each layer besides. A model
of both tiers, from measured times, says at which share they would end a step together. The measured times of whole
steps there decide, because tiers that share cores or memory slow each other down in ways that the model lacks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

logger = logging.getLogger("lamina")

WINDOW = 5  # batches of one measurement, besides the first after a change
GAIN = 0.01  # of a step, by which a remote share must be faster than none
HOPE = 1.7  # how many times faster the remote tier is assumed to be alone, until it is measured
SPREAD = 1.9  # how many times more tokens one measurement must have than another to tell a call from its tokens
SEARCH = 36  # batches without moves, after which a search ends with the best share so far
DRIFT = 0.08  # of a step, by which a tier's time must change before a new search
SURE = 4  # batches in a row with such a change; by then most of a window is from after the change
PERSISTENT = 3  # times DRIFT, which they must sum up to; doubled by each search that ends where it began
LONGEST_DOUBT = 96  # times DRIFT, at most
CHANGE = 1.5  # of the number of sequences or of their tokens, after which a new search begins
PROBE_COST = 0.01  # of the time, at most, for probes of a tier that does nothing
FEWEST_BETWEEN = 150  # batches between two such probes


def prefers_local(local: int, total: int, tokens: int, share: float) -> bool:
    """Whether a sequence of `tokens` tokens should be local so that `share` of all is; `local` of `total` are now."""
    return share > 0 and local + tokens / 2 <= share * (total + tokens)


def to_move(candidates: Sequence[int], off: float, most: int) -> list[int]:
    """Which sequences, given as numbers of tokens, should change their tier so that about `off` tokens do: at most
    `most` indices. A sequence that brings the sum hardly closer is not moved."""
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
    """One decode batch, which read `local_tokens` and `remote_tokens` of KV. The local pool attended for
    `local_seconds`, the slowest remote holder for `remote_seconds` by its own clock. `answered` seconds passed until
    its answers were read, the last `waited` of them without other work. The step took `seconds`, for `sequences`
    sequences in all `lanes` together. `fused`: as `OrderTuner` says."""

    local_tokens: int
    remote_tokens: int
    local_seconds: float
    remote_seconds: float
    answered: float
    waited: float
    seconds: float
    sequences: int
    lanes: int = 1
    fused: bool = True

    @property
    def tokens(self) -> int:
        return self.local_tokens + self.remote_tokens

    @property
    def share(self) -> float:
        return self.local_tokens / max(1, self.tokens)


_TOKENS = ("local_tokens", "remote_tokens")
_SECONDS = ("local_seconds", "remote_seconds", "answered", "waited", "seconds")


def whole_step(parts: Sequence[Batch]) -> Batch:
    """One batch for all lanes together: the sum of their batches."""
    summed: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in (*_TOKENS, *_SECONDS)}
    return parts[-1]._replace(**summed)


@dataclass(frozen=True, slots=True)
class Alone:
    """What the remote tier took for `tokens` of KV without the local one: `seconds` by its own clock, and `fixed` more
    until its answers came. `beside`: what it would have taken beside the local tier; None where that is unknown."""

    tokens: int
    seconds: float
    fixed: float
    beside: float | None = None

    @property
    def slower(self) -> float:
        """How many times slower it is beside the local tier."""
        return self.beside / self.seconds if self.beside and self.seconds else 1.0


@dataclass(frozen=True, slots=True)
class Rates:
    """What the tiers take beside each other: `local` and `remote` seconds for a token of KV (None: unknown). The remote
    tier takes `call` seconds a step besides, for any number of tokens, and `fixed` more to be asked and to answer.
    Alone the local tier takes `local_alone` times its seconds; `alone` is a measurement of the remote tier (None: not
    yet)."""

    local: float | None = None
    remote: float | None = None
    call: float = 0.0
    fixed: float = 0.0
    local_alone: float = 1.0
    alone: Alone | None = None

    def attention(self, share: float, tokens: int) -> float:
        """Seconds of a step until both tiers have attended; unknown ones are 0."""
        local = (self.local or 0.0) * share * tokens
        if share == 1:
            return self.local_alone * local
        if share == 0 and self.alone:
            return self._alone(self.alone, tokens)
        return max(local, self.fixed + self._beside_local((1 - share) * tokens))

    def hoped(self, points: Sequence[Batch]) -> Rates:
        """The best case while the remote tier was not measured alone. Alone it is faster, and its answers come at most
        as late as they were waited for beside the local tier, which may have kept the cores from the transport. Where
        the measurements do not tell a call from its tokens, its whole time may be the call."""
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
        """As it was measured, or less where it is faster beside the local tier now. Where it is slower there, the local
        tier may be the cause."""
        of_then = tokens / seen.tokens
        faster = min(1.0, self._beside_local(tokens) / (seen.beside * of_then)) if seen.beside else 1.0
        return seen.fixed + seen.seconds * of_then * faster

    def learned(self, points: Sequence[Batch]) -> Rates:
        """Updated with these measurements, the latest last."""
        rates = self
        both = [point for point in points if point.local_tokens and point.remote_tokens]
        if both:
            rates = rates._beside(both)
        for point in points:
            if not point.remote_tokens:
                rates = rates._local_alone(point, known=bool(both))
            elif not point.local_tokens:
                rates = rates._remote_alone(point, known=bool(both))
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
        if last.waited <= 0.05 * last.answered:  # without a wait it is unknown when the answer came
            fixed = min(self.fixed, fixed)
        local = sum(point.local_seconds for point in points) / sum(point.local_tokens for point in points)
        return replace(
            self, local=local, remote=(last.remote_seconds - call) / last.remote_tokens, call=call, fixed=fixed
        )

    def _local_alone(self, alone: Batch, known: bool) -> Rates:
        """`known`: its time beside the remote tier is measured, so that this one is its time alone."""
        seconds = alone.local_seconds / alone.local_tokens
        if known and self.local and seconds:
            return replace(self, local_alone=seconds / self.local)
        return replace(self, local=seconds / self.local_alone)

    def _remote_alone(self, alone: Batch, known: bool) -> Rates:
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
    """`share` is the wanted local share of the KV tokens that decode reads. A given number is kept; None begins with
    everything local, and searches for the shortest steps."""

    def __init__(self, share: float | None = None) -> None:
        self.share = 1.0 if share is None else share
        self._auto = share is None
        self._settled = False
        self._window: deque[Batch] = deque(maxlen=WINDOW)
        self._fresh = True  # the next batch is the first after a change
        self._rates = Rates()
        self._search: list[Batch] = []  # the medians at each share
        self._searched = 0  # batches of this search in which nothing moved
        self._bounds = (0.0, 1.0)  # the shares that can be reached: holders may be full
        self._reference: Batch | None = None  # the measurement of the present choice
        self._begun_at = 1.0  # the share before the search
        self._doubts: list[float] = []  # drifts of batches in a row, in multiples of DRIFT
        self._persistent = PERSISTENT
        self._held = 0
        self._spent = 0.0  # seconds that this search has cost
        self._base = 0.0  # seconds of a batch without a search
        self._pause = FEWEST_BETWEEN  # batches until a tier that does nothing is probed again

    @property
    def settled(self) -> bool:
        """Whether nothing is being tried."""
        return self._settled or not self._auto

    def reset(self) -> None:
        """Holders have come or gone: forget what was measured."""
        if self._auto:
            self._begin()
            self._rates, self._pause = Rates(), FEWEST_BETWEEN

    def interrupted(self) -> None:
        """Other work ran since the last decode batch: neither it nor the next batch is measured."""
        self._window.clear()
        self._fresh = True

    def completed(self, batch: Batch, moving: bool = False) -> None:
        """A decode batch is over. While sequences are moving it only counts as a cost of the search."""
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
        if reference is None or (reference.lanes, reference.fused) != (now.lanes, now.fused):
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
        """Whether the load has changed so much that the choice is void."""
        pairs = ((now.sequences, then.sequences), (now.tokens, then.tokens))
        return any(max(pair) > CHANGE * min(pair) for pair in pairs)

    def _drift(self, now: Batch, then: Batch) -> float:
        """By which part of a step a tier's time for the same work has changed."""
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
        """The present share is measured: try the next one, or settle."""
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
        """The share to try next; None where none promises a shorter step."""
        target = self._promising(self._rates, now, grain)
        if target is None and self._rates.alone is None:
            target = self._promising(self._rates.hoped(self._search), now, grain)
        if target is None and not now.remote_tokens and self._silent(remote=True):
            target = self._free(1 - grain, grain)
        if target is None and not now.local_tokens and self._silent(remote=False):
            target = self._free(grain, grain)
        return target

    def _promising(self, rates: Rates, now: Batch, grain: float) -> float | None:
        """The share with the shortest step by these rates, of those not measured yet. None where it is no gain."""
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
        """Whether no measurement of this search has that tier."""
        return not any(point.remote_tokens if remote else point.local_tokens for point in self._search)

    def _free(self, share: float, grain: float) -> float | None:
        """That share within the bounds, unless it was measured in this search."""
        low, high = self._bounds
        share = min(high, max(low, share))
        return None if any(_near(point.share, share, grain) for point in self._search) else share

    def _settle(self, now: Batch) -> None:
        best = min(self._search, key=lambda point: point.seconds)
        most = max(self._search, key=lambda point: point.share)
        if not most.remote_tokens and most.seconds <= (1 + GAIN) * best.seconds:
            best = most  # all local where a remote share does not pay
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


def _median(batches: Sequence[Batch]) -> Batch:
    """The last batch, with the median of each of its times."""
    medians: dict[str, Any] = {name: median(getattr(batch, name) for batch in batches) for name in _SECONDS}
    return batches[-1]._replace(**medians)
