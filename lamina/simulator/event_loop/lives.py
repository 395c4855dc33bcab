"""What becomes of requests in the event loop, and sums: over the prompts of a batch, and over the batches of an
instance."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

from lamina.simulator.costs.cost_model import Load
from lamina.simulator.event_loop.statistics import Samples
from lamina.simulator.traces.arrivals import Arrival


@dataclass(slots=True)
class Life:
    """One request: when it arrived (`at`), had its first and its last token, and how many it has."""

    arrival: Arrival
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    at: float = -1.0

    def __post_init__(self) -> None:
        if self.at < 0:  # it did not wait for another
            self.at = self.arrival.at


@dataclass(slots=True)
class PromptRows:
    """The rows of prompts in one batch, added up: see `Load` for the sums."""

    tokens: int = 0
    pairs: float = 0.0
    keys: float = 0.0
    prefix_tokens: int = 0
    prefix_pairs: float = 0.0
    prompts: int = 0

    def add(self, start: int, count: int, prompt: int, elsewhere: int) -> None:
        """A row of `count` tokens from `start` on, of a prompt of so many; `elsewhere` of those before it are read
        where decode reads."""
        self.tokens += count
        self.prompts += start + count >= prompt
        self.pairs += count * (start - elsewhere + (count + 1) / 2)
        self.keys += start - elsewhere + count
        if elsewhere:
            self.prefix_tokens += count
            self.prefix_pairs += count * elsewhere

    def load(self, decode: int, context: int) -> Load:
        """The batch with so many sequences in decode besides, which have so many tokens in all."""
        return Load(
            decode,
            context / decode if decode else 0.0,
            self.tokens,
            self.pairs,
            self.keys,
            self.prefix_tokens,
            self.prefix_pairs,
            self.prompts,
        )


@dataclass(slots=True)
class Totals:
    """Sums over the steps of one instance or several. `busy`: seconds of model tier, attention and network; `gaps`: how
    often each time between two tokens of a sequence came; `losses`: of workers; `recomputed`: tokens whose KV went with
    them and was not elsewhere."""

    steps: int = 0
    busy: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    decode_seconds: float = 0.0
    decode_rows: float = 0.0
    peak: int = 0
    link_bytes: float = 0.0
    saturated_seconds: float = 0.0
    saturated_tokens: int = 0
    saturated_rows: float = 0.0
    reused: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    rejected: int = 0
    losses: int = 0
    recomputed: int = 0
    gaps: Counter[float] = field(default_factory=Counter)
    samples: Samples = field(default_factory=Samples)

    def count(
        self,
        seconds: float,
        busy: tuple[float, float, float],
        link_bytes: float,
        decode: int,
        waiting: int,
        steps: int = 1,
    ) -> None:
        """A batch of so many seconds, with so many sequences in decode while others wait; or `steps` of them, while
        none waits."""
        self.steps += steps
        for tier, part in enumerate(busy):
            self.busy[tier] += part
        self.link_bytes += link_bytes
        if decode:
            self.peak = max(self.peak, decode)
            self.decode_seconds += seconds
            self.decode_rows += seconds * decode
        if waiting > 0:
            self.saturated_seconds += seconds
            self.saturated_tokens += decode
            self.saturated_rows += seconds * decode

    def add(self, other: Totals) -> None:
        """All but the samples."""
        for item in fields(self):
            mine, more = getattr(self, item.name), getattr(other, item.name)
            if item.name == "peak":
                self.peak = max(mine, more)
            elif item.name == "busy":
                self.busy = [a + b for a, b in zip(mine, more, strict=True)]
            elif item.name != "samples":
                setattr(self, item.name, mine + more)
