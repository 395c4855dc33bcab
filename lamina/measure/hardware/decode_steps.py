"""Decode steps of an engine that runs here, measured.

A step is the median gap between two tokens of a sequence while all sequences decode and none is in prefill. The step of
a list of times is a pure function.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lamina.errors import EngineError, InvalidRequest
from lamina.system.progress import Progress

if TYPE_CHECKING:
    from lamina.llm import LLM

TOKENS = 48
"""Steps that a cell measures."""
CHUNK = 512
"""Prompt tokens that a step takes in at least, while others wait for their first token."""
_SHORT = 64
"""Tokens of the prompt that warms an engine up."""
_TOGETHER = 0.1
"""Of the mean gap of a sequence: tokens that are nearer than that came of one step, which verified drafts."""

Times = Sequence[Sequence[float]]
"""Of each sequence: when each of its tokens came, in seconds."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A decode step of `batch` sequences, each of which read `context` tokens of KV in the mean.

    `seconds` is the median, `low` and `high` are the quartiles over `gaps` gaps, `p99` the 99th percentile. `first`:
    seconds from the start until all sequences had their first token. `tokens`: of a sequence in a step, in the mean.
    """

    batch: int
    context: float
    seconds: float
    low: float
    high: float
    gaps: int
    first: float
    p99: float = 0.0
    tokens: float = 1.0


def measure(llm: LLM, batch: int, context: int, tokens: int = TOKENS, seed: int = 0, drafts: bool = False) -> Measured:
    """Decode `batch` random prompts of `context` tokens, greedily and past any end token, and time the steps; with
    `drafts` a step may give a sequence several tokens.

    `llm` should have no prefix cache and be idle. Raises InvalidRequest where that is longer than it can take,
    EngineError where the sequences did not decode together for long enough.
    """
    if batch < 1 or context < 1 or tokens < 2:
        raise InvalidRequest(f"batch {batch}, context {context}, tokens {tokens}; allowed are 1, 1 and 2 or more")
    count = needed(batch, context, tokens)
    if context + count > llm.max_model_len:
        raise InvalidRequest(
            f"context is {context}, and {count} tokens are decoded after it; allowed are {llm.max_model_len} together"
        )
    random_ids = random.Random(seed)
    vocabulary = _vocabulary(llm)
    prompts = [[random_ids.randrange(vocabulary) for _ in range(context)] for _ in range(batch)]
    times: list[list[float]] = [[] for _ in prompts]
    start = time.perf_counter()
    for event in llm.stream(prompts, max_tokens=count, ignore_eos=True, temperature=0):
        times[event.prompt_index].append(time.perf_counter() - start)
    return steady(times, context, tokens // 2, drafts)


def measure_in_turn(
    llm: LLM,
    cells: Sequence[tuple[int, int]],
    tokens: int,
    rounds: int,
    progress: Progress | None,
    drafts: bool = False,
) -> Iterator[tuple[tuple[int, int], Measured]]:
    """Measure each (batch, context) in turn, `rounds` times, after a step that warms up."""
    measure(llm, 1, _SHORT, tokens=8)
    for number in range(rounds):
        for index, (batch, context) in enumerate(cells):
            if progress is not None:
                progress("measuring", number * len(cells) + index, rounds * len(cells))
            yield (batch, context), measure(llm, batch, context, tokens, number, drafts)
    if progress is not None:
        progress("measuring", rounds * len(cells), rounds * len(cells))


def needed(batch: int, context: int, tokens: int) -> int:
    """Tokens for each sequence, so that the first still decodes `tokens` when the last one's prompt is through."""
    return tokens + (batch - 1) * (context // CHUNK + 1)


def steady(times: Times, context: int, least: int, drafts: bool = False) -> Measured:
    """The step while every sequence decodes. Raises EngineError where there are less than `least` gaps of it. With
    `drafts`, tokens that came together count as one step's."""
    begin, end = max(token_times[0] for token_times in times), min(token_times[-1] for token_times in times)
    gaps, read = [], []
    for token_times in times:
        nearest = _TOGETHER * (token_times[-1] - token_times[0]) / max(1, len(token_times) - 1) if drafts else -1.0
        step = token_times[0]
        for number, (before, after) in enumerate(pairwise(token_times), 1):
            if begin <= before and after <= end:
                read.append(context + number)  # the token that is fed in attends itself
                if after - before > nearest:
                    gaps.append(after - step)
            if after - before > nearest:
                step = after
    if len(read) < max(2, least) or len(gaps) < 2:
        raise EngineError(f"all sequences decoded together for {len(read)} gaps, too few to measure a step")
    low, middle, high = statistics.quantiles(gaps, n=4, method="inclusive")
    p99 = statistics.quantiles(gaps, n=100, method="inclusive")[-1]
    return Measured(len(times), statistics.fmean(read), middle, low, high, len(gaps), begin, p99, len(read) / len(gaps))


def _vocabulary(llm: LLM) -> int:
    from lamina_workers.converted.models import model_config

    return model_config(llm.model_path).vocab_size
