"""How decode runs, decided by measured steps: how many lanes, how much of the KV is local, which order q, k and v have.

The three depend on each other: lanes hide attention workers behind the model, a local share hides them behind the local
pool. So one search tries all of them. `StepModel` expects how long a step takes at each choice, from what was measured.
The choice of the shortest expected step is measured next, until none promises more than the best so far. That one holds
until the load or the speed of a tier has changed. Pure.

                    the load changed, a tier drifted, or the pause is over
       +---------+ -------------------------------------------------------> +--------+ --+ another choice promises
       | settled |                                                          | search |   | a shorter step
       +---------+ <------------------------------------------------------- +--------+ <-+
            ^                        no choice promises more                    |
            |                                                                   | all KV was local, and is to leave
            |    the first choice was measured again     +---------+            |
            +------------------------------------------- | confirm | <----------+
                                                         +---------+

Two tiers attend at once: the local pool, and attention workers, which take a round trip for each layer besides. While a
batch waits for attention workers, a batch in another lane computes. What was not measured is assumed at its best, so
that it is tried. Tiers that share cores or memory slow each other down in ways that the model lacks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple

logger = logging.getLogger("lamina")

# Measurements.
WINDOW_STEPS = 5
"""Steps of one measurement, besides those after a change."""
MIN_GAIN = 0.01
"""A part of a step. A choice must promise so much to be tried, and give it to be kept though it is less simple."""

# When a search begins.
LOAD_CHANGE = 1.5
"""A search begins once the number of sequences, or of their tokens, has changed by this factor."""
MIN_DRIFT = 0.08
"""A part of a step. A tier's time must change by more than that before it counts as drift."""
DRIFT_STEPS = 4
"""Steps in a row with drift before a search begins. By then most of a window is from after the change."""
DRIFT_SUM = 3
"""Multiples of MIN_DRIFT that the drift of these steps must sum up to."""
STEPS_BETWEEN_SEARCHES = 300
"""Steps from one search to the next without drift, at least."""
MAX_PATIENCE = 32
"""The highest factor of DRIFT_SUM and STEPS_BETWEEN_SEARCHES. A search that ends where it began doubles the factor."""

# What a search may cost.
MAX_MEASUREMENTS = 8
"""Measurements after which a search ends with the best choice so far."""
MAX_MOVES_IN_A_SEARCH = 3
"""Batches during moves of KV in one search. With so few, moving the KV once more costs little."""
COST_SHARE = 0.01
"""The part of the time that searches may cost."""
PAYBACK_STEPS = 50
"""Steps within which a promised gain must outweigh what searches have cost beyond COST_SHARE."""

# What the model assumes until it is measured.
REMOTE_SPEEDUP = 1.7
"""How many times faster the remote tier is alone than beside the local one."""
HIDDEN_DENSE = 0.1
"""The part of the dense layers' time that q first hides."""
MIN_TOKEN_RATIO = 1.9
"""One measurement must have so many times more tokens than another to tell a call's time from that of its tokens."""


class DecodeChoice(NamedTuple):
    """How decode runs: batches under way at a time, the local share of the KV that they read, and whether q, k and v of
    a layer go together or q first."""

    lanes: int
    share: float
    fused: bool


class MeasuredBatch(NamedTuple):
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


