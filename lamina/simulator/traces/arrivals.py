"""Requests over time (`Trace`), and functions from one trace to another. Pure.

Some traces have times of arrival that were rounded to a step, such as Mooncake's to 3 seconds. Requests that came
within a step then seem to come at once, and a trace that is played slower or faster shows bursts that were never sent.
`step_of` finds the step, and `spread` spreads the times again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lamina.errors import InvalidRequest

BLOCK = 512
"""Tokens that one name in `Arrival.blocks` stands for, as in Mooncake's traces."""
MAX_TOKENS = 1 << 24
"""The most tokens of one prompt or one output."""
MAX_REQUESTS = 1 << 21
"""The most requests of one trace."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: seconds after the trace's start, tokens of prompt and output. `blocks` names each `BLOCK` tokens of
    the prompt, so that equal names mean equal tokens; empty: it shares nothing. The last block may be filled in part,
    or have no name: then its tokens are this request's own.

    With `after`, the index of an earlier request, it comes `gap` seconds after that one's last token, and not before
    `at`: a user who thinks, an agent whose tool runs. Its prompt begins with `shared` tokens of that one's prompt and
    output, as they were. Times of arrival up to `at` say when its session began.
    """

    at: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()
    after: int | None = None
    gap: float = 0.0
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests by time of arrival, at least one. Raises InvalidRequest, which names the first wrong one by its index:
    times are finite, 0 or more and never fall; prompt and output are 1 to `MAX_TOKENS` tokens; names of blocks are 0 or
    more, and none or one for each block of the prompt; `after` is an earlier request's index, `gap` finite and 0 or
    more, and `shared` no more tokens than that one has, and fewer than the prompt.

    `remarks` say in words what was done to it, or how far it is from what it stands for.
    """

    name: str
    arrivals: tuple[Arrival, ...]
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.arrivals) <= MAX_REQUESTS:
            raise InvalidRequest(
                f"the trace {self.name} has {len(self.arrivals)} requests; allowed are 1 to {MAX_REQUESTS}"
            )
        before = 0.0
        for index, arrival in enumerate(self.arrivals):
            wrong = _wrong(arrival, before)
            if not wrong and (arrival.after, arrival.gap, arrival.shared) != (None, 0.0, 0):
                wrong = _wrong_session(arrival, index, self.arrivals)
            if wrong:
                raise InvalidRequest(f"request {index} of the trace {self.name} {wrong}")
            before = arrival.at

    @property
    def seconds(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.arrivals[-1].at - self.arrivals[0].at


def scaled(trace: Trace, rate_factor: float) -> Trace:
    """The same requests, arriving `rate_factor` times as fast. InvalidRequest unless it is above 0 and finite."""
    if not 0 < rate_factor < math.inf:
        raise InvalidRequest(f"rate_factor is {rate_factor!r}; allowed are finite numbers above 0")
    arrivals = tuple(replace(arrival, at=arrival.at / rate_factor) for arrival in trace.arrivals)
    return replace(trace, name=f"{trace.name} x{rate_factor:g}", arrivals=arrivals)


def all_at_once(trace: Trace) -> Trace:
    """The same requests as a closed backlog: all of them are there at second 0."""
    arrivals = tuple(replace(arrival, at=0.0) for arrival in trace.arrivals)
    return replace(trace, name=f"{trace.name} at once", arrivals=arrivals)


def head(trace: Trace, count: int) -> Trace:
    """The first `count` requests. Raises InvalidRequest where there are fewer."""
    if type(count) is not int or not 1 <= count <= len(trace.arrivals):
        raise InvalidRequest(f"count is {count!r}; allowed is 1 to {len(trace.arrivals)}, as {trace.name} has")
    return replace(trace, arrivals=trace.arrivals[:count])


def closed_loop(trace: Trace, users: int, think: float = 0.0) -> Trace:
    """The same requests by `users` who take them in turn, each `think` seconds after the end of their last one; of a
    trace with sessions, whole ones. All users begin at second 0. Raises InvalidRequest unless each gets one."""
    lasts = [number for number, arrival in enumerate(trace.arrivals) if arrival.after is None]  # of each session
    if type(users) is not int or not 1 <= users <= len(lasts):
        raise InvalidRequest(f"users is {users!r:.80}; allowed is 1 to {len(lasts)}, as {trace.name} has")
    if not 0 <= think < math.inf:
        raise InvalidRequest(f"think is {think!r:.80}; allowed are finite seconds from 0 on")
    arrivals: list[Arrival] = []
    sessions: list[int] = []  # of each request, the number of its session
    count = 0
    for number, arrival in enumerate(trace.arrivals):
        moved = replace(arrival, at=0.0)
        if arrival.after is not None:
            sessions.append(sessions[arrival.after])
            if sessions[-1] < count - 1:
                raise InvalidRequest(f"{trace.name} has sessions that are mixed; allowed are whole ones, in turn")
        else:
            sessions.append(count)
            if count >= users:
                moved = replace(moved, after=lasts[count - users], gap=think)
            count += 1
        lasts[sessions[-1]] = number
        arrivals.append(moved)
    return replace(trace, name=f"{trace.name} by {users} users", arrivals=tuple(arrivals))


def split(trace: Trace, replicas: int) -> tuple[Trace, ...]:
    """The requests dealt out in turn, as a round-robin router does, but those that come after one go where that is.
    Times stay. Raises InvalidRequest unless each replica gets one."""
    if type(replicas) is not int or not 1 <= replicas <= len(trace.arrivals):
        raise InvalidRequest(f"replicas is {replicas!r}; allowed is 1 to {len(trace.arrivals)}, as {trace.name} has")
    if replicas == 1:
        return (trace,)
    parts: list[list[Arrival]] = [[] for _ in range(replicas)]
    places: list[tuple[int, int]] = []  # of each request: its part, and its index there
    count = 0
    for arrival in trace.arrivals:
        if arrival.after is None:
            part, dealt = count % replicas, arrival
            count += 1
        else:
            part, index = places[arrival.after]
            dealt = replace(arrival, after=index)
        places.append((part, len(parts[part])))
        parts[part].append(dealt)
    if count < replicas:
        raise InvalidRequest(f"replicas is {replicas}; allowed is 1 to {count}, as {trace.name} has sessions")
    return tuple(
        replace(trace, name=f"{trace.name} {n + 1}/{replicas}", arrivals=tuple(part)) for n, part in enumerate(parts)
    )


def tokens(arrival: Arrival, salt: int, shared: Sequence[int] = ()) -> tuple[int, ...]:
    """The prompt as token ids for a prefix cache: those of two prompts are equal as far as their blocks are.

    It begins with the ids `shared`, of the request it comes after. All tokens of block b are 2b, and all that are in no
    block 2 `salt` + 1: `salt` is the request's own number, 0 or more. So a prompt is made of a few ints that many have,
    and takes 8 bytes a token.
    """
    ids = list(shared)
    for block in arrival.blocks:
        ids += [2 * block] * BLOCK
    del ids[arrival.prompt :]
    ids += [2 * salt + 1] * (arrival.prompt - len(ids))
    return tuple(ids)


def blocks_of(prompt: int) -> int:
    """How many blocks a prompt of that many tokens has, the last one filled in part or whole."""
    return -(-prompt // BLOCK)


def wrong_tokens(count: Any) -> str:
    """What is wrong with a count of tokens, in words; "" if nothing is."""
    if type(count) is not int or not 1 <= count <= MAX_TOKENS:
        return f"is {count!r:.80}; allowed are whole numbers from 1 to {MAX_TOKENS}"
    return ""


def wrong_blocks(blocks: Any, prompt: int) -> str:
    """What is wrong with the names of a prompt's blocks, in words; "" if nothing is."""
    least, limit = prompt // BLOCK, blocks_of(prompt)
    if not least <= len(blocks) <= limit:
        allowed = f"{limit}" if least == limit else f"{least} or {limit}"
        return f"are {len(blocks)}; allowed are {allowed} for {prompt} tokens, one for each {BLOCK}"
    if wrong := [block for block in blocks if type(block) is not int or not 0 <= block < 1 << 62]:
        return f"have {wrong[0]!r:.80}; allowed are whole numbers from 0 on, below 2**62"
    return ""


