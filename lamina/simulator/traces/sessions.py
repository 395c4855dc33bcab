"""Sessions of agents, drawn from published quantiles, which `session_figures.toml` beside this file has, with sources.
Requests come after others, with tools or users between them, and contexts grow. The same seed gives the same trace.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamina.errors import InvalidRequest
from lamina.simulator.traces.arrivals import BLOCK, MAX_REQUESTS, Arrival, Trace
from lamina.system.text_files import read_toml

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
SESSIONS = 0.05
"""Sessions that begin in a second, in a trace that is drawn: assumed, as no site's is published."""
_AT_A_TIME = 16
"""Sessions that are drawn together."""


def coding_agents(count: int = 2000, seed: int = 0, rate: float = SESSIONS) -> Trace:
    """The first `count` steps of coding agents whose sessions begin independently, `rate` a second. In a session the
    user makes requests, each of several steps with tools between.

    A step's prompt is all that its session had so far, and fresh tokens: what a tool or the user said. A context that
    would outgrow the window is compacted: it begins with the common instructions again, and the rest is new. Lengths,
    counts and gaps are drawn independently of each other. Which steps come first is decided as if each took the
    published median. At first few sessions are under way, and contexts are short. Raises InvalidRequest.
    """
    if not 0 < rate < math.inf:
        raise InvalidRequest(f"rate is {rate!r}; allowed are finite sessions a second above 0")
    if type(count) is not int or not 1 <= count <= MAX_REQUESTS:
        raise InvalidRequest(f"count is {count!r}; allowed is 1 to {MAX_REQUESTS}")
    if type(seed) is not int or seed < 0:
        raise InvalidRequest(f"seed is {seed!r}; allowed are whole numbers from 0 on")
    rng = np.random.default_rng(seed)
    starts: list[float] = [0.0]
    sessions: list[_Session] = []
    ends = np.zeros(0)  # of all steps
    while len(ends) < count or np.partition(ends, count - 1)[count - 1] > starts[-1]:
        sessions += [_session(rng) for _ in range(_AT_A_TIME)]
        starts += (starts[-1] + np.cumsum(rng.exponential(1 / rate, _AT_A_TIME))).tolist()
        ends = np.concatenate([start + session.ends for start, session in zip(starts, sessions, strict=False)])
    last = float(np.partition(ends, count - 1)[count - 1])
    arrivals: list[Arrival] = []
    session_count = 0
    for start, session in zip(starts, sessions, strict=False):
        limit = min(int(np.searchsorted(start + session.ends, last, side="right")), count - len(arrivals))
        session_count += limit > 0
        arrivals += _steps(session, start, limit, len(arrivals))
    prompts = [arrival.prompt for arrival in arrivals]
    remark = (
        f"drawn from the quantiles of TraceLab's coding agents (arXiv 2606.30560): {session_count} sessions; "
        f"median prompt {np.median(prompts):.0f} tokens (published: {_figures()['prompt']['median']})"
    )
    return Trace("coding-agents (synthetic)", tuple(arrivals), (remark,))


class _Session(NamedTuple):
    """One session, by step: seconds since the last one's end, fresh tokens, tokens of output, and when it ends if each
    takes the published median."""

    gaps: Floats
    fresh: Integers
    output: Integers
    ends: Floats


def _session(rng: np.random.Generator) -> _Session:
    figures = _figures()
    steps = 1 + np.rint(_drawn(figures["tool_steps"], rng, round(_drawn(figures["requests"], rng, 1)[0]))).astype(int)
    count = int(steps.sum())
    first_steps = np.zeros(count, np.bool_)
    first_steps[np.cumsum(steps)[:-1]] = True  # the first step of a request
    gaps = np.where(
        first_steps, _drawn(figures["think_seconds"], rng, count), _drawn(figures["tool_seconds"], rng, count)
    )
    gaps[0] = 0.0
    fresh, output = (_lognormal(figures[name], rng, count) for name in ("fresh", "output"))
    return _Session(gaps, fresh, output, np.cumsum(gaps + figures["step_seconds"]))


def _steps(session: _Session, at: float, count: int, first: int) -> list[Arrival]:
    """The first `count` steps of a session that begins at that second; its first one has that number in the trace."""
    figures = _figures()["prompt"]
    window, blocks = int(figures["window"]), int(figures["common"]) // BLOCK
    common = blocks * BLOCK
    arrivals: list[Arrival] = []
    columns = (session.gaps, session.fresh, session.output)
    for gap, fresh, output in zip(*(column[:count].tolist() for column in columns), strict=True):
        if not arrivals:
            names = range((first + 1) << 20, ((first + 1) << 20) + fresh // BLOCK)
            arrivals.append(Arrival(at, common + fresh, output, (*range(blocks), *names)))
            continue
        before = arrivals[-1]
        context = before.prompt + before.output
        if context + fresh + output > window:
            context, fresh = common, int(figures["compacted"] * window)
        arrivals.append(Arrival(at, context + fresh, output, (), first + len(arrivals) - 1, gap, context))
    return arrivals


def open_loop(trace: Trace, ttft: float, tpot: float) -> Trace:
    """The trace with times of arrival in place of waiting: as if each request took `ttft` seconds to its first token
    and `tpot` for each after it. Shared tokens become shared blocks, whole ones. For what must know arrivals before."""
    if all(arrival.after is None for arrival in trace.arrivals):
        return trace
    fresh = 1 + max((block for arrival in trace.arrivals for block in arrival.blocks), default=-1)
    times: list[float] = []
    ends: list[float] = []
    contexts: list[tuple[int, ...]] = []  # of each request, the names of its prompt's and output's whole blocks
    prompts: list[tuple[int, ...]] = []
    for arrival in trace.arrivals:
        after = arrival.after
        times.append(arrival.at if after is None else max(arrival.at, ends[after] + arrival.gap))
        ends.append(times[-1] + ttft + (arrival.output - 1) * tpot)
        names = arrival.blocks if after is None else contexts[after][: arrival.shared // BLOCK]
        more = (arrival.prompt + arrival.output) // BLOCK - len(names)
        contexts.append(names + tuple(range(fresh, fresh + more)))
        fresh += max(0, more)
        prompts.append(contexts[-1][: max(len(arrival.blocks), arrival.prompt // BLOCK)])
    order = sorted(range(len(times)), key=times.__getitem__)
    arrivals = tuple(Arrival(times[n], trace.arrivals[n].prompt, trace.arrivals[n].output, prompts[n]) for n in order)
    remark = f"each request takes {ttft:g} s to its first token and {tpot:g} s for each after it, for times of arrival"
    return replace(trace, arrivals=arrivals, remarks=(*trace.remarks, remark))


@functools.cache
def _figures() -> dict[str, Any]:
    return read_toml(Path(__file__).with_name("session_figures.toml"))


def _drawn(quantiles: dict[str, Any], rng: np.random.Generator, count: int) -> Floats:
    values: Floats = np.expm1(np.interp(rng.random(count), quantiles["shares"], np.log1p(quantiles["values"])))
    return values


def _lognormal(figures: dict[str, Any], rng: np.random.Generator, count: int) -> Integers:
    """Whole numbers of tokens, at least 1, and no more than are left of a context that is compacted."""
    spread = math.sqrt(2 * math.log(figures["mean"] / figures["median"]))
    drawn = rng.lognormal(math.log(figures["median"]), spread, count)
    prompt = _figures()["prompt"]
    return np.clip(np.rint(drawn), 1, prompt["compacted"] * prompt["window"]).astype(np.int64)
