"""Traces that are drawn like a published one, by its figures. The same seed, the same trace."""

from __future__ import annotations

import math

import numpy as np

from lamina.errors import InvalidRequest
from lamina.simulator.traces.arrivals import BLOCK, MAX_REQUESTS, Arrival, Trace, blocks_of
from lamina.simulator.traces.figures import Figures, Floats, Integers, Quantiles, Sharing, minutes_of

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
    if type(count) is not int or not 1 <= count <= MAX_REQUESTS:
        raise InvalidRequest(f"count is {count!r}; allowed is 1 to {MAX_REQUESTS}")
    if type(seed) is not int or seed < 0:
        raise InvalidRequest(f"seed is {seed!r}; allowed are whole numbers from 0 on")
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((3, count))
    prompt = _lengths(figures.prompt, _stratified(rng, normal[0]))
    output = _lengths(figures.output, _stratified(rng, _correlated(normal[0], normal[1], figures.rank_correlation)))
    if figures.gaps is None:
        gaps = _gamma_gaps(rng, figures.step_cv, count - 1)
    else:
        gaps = figures.gaps.at(_stratified(rng, rng.random(count - 1)))
    at = _at(gaps, figures)
    blocks: list[tuple[int, ...]] = [()] * count
    if sharing := figures.sharing:
        depth = sharing.depth.at(_stratified(rng, _correlated(normal[0], normal[2], sharing.correlation)))
        blocks = _conversations(rng, sharing, at, prompt, depth)
    columns = zip(at.tolist(), prompt.tolist(), output.tolist(), blocks, strict=True)
    return Trace(f"{figures.name} (synthetic)", tuple(Arrival(*column) for column in columns))


def _conversations(
    rng: np.random.Generator, sharing: Sharing, at: Floats, prompt: Integers, depth: Floats
) -> list[tuple[int, ...]]:
    """The names of each prompt's blocks, by the times of arrival `at` [s]."""
    total = np.array([blocks_of(int(tokens)) for tokens in prompt])
    whole = prompt // BLOCK
    wanted = np.rint(depth * np.maximum(total - sharing.common, 0)).astype(np.int64)
    common, fresh = tuple(range(sharing.common)), sharing.common
    last_turn = np.ones(len(prompt), np.bool_)
    blocks: list[tuple[int, ...]] = []
    for n in range(len(prompt)):
        start = common
        if wanted[n]:
            lags = sharing.lag.at(rng.random(_CANDIDATES))
            earlier = np.unique(np.searchsorted(at[:n], at[n] - lags, side="right") - 1)
            earlier = earlier[(earlier >= 0) & last_turn[earlier]]
            if earlier.size:
                needed = sharing.common + int(wanted[n])
                enough = earlier[whole[earlier] >= needed]
                chosen = enough[whole[enough].argmin()] if enough.size else earlier[whole[earlier].argmax()]
                if whole[chosen] > sharing.common:
                    start = blocks[chosen][: min(needed, int(whole[chosen]))]
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
    rounds, rest = np.divmod(even / figures.seconds, 1.0)
    at: Floats = (rounds + np.interp(rest, share, np.linspace(0.0, 1.0, len(share)))) * figures.seconds
    at *= even[-1] / at[-1]
    return at


def distance(drawn: Trace, figures: Figures) -> str:
    """How far a drawn trace is from the one it stands for, in words."""
    at = np.array([arrival.at for arrival in drawn.arrivals])
    prompt, output = (np.array([getattr(a, name) for a in drawn.arrivals]) for name in ("prompt", "output"))
    counts, _ = minutes_of(at)
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
    said = ", ".join(f"{name} {mine} ({published})" for name, mine, published in pairs)
    return f"drawn from the published trace's figures, as its file is not here (--trace-dir); drawn (published): {said}"


def reused_share(trace: Trace) -> float:
    """The share of all blocks of prompts that a cache which forgets nothing has from earlier prompts."""
    known: set[int] = set()
    shared = total = 0
    for arrival in trace.arrivals:
        shared += next((n for n, block in enumerate(arrival.blocks) if block not in known), len(arrival.blocks))
        total += len(arrival.blocks)
        known.update(arrival.blocks)
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
