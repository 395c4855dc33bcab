"""How decode runs, decided by measured steps: how many lanes, how much of the KV is local, which order q, k and v have.

The three depend on each other: lanes hide attention workers behind the model, a local share hides them behind the local
pool. So one search tries all: the choice of which `StepModel` expects the shortest step is measured next, while one
promises more than the best so far. Then the best measured one holds until the load or a tier's speed has changed. Pure.

How long a decode step takes, for any lanes, local share and order of q, k and v, by measured steps. Pure.

Two tiers attend at once: the local pool, and attention workers, which take a round trip for each layer besides. While a
batch waits for attention workers, a batch in another lane computes. What was not measured is assumed at its best, so
that it is tried; tiers that share cores or memory slow each other down in ways that the model lacks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple

HOPE = 1.7  # how many times faster the remote tier is assumed to be alone, until it is measured
HIDDEN = 0.1  # of the dense layers' time, which q first is assumed to hide, until it is measured
SPREAD = 1.9  # how many times more tokens one measurement must have than another to tell a call from its tokens


class Batch(NamedTuple):
    """One decode batch, or those of all `lanes` together. It read `local_tokens` and `remote_tokens` of KV. The local
    pool attended for `local_seconds`, the slowest remote holder for `remote_seconds` by its own clock. `answered`
    seconds passed until its answers were read, the last `waited` of them without other work. `seconds` passed since the
    batch before, and it gave `sampled` tokens; `sequences` are running in all lanes together. `fused`: q, k and v went
    together."""

    lanes: int
    fused: bool
    local_tokens: float
    remote_tokens: float
    local_seconds: float
    remote_seconds: float
    answered: float
    waited: float
    seconds: float
    sampled: float
    sequences: int

    @property
    def tokens(self) -> float:
        return self.local_tokens + self.remote_tokens

    @property
    def share(self) -> float:
        return self.local_tokens / max(1, self.tokens)


_SUMMED = (
    "local_tokens", "remote_tokens", "local_seconds", "remote_seconds", "answered", "waited", "seconds", "sampled",
)  # fmt: skip


def whole_step(parts: Sequence[Batch]) -> Batch:
    """The batches of a step as one, in which each running sequence gets a token."""
    summed: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _SUMMED}
    part = parts[-1]._replace(**summed)
    scale = part.sequences / max(1, part.sampled)
    return part._replace(**{name: scale * getattr(part, name) for name in _SUMMED})


class Choice(NamedTuple):
    """How decode runs: batches under way at a time, the local share of the KV that they read, and whether q, k and v of
    a layer go together or q first."""

    lanes: int
    share: float
    fused: bool


@dataclass(frozen=True, slots=True)
class Alone:
    """What the remote tier took for `tokens` of KV without the local one: `seconds` by its own clock, and `fixed` more
    until its answers came. `beside`: what it would have taken beside the local tier; None where that is unknown."""

    tokens: float
    seconds: float
    fixed: float
    beside: float | None = None

    @property
    def slower(self) -> float:
        """How many times slower it is beside the local tier."""
        return self.beside / self.seconds if self.beside and self.seconds else 1.0


@dataclass(frozen=True, slots=True)
class StepModel:
    """What the tiers take beside each other: `local` and `remote` seconds for a token of KV (None: unknown). The remote
    tier takes `call` seconds a batch besides, for any number of tokens, and `fixed` more to be asked and to answer.
    Alone the local tier takes `local_alone` times its seconds; `alone` is a measurement of the remote tier (None: not
    yet). `dense` has by lanes and order the seconds of a step besides attention. `replicas` of the model compute."""

    replicas: int = 1
    local: float | None = None
    remote: float | None = None
    call: float = 0.0
    fixed: float = 0.0
    local_alone: float = 1.0
    alone: Alone | None = None
    dense: Mapping[tuple[int, bool], float] = field(default_factory=dict)

    def seconds(self, choice: Choice, tokens: float) -> float:
        """Of a step that reads so many tokens of KV; what is unknown takes none. In it model workers are never idle,
        or the remote tier is not, or a batch waits for answers."""
        lanes, share, fused = choice
        dense = self._dense(lanes, fused)
        local = (self.local or 0.0) * share * tokens
        if share == 1:
            return dense + self.local_alone * local
        remote, fixed = self._beside_local((1 - share) * tokens), self.fixed
        if share == 0 and self.alone:
            remote, fixed = self._alone(self.alone, tokens)
        batch = dense / lanes + max(local / lanes, fixed + remote / lanes)
        return max((dense + local) / self.replicas, remote, batch)

    def _dense(self, lanes: int, fused: bool) -> float:
        """As measured; else the least that what was measured allows: weights are read once a lane."""
        if (lanes, fused) in self.dense:
            return self.dense[lanes, fused]
        if (lanes, not fused) in self.dense:
            return (1 - HIDDEN) * self.dense[lanes, not fused]
        fewer = [(at, order == fused, seconds) for (at, order), seconds in self.dense.items() if at < lanes]
        if fewer:
            return max(fewer)[2]
        return min((seconds * lanes / at for (at, _), seconds in self.dense.items()), default=0.0)

    def hoped(self, points: Sequence[Batch]) -> StepModel:
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

    def _alone(self, seen: Alone, tokens: float) -> tuple[float, float]:
        """As it was measured, or less where it is faster beside the local tier now. Where it is slower there, the local
        tier may be the cause."""
        of_then = tokens / seen.tokens
        faster = min(1.0, self._beside_local(tokens) / (seen.beside * of_then)) if seen.beside else 1.0
        return seen.seconds * of_then * faster, seen.fixed

    def learned(self, points: Sequence[Batch]) -> StepModel:
        """Updated with these measurements, the latest last."""
        model = self
        both = [point for point in points if point.local_tokens and point.remote_tokens]
        if both:
            model = model._beside(both)
        for point in points:
            if not point.remote_tokens:
                model = model._local_alone(point, known=bool(both))
            elif not point.local_tokens:
                model = model._remote_alone(point, known=bool(both))
            model = model._dense_of(point)
        return model

    def _dense_of(self, point: Batch) -> StepModel:
        """With the dense time that explains a measured step."""
        lanes, local, remote = point.lanes, point.local_seconds, point.remote_seconds
        if lanes == 1 or not point.remote_tokens:
            rest = point.seconds - max(local, point.answered)
        else:
            batch = lanes * point.seconds - max(local, lanes * self.fixed + remote)
            rest = max(0.0, min(self.replicas * point.seconds - local, batch))
            if remote > (1 - HIDDEN) * point.seconds:  # the remote tier is never idle: the rest may take less
                if not self.dense:
                    return self
                rest = min(rest, self._dense(lanes, point.fused))
        return replace(self, dense={**self.dense, (lanes, point.fused): rest})

    def _beside(self, points: Sequence[Batch]) -> StepModel:
        last = points[-1]
        few, many = (pick(points, key=lambda point: point.remote_tokens) for pick in (min, max))
        call = self.call
        if many.remote_tokens >= SPREAD * few.remote_tokens:
            slope = (many.remote_seconds - few.remote_seconds) / (many.remote_tokens - few.remote_tokens)
            call = max(0.0, few.remote_seconds - max(0.0, slope) * few.remote_tokens)
        call = min(call, last.remote_seconds)
        fixed = self.fixed
        if last.lanes == 1:  # else others may have run before the answer was read
            fixed = max(0.0, last.answered - last.remote_seconds)
            if last.waited <= 0.05 * last.answered:  # without a wait it is unknown when the answer came
                fixed = min(self.fixed, fixed)
        local = sum(point.local_seconds for point in points) / sum(point.local_tokens for point in points)
        return replace(
            self, local=local, remote=(last.remote_seconds - call) / last.remote_tokens, call=call, fixed=fixed
        )

    def _local_alone(self, alone: Batch, known: bool) -> StepModel:
        """`known`: its time beside the remote tier is measured, so that this one is its time alone."""
        seconds = alone.local_seconds / alone.local_tokens
        if known and self.local and seconds:
            return replace(self, local_alone=seconds / self.local)
        return replace(self, local=seconds / self.local_alone)

    def _remote_alone(self, alone: Batch, known: bool) -> StepModel:
        tokens, seconds = alone.remote_tokens, alone.remote_seconds
        if alone.lanes > 1:  # beside the model, and it is unknown when answers came
            call = min(self.call, seconds)
            return self if known else replace(self, remote=(seconds - call) / tokens, call=call)
        fixed = max(0.0, alone.answered - seconds)
        if known:
            return replace(self, alone=Alone(tokens, seconds, fixed, self._beside_local(tokens)))
        slower = self.alone.slower if self.alone else 1.0
        beside = seconds * slower
        call = min(self.call, beside)
        seen = Alone(tokens, seconds, fixed, beside)
        return replace(self, remote=(beside - call) / tokens, call=call, fixed=fixed * slower, alone=seen)


logger = logging.getLogger("lamina")

WINDOW = 5  # steps of one measurement, besides those after a change
GAIN = 0.01  # of a step, that another choice must promise to be tried, and yield to be kept though it is less simple
SEARCH = 8  # measurements, after which a search ends with the best choice so far
DRIFT = 0.08  # of a step, by which a tier's time must change before a new search
SURE = 4  # steps in a row with such a change; by then most of a window is from after the change
PERSISTENT = 3  # times DRIFT, which they must sum up to
FEW = 3  # batches beside moves in a search, with which moving once more costs little
CHANGE = 1.5  # of the number of sequences or of their tokens, after which a new search begins
COST = 0.01  # of the time, which searches may cost
WORTH = 50  # steps, within which what a choice promises must outweigh what searches have cost beyond that
PAUSE = 300  # steps between two of them, at least
PATIENCE = 32  # times PERSISTENT and PAUSE, at most: each search that ends where it began doubles both


class StepTuner:
    """`lanes`, `share` and `fused` are the present choice, as in `Choice`. Given are the values that they may have:
    numbers of lanes in ascending order, one share or None for any, and orders; one value stays as it is. `replicas` of
    the model compute."""

    def __init__(
        self,
        lanes: Sequence[int] = (1,),
        share: float | None = None,
        orders: Sequence[bool] = (True,),
        replicas: int = 1,
    ) -> None:
        self.lanes = lanes[0]
        self.share = 1.0 if share is None else share
        self.fused = orders[0]
        self._all_lanes, self._orders, self._any_share = tuple(lanes), tuple(orders), share is None
        self._model = self._unmeasured = StepModel(replicas)
        self._skip = 1  # batches that are not measured, because they began before a change
        self._parts: list[Batch] = []  # the batches so far of a step of all lanes
        self._window: deque[Batch] = deque(maxlen=WINDOW)
        self._search: list[Batch] = []  # the medians at each choice
        self._searched = 0  # measurements of this search
        self._bounds = (0.0, 1.0)  # the shares that can be reached: holders may be full
        self._moves = 0  # batches in which sequences moved, in this search
        self._confirms = False  # whether the choice at which this search began is measured a second time
        self._reference: Batch | None = None  # the measurement of the present choice; None while others are tried
        self._begun_at = self.choice  # before the search
        self._doubts: list[float] = []  # drifts of steps in a row, in multiples of DRIFT
        self._patience = 1
        self._held = 0  # steps of the present choice, since it was settled
        self._debt = 0.0  # seconds that searches have cost beyond COST of the time
        self._base = 0.0  # seconds a token without a search
        self._paid = True  # whether this search is bounded by patience; else by the debt
        self.reason = ""  # where KV is read and why, in a line for people; empty until both tiers were tried

    @property
    def choice(self) -> Choice:
        """The present choice."""
        return Choice(self.lanes, self.share, self.fused)

    @property
    def settled(self) -> bool:
        """Whether nothing is being tried."""
        return self._reference is not None or not self._chooses

    @property
    def _chooses(self) -> bool:
        return self._any_share or len(self._all_lanes) * len(self._orders) > 1

    def reset(self) -> None:
        """Holders have come or gone: forget what was measured."""
        if self._chooses:
            self._begin()
            self._model, self._patience = self._unmeasured, 1
            self._debt, self._base, self._paid = 0.0, 0.0, True

    def interrupted(self) -> None:
        """Other work ran since the last decode batch: neither it nor the next batch is measured."""
        self._parts.clear()
        self._window.clear()
        self._skip = max(1, self._skip)

    def completed(self, batch: Batch, moving: bool = False) -> None:
        """A decode batch is over. While sequences are moving it only counts as a cost of the search."""
        if not self._chooses or not batch.tokens:
            return
        if self._base and not (self._reference and self._held):  # on the way back, too
            self._debt += batch.seconds - self._base * batch.sampled
        self._debt = max(0.0, self._debt - COST * batch.seconds)
        if moving:
            self._moves += 1
            self.interrupted()
            return
        if self._skip:
            self._skip -= 1
            return
        self._parts.append(batch)
        if len(self._parts) < self.lanes:
            return
        self._window.append(whole_step(self._parts))
        self._parts.clear()
        if len(self._window) == WINDOW:
            now = _median(self._window)
            if self._reference is None:
                self._measured(now)
            else:
                self._hold(now, self._reference)

    # While a choice holds.

    def _hold(self, now: Batch, reference: Batch) -> None:
        self._held += 1
        if self._unlike(now, reference):
            self._begin()
            self._base, self._paid = 0.0, False
            return
        drift = self._drift(now, reference)
        self._doubts = [*self._doubts, drift / DRIFT] if drift > DRIFT else []
        doubted = len(self._doubts) >= SURE and sum(self._doubts) >= self._patience * PERSISTENT
        if doubted or (self._held >= self._patience * PAUSE and not self._debt):
            if not doubted:
                self._model = replace(self._model, dense={})  # so that other lanes and orders are tried again
            self._base, self._paid = now.seconds / now.sequences, True
            self._begin()
            self._measured(now)

    def _unlike(self, now: Batch, then: Batch) -> bool:
        """Whether the load has changed so much that the choice is void."""
        pairs = ((now.sequences, then.sequences), (now.tokens, then.tokens))
        return any(max(pair) > CHANGE * min(pair) for pair in pairs)

    def _drift(self, now: Batch, then: Batch) -> float:
        """By which part of a step a tier's time for the same work has changed."""
        off = abs(now.waited - then.waited) if now.lanes == 1 else 0.0  # else other batches ran meanwhile
        if now.local_tokens and then.local_tokens:
            before = then.local_seconds / then.local_tokens
            off = max(off, abs(now.local_seconds / now.local_tokens - before) * now.local_tokens)
        if now.remote_tokens and then.remote_tokens:
            before = then.remote_seconds / then.remote_tokens
            off = max(off, abs(now.remote_seconds / now.remote_tokens - before) * now.remote_tokens)
        return off / max(1e-9, min(now.seconds, then.seconds))

    # The search.

    def _begin(self) -> None:
        self._reference, self._search, self._searched = None, [], 0
        self._moves, self._confirms = 0, False
        self._bounds, self._begun_at, self._held, self._doubts = (0.0, 1.0), self.choice, 0, []
        self.interrupted()

    def _measured(self, now: Batch) -> None:
        """The present choice is measured: try the next one, or settle."""
        if self._search and self._unlike_points(now):
            self._search.clear()
        self._searched += 1
        grain = 1 / now.sequences
        low, high = self._bounds
        if now.share < self.share - 0.75 * grain:  # there is no room for more
            high = now.share
        elif now.share > self.share + 0.75 * grain:
            low = now.share
        self._bounds = min(low, high), max(low, high)
        self._search = [
            point for point in self._search if not self._same(point, Choice(now.lanes, now.share, now.fused))
        ]
        self._search.append(now)
        self._base = self._base or now.seconds / now.sequences
        self._model = self._model.learned(self._search)
        target = self._next(now, grain) if self._searched < SEARCH and not self._confirms else None
        if target is None:
            self._settle(now)
        else:
            self._go(target)

    def _go(self, to: Choice) -> None:
        if to != self.choice:
            self._skip = self.lanes + to.lanes - 1
        self.lanes, self.share, self.fused = to
        self.interrupted()

    def _unlike_points(self, now: Batch) -> bool:
        first = self._search[0]
        return self._unlike(now, first) or abs(now.sequences - first.sequences) > 0.25 * first.sequences

    def _next(self, now: Batch, grain: float) -> Choice | None:
        """The choice to try next; None where none promises a shorter step. A search leaves its first choice for the
        attention workers where that is worth what searches have cost so far: so tries are never a large part of the
        time, however wrongly the model promises."""
        free = [choice for choice in self._choices(now) if not any(self._same(point, choice) for point in self._search)]
        model = self._model
        target = self._promising(model, free, now)
        if target is None and model.alone is None:
            model = model.hoped(self._search)
            target = self._promising(model, free, now)
        for unseen, share in (("remote_tokens", 1 - grain), ("local_tokens", grain)):
            if target is None and self._any_share and not any(getattr(point, unseen) for point in self._search):
                target = next((choice for choice in free if abs(choice.share - share) < 0.5 * grain), None)
        if target is not None and target.share < 1 and len(self._search) == 1 and not self._paid:
            promised = max(0.0, now.seconds - model.seconds(target, now.tokens))
            return target if self._debt <= WORTH * promised else None
        return target

    def _choices(self, now: Batch) -> Iterator[Choice]:
        """All that can be reached with the present load. Where all is local, nothing waits for an attention worker. One
        lane more than was measured is tried at a time."""
        low, high = self._bounds
        shares = [at / now.sequences for at in range(now.sequences + 1)] if self._any_share else [self.share]
        most = min(now.sequences, 1 + max((lanes for lanes, _ in self._model.dense), default=0))
        for share in shares:
            if low <= share <= high or not self._any_share:
                for lanes in self._all_lanes:
                    if lanes == self._all_lanes[0] or (lanes <= most and share < 1):
                        yield from (Choice(lanes, share, fused) for fused in self._orders[: 1 if share == 1 else None])

    def _promising(self, model: StepModel, free: Sequence[Choice], now: Batch) -> Choice | None:
        """The choice with the shortest step by this model. None where it is no gain."""
        if model.remote is None or (model.local is None and self._any_share):
            return None
        chosen = min(free, key=lambda choice: model.seconds(choice, now.tokens), default=None)
        best = min(point.seconds for point in self._search)
        gains = chosen is not None and model.seconds(chosen, now.tokens) < (1 - GAIN) * best
        return chosen if gains else None

    def _same(self, point: Batch, choice: Choice) -> bool:
        """Whether it was measured at that choice, as far as whole sequences allow."""
        near = abs(point.share - choice.share) < 0.5 / point.sequences or not self._any_share
        return near and (point.lanes, point.fused) == (choice.lanes, choice.fused)

    def _settle(self, now: Batch) -> None:
        least = min(point.seconds for point in self._search)
        equal = [point for point in self._search if point.seconds <= (1 + GAIN) * least]
        best = min(equal, key=lambda point: (point.remote_tokens > 0, point.lanes, not point.fused, point.seconds))
        choice = Choice(
            best.lanes, (best.share if best.local_tokens else 0.0) if self._any_share else self.share, best.fused
        )
        if self._any_share and not best.remote_tokens:  # also where more was wanted, but could not move
            choice = Choice(self._all_lanes[0], 1.0, self._orders[0])
        if self._leaves(choice):
            self._confirms = True
            self._go(self._begun_at)
            return
        self._go(choice)
        again = self._same(best, self._begun_at)
        self._patience = min(PATIENCE, 2 * self._patience) if again else 1
        self._reference, self._base = best, best.seconds / best.sequences
        logger.info("%s", self._said(now))
        if self._any_share:
            self.reason = self._why(best) or self.reason

    def _leaves(self, choice: Choice) -> bool:
        """Whether all KV was local, is not to be, and was measured once: other work of the machine may have slowed just
        that. So it is measured again, where moving there takes few steps."""
        local = self._any_share and self._begun_at.share == 1
        return local and choice.share < 1 and not self._confirms and self._moves <= FEW

    def _why(self, best: Batch) -> str:
        """Empty where this search has tried one tier alone."""
        here = min((point.seconds for point in self._search if not point.remote_tokens), default=None)
        away = min((point.seconds for point in self._search if point.remote_tokens), default=None)
        if here is None or away is None:
            return ""
        workers, own = f"{away * 1e3:.1f} ms", f"{here * 1e3:.1f} ms"
        if not best.remote_tokens:
            return f"decode: KV is read in this process ({own} a step; with the attention workers {workers})"
        if not best.local_tokens:
            return f"decode: KV is read by the attention workers ({workers} a step; in this process {own})"
        return (
            f"decode: {best.share:.0%} of the KV is read in this process, the rest by the attention workers "
            f"({workers} a step; all in this process {own})"
        )

    def _said(self, now: Batch) -> str:
        model = self._model
        known = [f"local {model.local * 1e6:.3g}"] if model.local is not None else []
        if model.remote is not None:
            known.append(f"remote {model.remote * 1e6:.3g} and {model.fixed * 1e3:.2g} ms a step")
        steps = ", ".join(
            f"{p.lanes} x {p.share:.2f}{'' if p.fused else ' q first'}: {p.seconds * 1e3:.2f}" for p in self._search
        )
        return (
            f"decode runs in {self.lanes} lanes, reads {self.share:.0%} of the KV locally, and sends "
            f"{'q, k and v together' if self.fused else 'q first'}, for {now.sequences} sequences of {now.tokens:.0f} "
            f"tokens; us a token measured: {', '.join(known)}; ms a step measured by lanes x share: {steps}"
        )


def _median(steps: Sequence[Batch]) -> Batch:
    """The steps as one, with the median of each of its times. Lanes may overtake each other, so one of these steps may
    lack the lane that has all remote sequences: then the mean is what is known."""
    whole = whole_step(steps)
    names = ("local_seconds", "remote_seconds", "answered", "waited", "seconds")
    medians = {name: median(getattr(step, name) for step in steps) or getattr(whole, name) for name in names}
    return whole._replace(**medians)
