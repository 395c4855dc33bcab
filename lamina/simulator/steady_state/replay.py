"""Requests through one instance, batch after batch, without pages, rows or a scheduler (`replay`): what `event_loop`
does in all detail is here a few sums a request, compiled.

Admission and prompts are first come, first served. Each batch has all sequences in decode, and prompts' tokens up to
its limit. Batches that no sequence enters or leaves are one jump. Left out: shared prefixes, and preemption.

The seconds of a system's batches (`Batches`) come from few calls of its cost model: those between are interpolated. A
batch of n sequences in decode, which have c tokens of KV in all, and of q prompt tokens takes

    a(n) + b(n) (c - n C) + d(n + q) - d(n) + sum of e(p) over its prompt tokens

seconds, where C is the mean context: a is decode alone, b what a token of KV more takes, d the dense layers by tokens,
and e what a token of a prompt of p takes beside, to attend to those before it. a and d are exact at 1, 2, 3, 4, 6, 8,
12, ... sequences or tokens, and straight between. Tables are filled where they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from lamina.simulator.costs.cost_model import Load
from lamina.simulator.costs.systems import Offloaded, System

LEVELS = 8
"""Ranges of sequences in decode: none, from 1, from 4, from 64, from 1024, ... b differs by range; so does d where
attention is elsewhere, as each may hide part of the other."""
_PLACES = 80
"""Places of a table with two values for each power of 2."""
_LENGTHS = 3
"""Prompts, from the shortest to the longest, whose attention is computed."""
_SOME = 16
"""Sequences in decode beside which it is computed too, where attention is elsewhere."""


class Batches:
    """The batches of one system, whose sequences have so much `context` in the mean. Without `prefill` prompts take no
    time.

    `steps` has a at 1, 1.5, 2, 3, 4, 6, ... sequences; `slopes` b by level; `dense` d by level at as many tokens (level
    0 alone unless it `hides` part of it; none without prefill). What is negative is not known yet.
    """

    def __init__(self, system: System, context: float, prefill: bool) -> None:
        self.system, self.context, self.prefill = system, context, prefill
        self.hides = isinstance(system, Offloaded)
        self._rotates = isinstance(system, Offloaded) and system.lanes > 1
        self._bare: dict[tuple[int, int], float] = {}
        self.steps = np.full(_PLACES, -1.0)
        self.slopes = np.full(LEVELS, -1.0)
        self.dense = np.full(((LEVELS if self.hides else 1) if prefill else 0, _PLACES), -1.0)

    def know(self, count: int) -> float:
        """a(n), of one sequence or more; b is known then, too."""
        alone = _known(self.steps, count, self._alone)
        level = level_of(count)
        if self.slopes[level] < 0:
            near = _first(level)
            longer = self.system.step(Load(near, 2 * self.context)).seconds
            self.slopes[level] = max(0.0, longer - self._alone(near)) / (near * self.context)
        return alone

    def reach(self, count: int, tokens: int) -> float:
        """d of so many tokens, `count` of them in decode."""
        level = level_of(count) if self.hides else 0
        near = _first(level)
        return _known(self.dense[level], tokens, lambda tokens: self._computed(near, tokens)) if tokens else 0.0

    def added(self, count: int, tokens: int) -> float:
        """d(n + q) - d(n): seconds that so many tokens of prompts add, without their past."""
        return max(0.0, self.reach(count, count + tokens) - self.reach(count, count)) if self.prefill else 0.0

    def past(self, lengths: NDArray[np.int64], most: int, beside: bool) -> NDArray[np.float64]:
        """e(p) of each of these prompts, which come in batches of up to `most` tokens: with none in decode, or `beside`
        some."""
        seconds = np.zeros(len(lengths))
        if not self.prefill:
            return seconds
        decoding = _SOME if beside and self._rotates else 0
        # Those whose past has no room beside the dense layers are another matter.
        for chosen in (lengths <= self.system.prompt_tokens, lengths > self.system.prompt_tokens):
            if chosen.any():
                group = lengths[chosen]
                anchors = np.unique(np.geomspace(group.min(), group.max(), _LENGTHS).round())
                values = [self._past(round(length), most, decoding) for length in anchors.tolist()]
                seconds[chosen] = np.interp(group, anchors, values)
        return seconds

    def pasts(self, lengths: NDArray[np.int64], most: int) -> NDArray[np.float64]:
        """Both, in a row each."""
        alone = self.past(lengths, most, False)
        return np.stack((alone, self.past(lengths, most, True) if self._rotates else alone))

    def _alone(self, count: int) -> float:
        return self.system.step(Load(count, self.context)).seconds

    def _computed(self, near: int, tokens: int) -> float:
        """d of so many tokens as if none of a prompt met another, `near` of them in decode, whose time is in it."""
        if tokens <= near:
            return self._alone(near) * tokens / near
        return self.system.step(Load(near, self.context if near else 0.0, tokens - near)).seconds

    def _past(self, length: int, most: int, beside: int) -> float:
        """e of a prompt, by the chunk in its middle."""
        chunk, context = min(length, most), self.context if beside else 0.0
        if (beside, chunk) not in self._bare:
            self._bare[beside, chunk] = self.system.step(Load(beside, context, chunk)).seconds
        before, within = (length - chunk) / 2, chunk * chunk / 2
        load = Load(beside, context, chunk, within + chunk * before, chunk + before, prompts=chunk / length)
        if length > self.system.prompt_tokens:  # what comes before has room where decode reads it alone
            load = Load(beside, context, chunk, within, chunk, chunk, chunk * before, chunk / length)
        return max(0.0, self.system.step(load).seconds - self._bare[beside, chunk]) / chunk


@numba.extending.register_jitable  # type: ignore[untyped-decorator]
def level_of(count: int) -> int:
    """0 for none, 1 for up to 3, 2 for up to 63, 3 for up to 1023, and so on."""
    level = 1 if count else 0
    while count >= 4:
        level += 1
        count //= 16
    return level


def _first(level: int) -> int:
    """The fewest sequences of a level."""
    return max(1, 16 ** (level - 1) // 4) if level else 0


@numba.extending.register_jitable  # type: ignore[untyped-decorator]
def _ends(at: int) -> tuple[int, int, int, int]:
    """Of 1, 2, 3, 4, 6, 8, 12, ... the last up to a count and the next: their places in a table, and themselves."""
    place, low = 0, 1
    while 2 * low <= at:
        low *= 2
        place += 2
    if low == 1:
        return 0, 2, 1, 2
    high = low + low // 2
    if at >= high:
        return place + 1, place + 2, high, 2 * low
    return place, place + 1, low, high


@numba.extending.register_jitable  # type: ignore[untyped-decorator]
def _between(table: Any, at: int) -> Any:
    """Straight between the two ends; negative where one is not known."""
    place, following, low, high = _ends(at)
    first, last = table[place], table[following]
    if at == low or first < 0:
        return first
    return last if last < 0 else first + (last - first) * (at - low) / (high - low)


def _known(table: NDArray[np.float64], at: int, value: Callable[[int], float]) -> float:
    """The value at a count of 1 or more, between two of the table, which has them from now on."""
    place, following, low, high = _ends(at)
    if table[place] < 0:
        table[place] = value(low)
    if at > low and table[following] < 0:
        table[following] = value(high)
    return float(_between(table, at))


Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_DONE, _DECODE, _DENSE = 0, 1, 2
"""What a run ended for: all is done, or seconds are wanted of so many sequences in decode, or of so many tokens."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one instance: sequences at a time, tokens of KV that they hold, and tokens of a batch. `usual`:
    tokens that each of those holds which are there at first."""

    sequences: int
    held: float
    batch: int
    usual: float


@dataclass(frozen=True, slots=True)
class Requests:
    """By time of arrival in seconds: tokens of prompt and output; seconds of a prompt token's past (with none in
    decode, and beside some); and tokens of KV that each reads and holds in the mean while it decodes. An array each."""

    at: Floats
    prompts: Integers
    outputs: Integers
    past: Floats
    read: Floats
    held: Floats


@dataclass(frozen=True, slots=True)
class Served:
    """Of each request, when it had its first token, seconds of each one after it, and when it was let in."""

    first: Floats
    pace: Floats
    entered: Floats


def replay(batches: Batches, requests: Requests, limits: Limits, present: Integers) -> Served:
    """Serve them until the last has its first token; those that still decode then keep the pace that they had.

    `present`: tokens that sequences which decode at first have left, each with the mean context.
    """
    number = len(requests.at)
    first, pace, entered = np.zeros(number), np.zeros(number), np.zeros(number)
    while True:
        ended, count, tokens = _compiled()(
            requests.at,
            requests.prompts,
            requests.outputs,
            requests.past,
            requests.read,
            requests.held,
            present,
            limits.sequences,
            float(limits.held),
            limits.batch,
            float(limits.usual),
            batches.context,
            batches.hides,
            batches.steps,
            batches.slopes,
            batches.dense,
            first,
            pace,
            entered,
        )
        if ended == _DONE:
            return Served(first, pace, entered)
        if ended == _DECODE:
            batches.know(count)
        else:
            batches.reach(count, tokens)


@cache
def _compiled() -> Callable[..., tuple[int, int, int]]:
    """`_run`, compiled; from numba's cache on disk where there is one."""
    try:
        return numba.njit(cache=True)(_run)  # type: ignore[no-any-return]
    except RuntimeError:  # no folder can be written to
        return numba.njit(_run)  # type: ignore[no-any-return]