def _wrong(arrival: Arrival, before: float) -> str:
    if type(arrival.at) not in (float, int) or not 0 <= arrival.at < math.inf:
        return f"arrives at {arrival.at!r:.80} s; allowed are finite numbers from 0 on"
    if arrival.at < before:
        return f"arrives at {arrival.at!r} s, after one at {before!r} s; allowed are times that never fall"
    if wrong := wrong_tokens(arrival.prompt):
        return f"has a prompt whose length {wrong}"
    if wrong := wrong_tokens(arrival.output):
        return f"has an output whose length {wrong}"
    if arrival.blocks and (wrong := wrong_blocks(arrival.blocks, arrival.prompt)):
        return f"has blocks that {wrong}"
    return ""


def _wrong_session(arrival: Arrival, index: int, arrivals: Sequence[Arrival]) -> str:
    after, gap, shared = arrival.after, arrival.gap, arrival.shared
    if after is None:
        return f"has the gap {gap!r:.80} and shares {shared!r:.80} tokens; allowed is neither, as it comes after none"
    if type(after) is not int or not 0 <= after < index:
        return f"comes after {after!r:.80}; allowed are indices of earlier requests, 0 to {index - 1}"
    if type(gap) not in (float, int) or not 0 <= gap < math.inf:
        return f"has the gap {gap!r:.80}; allowed are finite seconds from 0 on"
    limit = min(arrival.prompt - 1, arrivals[after].prompt + arrivals[after].output)
    if type(shared) is not int or not 0 <= shared <= limit or (shared and arrival.blocks):
        return f"shares {shared!r:.80} tokens with request {after}; allowed are 0 to {limit}, and 0 for one with blocks"
    return ""