@dataclass(slots=True)
class _Search:
    """A search that began at the choice `origin`."""

    origin: DecodeChoice
    scheduled: bool = True
    """Whether the patience bounds how often such searches come. Else the load changed, and the debt bounds them."""
    points: list[MeasuredBatch] = field(default_factory=list)
    """The medians that were measured, one for each choice."""
    measurements: int = 0
    shares: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest local share that can be reached: holders may be full."""
    moves: int = 0
    """Batches in which sequences moved."""
    confirms: bool = False
    """Whether `origin` is being measured a second time."""


@dataclass(slots=True)
class _Settled:
    """The present choice holds, since `reference` was measured there."""

    reference: MeasuredBatch
    steps: int = 0
    drifts: list[float] = field(default_factory=list)
    """Those of the last steps in a row, in multiples of MIN_DRIFT."""


class StepTuner:
    """`lanes`, `share` and `fused` are the present choice, as in `DecodeChoice`. The arguments are the values that they
    may have: numbers of lanes in ascending order, one share or None for any, and orders. With one value there is no
    choice. `replicas` of the model compute."""

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
        self.reason = ""  # where KV is read and why, in a line for people; empty until both tiers were tried
        self._all_lanes, self._orders, self._any_share = tuple(lanes), tuple(orders), share is None
        self._model = self._unmeasured = StepModel(replicas)
        self._search = _Search(self.choice)  # the present one, or the last
        self._settled: _Settled | None = None  # None: a search is under way
        self._skip = 1  # batches that are not measured, because they began before a change
        self._parts: list[MeasuredBatch] = []  # the batches so far of a step of all lanes
        self._window: deque[MeasuredBatch] = deque(maxlen=WINDOW_STEPS)
        self._patience = 1
        self._debt = 0.0  # seconds that searches have cost beyond COST_SHARE of the time
        self._token_seconds = 0.0  # what a token takes without a search

    @property
    def choice(self) -> DecodeChoice:
        return DecodeChoice(self.lanes, self.share, self.fused)

    @property
    def settled(self) -> bool:
        return self._settled is not None or not self._chooses

    @property
    def _chooses(self) -> bool:
        return self._any_share or len(self._all_lanes) * len(self._orders) > 1

    def reset(self) -> None:
        """Holders have come or gone: forget what was measured."""
        if self._chooses:
            self._begin(scheduled=True)
            self._model, self._patience = self._unmeasured, 1
            self._debt = self._token_seconds = 0.0

    def interrupted(self) -> None:
        """Other work ran since the last decode batch: neither it nor the next batch is measured."""
        self._parts.clear()
        self._window.clear()
        self._skip = max(1, self._skip)

    def completed(self, batch: MeasuredBatch, moving: bool = False) -> None:
        """A decode batch is over. While sequences are moving it only counts as a cost of the search."""
        if not self._chooses or not batch.tokens:
            return
        if self._token_seconds and not (self._settled and self._settled.steps):  # on the way back, too
            self._debt += batch.seconds - self._token_seconds * batch.sampled
        self._debt = max(0.0, self._debt - COST_SHARE * batch.seconds)
        if moving:
            self._search.moves += 1
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
        if len(self._window) == WINDOW_STEPS:
            now = _median(self._window)
            if self._settled is None:
                self._measured(now)
            else:
                self._check(now, self._settled)

    # Settled: the present choice holds.

    def _check(self, now: MeasuredBatch, settled: _Settled) -> None:
        """Begin a search where the present choice may not be the best any more."""
        settled.steps += 1
        if _load_changed(now, settled.reference):
            self._begin(scheduled=False)
            self._token_seconds = 0.0
            return
        drift = _drift(now, settled.reference)
        settled.drifts = [*settled.drifts, drift / MIN_DRIFT] if drift > MIN_DRIFT else []
        drifted = len(settled.drifts) >= DRIFT_STEPS and sum(settled.drifts) >= self._patience * DRIFT_SUM
        if drifted or (settled.steps >= self._patience * STEPS_BETWEEN_SEARCHES and not self._debt):
            if not drifted:
                self._model = replace(self._model, dense={})  # so that other lanes and orders are tried again
            self._token_seconds = now.seconds / now.sequences
            self._begin(scheduled=True)
            self._measured(now)

    # The search.

    def _begin(self, scheduled: bool) -> None:
        self._search, self._settled = _Search(self.choice, scheduled), None
        self.interrupted()

    def _measured(self, now: MeasuredBatch) -> None:
        """The present choice is measured: try the next one, or settle."""
        search = self._search
        if search.points and self._unlike_points(now):
            search.points.clear()
        search.measurements += 1
        grain = 1 / now.sequences
        low, high = search.shares
        if now.share < self.share - 0.75 * grain:  # there is no room for more
            high = now.share
        elif now.share > self.share + 0.75 * grain:
            low = now.share
        search.shares = min(low, high), max(low, high)
        present = DecodeChoice(now.lanes, now.share, now.fused)
        search.points = [point for point in search.points if not self._same(point, present)]
        search.points.append(now)
        self._token_seconds = self._token_seconds or now.seconds / now.sequences
        self._model = self._model.learned(search.points)
        goes_on = search.measurements < MAX_MEASUREMENTS and not search.confirms
        target = self._next(now, grain) if goes_on else None
        if target is None:
            self._settle(now)
        else:
            self._go(target)

    def _go(self, to: DecodeChoice) -> None:
        if to != self.choice:
            self._skip = self.lanes + to.lanes - 1
        self.lanes, self.share, self.fused = to
        self.interrupted()

    def _unlike_points(self, now: MeasuredBatch) -> bool:
        first = self._search.points[0]
        return _load_changed(now, first) or abs(now.sequences - first.sequences) > 0.25 * first.sequences

    def _next(self, now: MeasuredBatch, grain: float) -> DecodeChoice | None:
        """The choice to try next; None where none promises a shorter step. A search leaves its first choice for the
        attention workers where that is worth what searches have cost so far: so tries are never a large part of the
        time, however wrongly the model promises."""
        points = self._search.points
        untried = [choice for choice in self._choices(now) if not any(self._same(point, choice) for point in points)]
        model = self._model
        target = self._promising(model, untried, now)
        if target is None and model.alone is None:
            model = model.hoped(points)
            target = self._promising(model, untried, now)
        for tier, share in (("remote_tokens", 1 - grain), ("local_tokens", grain)):
            if target is None and self._any_share and not any(getattr(point, tier) for point in points):
                target = next((choice for choice in untried if abs(choice.share - share) < 0.5 * grain), None)
        if target is not None and target.share < 1 and len(points) == 1 and not self._search.scheduled:
            promised = max(0.0, now.seconds - model.seconds(target, now.tokens))
            return target if self._debt <= PAYBACK_STEPS * promised else None
        return target

    def _choices(self, now: MeasuredBatch) -> Iterator[DecodeChoice]:
        """All that can be reached with the present load. Where all is local, nothing waits for an attention worker. One
        lane more than was measured is tried at a time."""
        low, high = self._search.shares
        shares = [count / now.sequences for count in range(now.sequences + 1)] if self._any_share else [self.share]
        max_lanes = min(now.sequences, 1 + max((lanes for lanes, _ in self._model.dense), default=0))
        for share in shares:
            if low <= share <= high or not self._any_share:
                for lanes in self._all_lanes:
                    if lanes == self._all_lanes[0] or (lanes <= max_lanes and share < 1):
                        yield from (
                            DecodeChoice(lanes, share, fused) for fused in self._orders[: 1 if share == 1 else None]
                        )

    def _promising(self, model: StepModel, untried: Sequence[DecodeChoice], now: MeasuredBatch) -> DecodeChoice | None:
        """The choice with the shortest step by this model. None where it is no gain."""
        if model.remote is None or (model.local is None and self._any_share):
            return None
        chosen = min(untried, key=lambda choice: model.seconds(choice, now.tokens), default=None)
        best = min(point.seconds for point in self._search.points)
        gains = chosen is not None and model.seconds(chosen, now.tokens) < (1 - MIN_GAIN) * best
        return chosen if gains else None

    def _same(self, point: MeasuredBatch, choice: DecodeChoice) -> bool:
        """Whether it was measured at that choice, as far as whole sequences allow."""
        near = abs(point.share - choice.share) < 0.5 / point.sequences or not self._any_share
        return near and (point.lanes, point.fused) == (choice.lanes, choice.fused)

    def _settle(self, now: MeasuredBatch) -> None:
        """End the search with the best choice, or measure its first choice again before."""
        search = self._search
        shortest = min(point.seconds for point in search.points)
        equal = [point for point in search.points if point.seconds <= (1 + MIN_GAIN) * shortest]
        best = min(equal, key=lambda point: (point.remote_tokens > 0, point.lanes, not point.fused, point.seconds))
        share = (best.share if best.local_tokens else 0.0) if self._any_share else self.share
        choice = DecodeChoice(best.lanes, share, best.fused)
        if self._any_share and not best.remote_tokens:  # also where more was wanted, but could not move
            choice = DecodeChoice(self._all_lanes[0], 1.0, self._orders[0])
        if self._needs_confirmation(choice):
            search.confirms = True
            self._go(search.origin)
            return
        self._go(choice)
        self._patience = min(MAX_PATIENCE, 2 * self._patience) if self._same(best, search.origin) else 1
        self._settled, self._token_seconds = _Settled(best), best.seconds / best.sequences
        logger.debug("%s", self._log_line(now))
        if self._any_share:
            self.reason = self._why(best) or self.reason

    def _needs_confirmation(self, choice: DecodeChoice) -> bool:
        """Whether all KV was local, is not to be, and was measured once: other work of the machine may have slowed just
        that. So it is measured again, where moving there takes few steps."""
        search = self._search
        local = self._any_share and search.origin.share == 1
        return local and choice.share < 1 and not search.confirms and search.moves <= MAX_MOVES_IN_A_SEARCH

    def _why(self, best: MeasuredBatch) -> str:
        """Empty where this search has tried one tier alone."""
        points = self._search.points
        local_best = min((point.seconds for point in points if not point.remote_tokens), default=None)
        remote_best = min((point.seconds for point in points if point.remote_tokens), default=None)
        if local_best is None or remote_best is None:
            return ""
        workers, process = f"{remote_best * 1e3:.1f} ms", f"{local_best * 1e3:.1f} ms"
        if not best.remote_tokens:
            return f"decode: KV is read in this process ({process} a step; with the attention workers {workers})"
        if not best.local_tokens:
            return f"decode: KV is read by the attention workers ({workers} a step; in this process {process})"
        return (
            f"decode: {best.share:.0%} of the KV is read in this process, the rest by the attention workers "
            f"({workers} a step; all in this process {process})"
        )

    def _log_line(self, now: MeasuredBatch) -> str:
        model = self._model
        speeds = [f"local {model.local * 1e6:.3g}"] if model.local is not None else []
        if model.remote is not None:
            speeds.append(f"remote {model.remote * 1e6:.3g} and {model.fixed * 1e3:.2g} ms a step")
        steps = ", ".join(
            f"{point.lanes} x {point.share:.2f}{'' if point.fused else ' q first'}: {point.seconds * 1e3:.2f}"
            for point in self._search.points
        )
        return (
            f"decode has {self.lanes} batches under way, reads {self.share:.0%} of the KV locally, and sends "
            f"{'q, k and v together' if self.fused else 'q first'}, for {now.sequences} sequences of {now.tokens:.0f} "
            f"tokens; us a token measured: {', '.join(speeds)}; ms a step measured by lanes x share: {steps}"
        )


def _load_changed(now: MeasuredBatch, then: MeasuredBatch) -> bool:
    """Whether the load has changed so much that the choice is void."""
    pairs = ((now.sequences, then.sequences), (now.tokens, then.tokens))
    return any(max(pair) > LOAD_CHANGE * min(pair) for pair in pairs)


def _drift(now: MeasuredBatch, then: MeasuredBatch) -> float:
    """By which part of a step a tier's time for the same work has changed."""
    change = abs(now.waited - then.waited) if now.lanes == 1 else 0.0  # else other batches ran meanwhile
    if now.local_tokens and then.local_tokens:
        before = then.local_seconds / then.local_tokens
        change = max(change, abs(now.local_seconds / now.local_tokens - before) * now.local_tokens)
    if now.remote_tokens and then.remote_tokens:
        before = then.remote_seconds / then.remote_tokens
        change = max(change, abs(now.remote_seconds / now.remote_tokens - before) * now.remote_tokens)
    return change / max(1e-9, min(now.seconds, then.seconds))


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

    def seconds(self, choice: DecodeChoice, tokens: float) -> float:
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
            return (1 - HIDDEN_DENSE) * self.dense[lanes, not fused]
        fewer = [
            (lane_count, order == fused, seconds)
            for (lane_count, order), seconds in self.dense.items()
            if lane_count < lanes
        ]
        if fewer:
            return max(fewer)[2]
        return min((seconds * lanes / lane_count for (lane_count, _), seconds in self.dense.items()), default=0.0)

    def hoped(self, points: Sequence[MeasuredBatch]) -> StepModel:
        """The best case while the remote tier was not measured alone. Alone it is faster, and its answers come at most
        as late as they were waited for beside the local tier, which may have kept the cores from the transport. Where
        the measurements do not tell a call from its tokens, its whole time may be the call."""
        both_tiers = [point for point in points if point.remote_tokens and point.local_tokens]
        if not both_tiers:
            return self
        tokens, total = [point.remote_tokens for point in both_tiers], both_tiers[-1].tokens
        if max(tokens) < MIN_TOKEN_RATIO * min(tokens):
            seconds = min(point.remote_seconds for point in both_tiers)
        else:
            seconds = self._beside_local(total)
        fixed = min(self.fixed, *(point.waited for point in both_tiers))
        return replace(self, alone=Alone(total, seconds / REMOTE_SPEEDUP, fixed))

    def _beside_local(self, tokens: float) -> float:
        return self.call + (self.remote or 0.0) * tokens

    def _alone(self, seen: Alone, tokens: float) -> tuple[float, float]:
        """As it was measured, or less where it is faster beside the local tier now. Where it is slower there, the local
        tier may be the cause."""
        of_then = tokens / seen.tokens
        faster = min(1.0, self._beside_local(tokens) / (seen.beside * of_then)) if seen.beside else 1.0
        return seen.seconds * of_then * faster, seen.fixed

    def learned(self, points: Sequence[MeasuredBatch]) -> StepModel:
        """Updated with these measurements, the latest last."""
        model = self
        both_tiers = [point for point in points if point.local_tokens and point.remote_tokens]
        if both_tiers:
            model = model._beside(both_tiers)
        for point in points:
            if not point.remote_tokens:
                model = model._local_alone(point, known=bool(both_tiers))
            elif not point.local_tokens:
                model = model._remote_alone(point, known=bool(both_tiers))
            model = model._dense_of(point)
        return model

    def _dense_of(self, point: MeasuredBatch) -> StepModel:
        """With the dense time that explains a measured step."""
        lanes, local, remote = point.lanes, point.local_seconds, point.remote_seconds
        if lanes == 1 or not point.remote_tokens:
            dense_seconds = point.seconds - max(local, point.answered)
        else:
            batch = lanes * point.seconds - max(local, lanes * self.fixed + remote)
            dense_seconds = max(0.0, min(self.replicas * point.seconds - local, batch))
            if remote > (1 - HIDDEN_DENSE) * point.seconds:  # the remote tier is never idle: the rest may take less
                if not self.dense:
                    return self
                dense_seconds = min(dense_seconds, self._dense(lanes, point.fused))
        return replace(self, dense={**self.dense, (lanes, point.fused): dense_seconds})

    def _beside(self, points: Sequence[MeasuredBatch]) -> StepModel:
        last = points[-1]
        few, many = (pick(points, key=lambda point: point.remote_tokens) for pick in (min, max))
        call = self.call
        if many.remote_tokens >= MIN_TOKEN_RATIO * few.remote_tokens:
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

    def _local_alone(self, alone: MeasuredBatch, known: bool) -> StepModel:
        """`known`: its time beside the remote tier is measured, so that this one is its time alone."""
        seconds = alone.local_seconds / alone.local_tokens
        if known and self.local and seconds:
            return replace(self, local_alone=seconds / self.local)
        return replace(self, local=seconds / self.local_alone)

    def _remote_alone(self, alone: MeasuredBatch, known: bool) -> StepModel:
        tokens, seconds = alone.remote_tokens, alone.remote_seconds
        if alone.lanes > 1:  # beside the model, and it is unknown when answers came
            call = min(self.call, seconds)
            return self if known else replace(self, remote=(seconds - call) / tokens, call=call)
        fixed = max(0.0, alone.answered - seconds)
        if known:
            return replace(self, alone=Alone(tokens, seconds, fixed, self._beside_local(tokens)))
        slower = self.alone.slower if self.alone else 1.0
        seconds_beside = seconds * slower
        call = min(self.call, seconds_beside)
        measurement = Alone(tokens, seconds, fixed, seconds_beside)
        return replace(
            self, remote=(seconds_beside - call) / tokens, call=call, fixed=fixed * slower, alone=measurement
        )


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


_SUMMED = (
    "local_tokens",
    "remote_tokens",
    "local_seconds",
    "remote_seconds",
    "answered",
    "waited",
    "seconds",
    "sampled",
)


def whole_step(parts: Sequence[MeasuredBatch]) -> MeasuredBatch:
    """The batches of a step as one, in which each running sequence gets a token."""
    summed: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _SUMMED}
    part = parts[-1]._replace(**summed)
    scale = part.sequences / max(1, part.sampled)
    return part._replace(**{name: scale * getattr(part, name) for name in _SUMMED})


def _median(steps: Sequence[MeasuredBatch]) -> MeasuredBatch:
    """The steps as one, with the median of each of its times. Lanes may overtake each other, so one of these steps may
    lack the lane that has all remote sequences: then the mean is what is known."""
    total = whole_step(steps)
    names = ("local_seconds", "remote_seconds", "answered", "waited", "seconds")
    medians = {name: median(getattr(step, name) for step in steps) or getattr(total, name) for name in names}
    return total._replace(**medians)
