"""How long a decode step takes, for any lanes, local share and order of q, k and v, by measured steps. Pure.

Two tiers attend at once: the local pool, and attention workers, which take a round trip for each layer besides. While a
batch waits for attention workers, a batch in another lane computes. What was not measured is assumed at its best, so
that it is tried; tiers that share cores or memory slow each other down in ways that the model lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