_EQUAL = 0.2
"""The least share of the requests that come at another's time where times were rounded."""
_OFF = 0.02
"""The share of a step by which a time may miss a multiple of it: clocks are read late, and milliseconds are whole."""


def step_of(trace: Trace) -> float:
    """The seconds that times were rounded to; 0 where they were not, or where it makes no difference."""
    import numpy as np  # here, since the command line reads this file's names at its start

    times = np.array([arrival.at for arrival in trace.arrivals])
    distinct = np.unique(times)
    if len(distinct) < 3 or len(distinct) > (1 - _EQUAL) * len(times):
        return 0.0
    gaps = np.diff(distinct)
    steps = np.rint(gaps / gaps.min())
    step = float(gaps.sum() / steps.sum())
    misses = distinct - distinct[0] - step * np.concatenate([[0.0], np.cumsum(steps)])
    return step if np.abs(misses).max() <= _OFF * step else 0.0


def spread(trace: Trace) -> Trace:
    """The trace with times that were rounded spread within their step by chance, always the same, in their order. As
    it is where they were not rounded."""
    import numpy as np

    step = step_of(trace)
    if not step:
        return trace
    times = np.array([arrival.at for arrival in trace.arrivals])
    later = times + np.random.default_rng(0).random(len(times)) * step
    later = np.sort(later)  # steps do not overlap, so that each stays in its own
    remark = f"times were rounded to {step:.3g} s; they are spread within it by chance"
    moved = zip(trace.arrivals, later.tolist(), strict=True)
    return replace(
        trace, arrivals=tuple(replace(arrival, at=when) for arrival, when in moved), remarks=(*trace.remarks, remark)
    )