@numba.extending.register_jitable  # type: ignore[untyped-decorator]
def _push(keys: Any, names: Any, size: int, key: int, name: int) -> None:
    """Into a heap of so many."""
    place = size
    while place:
        above = (place - 1) // 2
        if keys[above] <= key:
            break
        keys[place], names[place] = keys[above], names[above]
        place = above
    keys[place], names[place] = key, name


@numba.extending.register_jitable  # type: ignore[untyped-decorator]
def _pop(keys: Any, names: Any, size: int) -> int:
    """The name with the least key; `size` counts it."""
    root = names[0]
    size -= 1
    key, name = keys[size], names[size]
    place = 0
    while True:
        below = 2 * place + 1
        if below >= size:
            break
        if below + 1 < size and keys[below + 1] < keys[below]:
            below += 1
        if keys[below] >= key:
            break
        keys[place], names[place] = keys[below], names[below]
        place = below
    keys[place], names[place] = key, name
    return root  # type: ignore[no-any-return]


@numba.extending.register_jitable  # type: ignore[untyped-decorator]
def _prompts_of_batch(
    prompts: Any, past: Any, done: int, admitted: int, tokens_left: int, space: int, most: int
) -> tuple[int, int, float, int, int]:
    """The next batches with prompts, of up to `space` tokens of them. `done` is the prompt under way, of which
    `tokens_left` are to be computed. Returns how many batches are alike (up to `most`), their prompt tokens, the
    seconds of those tokens' past, and `tokens_left` and `done` behind them."""
    if tokens_left >= space:  # several batches, if the first prompt fills them
        times = max(1, min(tokens_left // space, most)) if tokens_left > space else 1
        past_seconds = space * past[done]
        tokens_left -= times * space
        return times, space, past_seconds, tokens_left, done + (tokens_left == 0)
    tokens, past_seconds = tokens_left, tokens_left * past[done]
    done += 1
    tokens_left = 0
    while done < admitted and tokens < space:
        part = min(prompts[done], space - tokens)
        tokens += part
        past_seconds += part * past[done]
        if part < prompts[done]:
            tokens_left = prompts[done] - part
            break
        done += 1
    return 1, tokens, past_seconds, tokens_left, done


@numba.extending.register_jitable  # type: ignore[untyped-decorator]
def _added(dense: Any, count: int, tokens: int) -> tuple[float, int]:
    """Seconds that prompt tokens add to a batch with `count` sequences in decode, as `Batches.added` has it. The second
    is the number of tokens whose seconds are not known yet; 0: all are."""
    total, bare = _between(dense, count + tokens), 0.0
    if total < 0:
        return 0.0, count + tokens
    if count:
        bare = _between(dense, count)
        if bare < 0:
            return 0.0, count
    return max(0.0, total - bare), 0


@numba.extending.register_jitable  # type: ignore[untyped-decorator]
def _paces_so_far(
    names: Any, count: int, batch: int, began: Any, now: float, first: Any, pace: Any, steps: Any
) -> bool:
    """Set the paces of those that still decode at the end. False where the seconds of a step are not known yet."""
    for place in range(count):
        request = names[place]
        if request >= 0:
            steps_taken = batch - began[request]
            if steps_taken:
                pace[request] = (now - first[request]) / steps_taken
            else:
                decode = _between(steps, count)
                if decode < 0:
                    return False
                pace[request] = decode
    return True


def _run(
    at: Any,
    prompts: Any,
    outputs: Any,
    past: Any,
    read: Any,
    held: Any,
    present: Any,
    places: int,
    room: float,
    budget: int,
    usual: float,
    context: float,
    hides: bool,
    steps: Any,
    slopes: Any,
    dense: Any,
    first: Any,
    pace: Any,
    entered: Any,
) -> tuple[int, int, int]:
    """The loop. Returns why it ended, and of how many sequences and tokens the seconds are wanted."""
    number = len(at)
    keys = np.empty(number + len(present) + 1, np.int64)  # the number of the batch that gives the last token
    names = np.empty(number + len(present) + 1, np.int64)
    began = np.zeros(number, np.int64)  # the number of the batch that gave the first token
    count = 0  # in decode
    for tokens_left in present:
        _push(keys, names, count, tokens_left, -1)
        count += 1
    now, batch, alone = at[0], 0, 0.0
    more = 0.0  # tokens of KV beyond the mean context of each
    free = room - count * usual
    admitted = computing = 0  # requests before these are let in; have all of their prompt
    tokens_left = 0  # tokens of the prompt under way
    while computing < number:
        while admitted < number and at[admitted] <= now:
            inside = count + admitted - computing
            if inside and (inside >= places or held[admitted] > free):
                break
            free -= held[admitted]
            entered[admitted] = now
            if admitted == computing:
                tokens_left = prompts[admitted]
            admitted += 1
        alone = 0.0
        if count:
            alone = _between(steps, count)
            slope = slopes[level_of(count)]
            if alone < 0 or slope < 0:
                return _DECODE, count, 0
            alone = max(alone / 4, alone + slope * more)
        done, times = computing, 1
        if computing < admitted:  # a batch with prompts
            limit = keys[0] - batch if count else tokens_left
            space = max(1, budget - count)
            times, tokens, past_seconds, tokens_left, done = _prompts_of_batch(
                prompts, past[min(1, count)], computing, admitted, tokens_left, space, limit
            )
            if dense.shape[0]:
                added, missing = _added(dense[level_of(count) if hides else 0], count, tokens)
                if missing:
                    return _DENSE, count, missing
                alone += added + past_seconds
            if done < admitted and done > computing and not tokens_left:
                tokens_left = prompts[done]
        elif count:  # decode alone, until a sequence leaves or comes
            times = keys[0] - batch
            if admitted < number and at[admitted] > now and at[admitted] - now < times * alone:
                times = int((at[admitted] - now) / alone) + 1
        else:
            now = at[admitted]
            continue
        now += times * alone
        batch += times
        while count and keys[0] <= batch:
            request = _pop(keys, names, count)
            count -= 1
            if request < 0:
                free += usual
            else:
                pace[request] = (now - first[request]) / (outputs[request] - 1)
                free += held[request]
                more -= read[request] - context
        for prompt in range(computing, done):
            first[prompt], pace[prompt] = now, 0.0
            if outputs[prompt] > 1:
                began[prompt] = batch
                _push(keys, names, count, batch + outputs[prompt] - 1, prompt)
                count += 1
                more += read[prompt] - context
            else:
                free += held[prompt]
        computing = done
    if not _paces_so_far(names, count, batch, began, now, first, pace, steps):
        return _DECODE, count, 0
    return _DONE, 0, 0
