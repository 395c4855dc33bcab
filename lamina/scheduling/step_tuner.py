"""How decode runs, decided by measured steps: how many lanes, how much of the KV is local, which order q, k and v have.

The three depend on each other: lanes hide attention workers behind the model, a local share hides them behind the local
pool. So one search tries all: the choice of which `StepModel` expects the shortest step is measured next, while one
promises more than the best so far. Then the best measured one holds until the load or a tier's speed has changed. Pure.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from lamina.scheduling.step_model import Batch, Choice, StepModel, whole_step

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
