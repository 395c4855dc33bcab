"""A closed loop, quickly: so many users, each of whom asks again when answered, all with prompts of one length.

It is how engines are measured: without the engine's scheduler, which the event loop runs, but with what decides here.
All users begin at once; prompts are taken first come first served in chunks of a batch's tokens, beside those that
decode, or before them (`prefill_first`, as SGLang does); batches go on until the first of them ends, and take what
`System.step` says. A request is admitted where there is room for its prompt and half its output. Preemption and shared
prefixes are left out.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

from lamina.errors import InvalidRequest
from lamina.simulator.costs.bounds import number_within, whole
from lamina.simulator.costs.cost_model import Load
from lamina.simulator.costs.systems import Colocated

_MOST_USERS, _MOST_ROUNDS, _MOST_TOKENS = 1 << 14, 1000, 1 << 24
_GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it modulo 1 are spread evenly, however many there are."""


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Means over a run, in seconds: of the users' first requests, which all come at once, and of those that follow."""

    first_ttft: float
    ttft: float
    tpot: float

    def mean_ttft(self, first: float) -> float:
        """Over a run of which the share `first` are users' first requests."""
        return first * self.first_ttft + (1 - first) * self.ttft


@dataclass(slots=True)
class _Prompt:
    arrival: float
    done: int = 0


def closed_loop(
    system: Colocated,
    users: int,
    prompt: int,
    output: int,
    *,
    rounds: int = 4,
    variation: float = 0.1,
    prefill_first: bool = False,
) -> ClosedLoop:
    """`rounds` requests of each user. Outputs are spread evenly between 1 - `variation` and 1 + `variation` times
    `output`: with 0 all users stay in step, which no server with real users sees. Raises InvalidRequest."""
    whole("users", users, 1, _MOST_USERS)
    whole("rounds", rounds, 2, _MOST_ROUNDS)
    whole("prompt", prompt, 1, _MOST_TOKENS)
    whole("output", output, 2, _MOST_TOKENS)
    number_within("variation", variation, 0, 0.9)
    slots = min(users, system.max_sequences, int(system.kv_tokens / (prompt + output / 2)))
    if slots < 1:
        raise InvalidRequest(
            f"{system.name} has room for {system.kv_tokens} tokens; allowed is one for a prompt of {prompt} and half "
            f"its output"
        )
    return _Run(system, users, prompt, output, slots, variation, prefill_first).go(rounds * users)


class _Run:
    def __init__(
        self, system: Colocated, users: int, prompt: int, output: int, slots: int, variation: float, first: bool
    ) -> None:
        self.system, self.users, self.prompt, self.output = system, users, prompt, output
        self.slots, self.variation, self.prefill_first = slots, variation, first
        self.clock, self.tick = 0.0, 0  # seconds; batches with decode so far
        self.waiting = deque(_Prompt(0.0) for _ in range(users))
        self.started: deque[_Prompt] = deque()
        self.decoding: list[tuple[int, int, float, int]] = []  # the tick it ends at, number, first token, tokens
        self.context = 0.0  # tokens of KV of all that decode
        self.ttfts: list[float] = []
        self.tpots: list[float] = []

    def go(self, requests: int) -> ClosedLoop:
        while len(self.tpots) < requests:
            done = self._step()
            self._end()
            for each in done:
                self._begin(each)
        overhead = self.system.device.efficiency.before_first_token(self.prompt)
        first = self.ttfts[: self.users]
        later = self.ttfts[self.users : requests]
        return ClosedLoop(
            overhead + sum(first) / len(first), overhead + sum(later) / len(later), sum(self.tpots) / len(self.tpots)
        )

    def _step(self) -> list[_Prompt]:
        """One batch with prompts, or all until the next sequence ends; the prompts that it completes."""
        rows = len(self.decoding)
        budget = self.system.max_batch_tokens - (0 if self.prefill_first else rows)
        tokens, pairs, keys = 0, 0, 0
        done: list[_Prompt] = []
        while budget > 0:
            if not self.started:
                if not self.waiting or rows + len(done) >= self.slots:
                    break
                self.started.append(self.waiting.popleft())
            each = self.started[0]
            chunk = min(budget, self.prompt - each.done)
            pairs += chunk * each.done + chunk * (chunk + 1) // 2
            each.done += chunk
            tokens, keys, budget = tokens + chunk, keys + each.done, budget - chunk
            if each.done == self.prompt:
                done.append(self.started.popleft())
        steps = 1
        if tokens and self.prefill_first:
            rows = 0
        elif not tokens:
            steps = max(1, self.decoding[0][0] - self.tick)
        context = self.context / rows + (steps - 1) / 2 if rows else 0.0
        self.clock += steps * self.system.step(Load(rows, context, tokens, pairs, keys, prompts=len(done))).seconds
        if rows:
            self.tick += steps
            self.context += steps * rows
        return done

    def _begin(self, each: _Prompt) -> None:
        """The first token of a prompt is there."""
        self.ttfts.append(self.clock - each.arrival)
        number = len(self.ttfts)
        spread = self.variation * (2 * (number * _GOLDEN % 1) - 1)
        output = max(2, round(self.output * (1 + spread)))
        heapq.heappush(self.decoding, (self.tick + output - 1, number, self.clock, output))
        self.context += self.prompt + 1

    def _end(self) -> None:
        while self.decoding and self.decoding[0][0] <= self.tick:
            _, _, first, output = heapq.heappop(self.decoding)
            self.tpots.append((self.clock - first) / (output - 1))
            self.context -= self.prompt + output
            self.waiting.append(_Prompt(self.clock))
