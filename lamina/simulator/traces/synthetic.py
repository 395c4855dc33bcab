"""Traces that are drawn from published figures. The same seed gives the same trace.

`synthetic` draws one like a published trace, by its figures. `coding_agents` draws agentic sessions from published
quantiles, which `session_figures.toml` beside this file has, with sources. In a session requests come after others,
with tools or users between them, and contexts grow.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lamina.errors import InvalidRequest
from lamina.simulator.traces.arrivals import BLOCK, MAX_REQUESTS, Arrival, Trace, blocks_of
from lamina.simulator.traces.figures import Figures, Floats, Integers, Quantiles, Sharing, minutes_of
from lamina.system.text_files import read_toml

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
    rng = _generator(count, seed)
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


def _generator(count: int, seed: int) -> np.random.Generator:
    """What `count` requests are drawn by. Raises InvalidRequest."""
    if type(count) is not int or not 1 <= count <= MAX_REQUESTS:
        raise InvalidRequest(f"count is {count!r}; allowed is 1 to {MAX_REQUESTS}")
    if type(seed) is not int or seed < 0:
        raise InvalidRequest(f"seed is {seed!r}; allowed are whole numbers from 0 on")
    return np.random.default_rng(seed)


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


_CANDIDATES = 64  # earlier requests that one which goes on chooses from; by trial, see `synthetic`


def synthetic(figures: Figures, count: int | None = None, seed: int = 0) -> Trace:
    """`count` requests like those of a trace with these figures, at its rate; by default as many as it has.

    Lengths have its quantiles and, by a Gaussian copula (r = 2 sin(π ρ / 6) for Spearman's ρ), its rank correlation.
    One is drawn from each 1 / count of the distribution, so that the mean is no matter of luck. Arrivals are a renewal
    process whose gaps have the trace's quantiles, or are gamma distributed where its times were rounded. It runs faster
    and slower as the trace's load does, from its beginning, and is scaled to give the rate exactly. What is lost: any
    dependence of a gap or a length on those before it.

    Shared prefixes are those of a simple model, as its figures say: each prompt begins with the common blocks; how
    deep it shares beyond is drawn like a third length; and the blocks are those of an earlier prompt, taken as one turn
    of a conversation that goes on. It is, of 64 that came lags ago as drawn, the one with the fewest whole blocks that
    still has enough (else with the most), and no other request goes on from it. What is lost: documents that many
    requests share.

    Raises InvalidRequest.
    """
    count = figures.count if count is None else count
    rng = _generator(count, seed)
    normal = rng.standard_normal((3, count))
    prompt = _lengths(figures.prompt, _stratified(rng, normal[0]))
    output = _lengths(figures.output, _stratified(rng, _correlated(normal[0], normal[1], figures.rank_correlation)))
    if figures.gaps is None:
        gaps = _gamma_gaps(rng, figures.step_cv, count - 1)
    else:
        gaps = figures.gaps.at(_stratified(rng, rng.random(count - 1)))
    times = _at(gaps, figures)
    blocks: list[tuple[int, ...]] = [()] * count
    if sharing := figures.sharing:
        depth = sharing.depth.at(_stratified(rng, _correlated(normal[0], normal[2], sharing.correlation)))
        blocks = _conversations(rng, sharing, times, prompt, depth)
    columns = zip(times.tolist(), prompt.tolist(), output.tolist(), blocks, strict=True)
    return Trace(f"{figures.name} (synthetic)", tuple(Arrival(*column) for column in columns))


def _conversations(
    rng: np.random.Generator, sharing: Sharing, at: Floats, prompt: Integers, depth: Floats
) -> list[tuple[int, ...]]:
    """The names of each prompt's blocks, by the times of arrival `at` [s]."""
    total = np.array([blocks_of(int(tokens)) for tokens in prompt])
    whole_blocks = prompt // BLOCK
    shared_blocks = np.rint(depth * np.maximum(total - sharing.common, 0)).astype(np.int64)
    common, fresh = tuple(range(sharing.common)), sharing.common
    last_turn = np.ones(len(prompt), np.bool_)
    blocks: list[tuple[int, ...]] = []
    for n in range(len(prompt)):
        start = common
        if shared_blocks[n]:
            lags = sharing.lag.at(rng.random(_CANDIDATES))
            earlier = np.unique(np.searchsorted(at[:n], at[n] - lags, side="right") - 1)
            earlier = earlier[(earlier >= 0) & last_turn[earlier]]
            if earlier.size:
                needed = sharing.common + int(shared_blocks[n])
                enough = earlier[whole_blocks[earlier] >= needed]
                chosen = (
                    enough[whole_blocks[enough].argmin()] if enough.size else earlier[whole_blocks[earlier].argmax()]
                )
                if whole_blocks[chosen] > sharing.common:
                    start = blocks[chosen][: min(needed, int(whole_blocks[chosen]))]
                    last_turn[chosen] = False
        start = start[: total[n]]
        new = int(total[n]) - len(start)
        blocks.append(start + tuple(range(fresh, fresh + new)))
        fresh += new
    return blocks


def _at(gaps: Floats, figures: Figures) -> Floats:
    """Times of arrival [s], from gaps of any mean at an even load, on which the trace's own load is laid."""
    even = np.concatenate([np.zeros(1), np.cumsum(gaps)])
    if not even[-1]:
        return even
    even *= len(gaps) / figures.rate / even[-1]
    if not figures.load:
        return even
    share = np.concatenate([np.zeros(1), np.cumsum(figures.load)]) / sum(figures.load)  # of requests, up to each part
    rounds, part = np.divmod(even / figures.seconds, 1.0)
    times: Floats = (rounds + np.interp(part, share, np.linspace(0.0, 1.0, len(share)))) * figures.seconds
    times *= even[-1] / times[-1]
    return times


def distance(drawn: Trace, figures: Figures) -> str:
    """How far a drawn trace is from the one it stands for, in words."""
    times = np.array([arrival.at for arrival in drawn.arrivals])
    prompt, output = (np.array([getattr(a, name) for a in drawn.arrivals]) for name in ("prompt", "output"))
    counts, _ = minutes_of(times)
    pairs = [
        ("mean prompt", f"{prompt.mean():.0f}", f"{figures.prompt_mean:.0f}"),
        ("output", f"{output.mean():.0f}", f"{figures.output_mean:.0f}"),
        ("context in decode", f"{(output * (prompt + output / 2)).sum() / output.sum():.0f}", f"{figures.context:.0f}"),
    ]
    if len(counts) > 1:
        varies = f"{counts.std() / counts.mean():.2f}"
        pairs.append(("variation of counts a minute", varies, f"{figures.minute_cv:.2f}"))
    if figures.sharing:
        pairs.append(("shared blocks", f"{reused_share(drawn):.0%}", f"{figures.sharing.reused:.0%}"))
    ratios = ", ".join(f"{name} {mine} ({published})" for name, mine, published in pairs)
    return (
        f"drawn from the published trace's figures, as its file is not here (--trace-dir); drawn (published): {ratios}"
    )


def reused_share(trace: Trace) -> float:
    """The share of all blocks of prompts that a cache which forgets nothing has from earlier prompts."""
    names: set[int] = set()
    shared = total = 0
    for arrival in trace.arrivals:
        shared += next((n for n, block in enumerate(arrival.blocks) if block not in names), len(arrival.blocks))
        total += len(arrival.blocks)
        names.update(arrival.blocks)
    return shared / total if total else 0.0


def _gamma_gaps(rng: np.random.Generator, cv: float, count: int) -> Floats:
    """`count` gamma distributed gaps with the mean 1 and that coefficient of variation."""
    shape = 1 / cv**2 if cv > 1e-3 else math.inf
    return rng.gamma(shape, 1 / shape, count) if shape < math.inf else np.ones(count)


def _correlated(normal: Floats, other: Floats, rank_correlation: float) -> Floats:
    """Normal numbers with that rank correlation to `normal`; `other` are independent ones."""
    r = 2 * math.sin(math.pi * rank_correlation / 6)
    return r * normal + math.sqrt(1 - r * r) * other


def _stratified(rng: np.random.Generator, values: Floats) -> Floats:
    """Shares from 0 to 1 in the order of `values`, one in each 1 / n."""
    ranks = np.argsort(np.argsort(values))
    return (ranks + rng.random(len(values))) / max(len(values), 1)


def _lengths(lengths: Quantiles, shares: Floats) -> Integers:
    """Whole numbers of tokens, at least 1."""
    return np.maximum(np.rint(lengths.at(shares)), 1).astype(np.int64)
