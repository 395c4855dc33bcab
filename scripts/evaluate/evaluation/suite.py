"""All texts, tasks and heads of an evaluation, run with one policy; and one policy's run beside the full cache's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from lamina.errors import InvalidRequest
from lamina.measure.probe import Probe

from .heads import Fidelity, read_heads
from .measures import Quality, Score, quality, score
from .running import (
    Limits,
    Progress,
    Total,
    answers,
    read_texts,
)
from .tasks import Ids, Item


@dataclass(frozen=True, slots=True)
class Suite:
    """The texts and tasks that every policy is measured on. `texts` by source; the last `steps` tokens of each text are
    predicted. `heads` is the text whose heads are looked at, in its last `head_steps` tokens; empty: none is."""

    texts: Mapping[str, Sequence[Ids]]
    items: Sequence[Item]
    heads: Ids = ()
    steps: int = 128
    head_steps: int = 8

    def __post_init__(self) -> None:
        shortest = min((len(text) for of in self.texts.values() for text in of), default=self.steps + 2)
        if not 2 <= self.steps <= shortest - 2:
            raise InvalidRequest(f"steps is {self.steps}; allowed are 2 to {shortest - 2} with these texts")
        if self.heads and not 2 <= self.head_steps < len(self.heads):
            raise InvalidRequest(f"head_steps is {self.head_steps}; allowed are 2 to {len(self.heads) - 1}")

    @property
    def tokens(self) -> int:
        """How many tokens a run feeds."""
        texts = sum(len(text) - 1 for of in self.texts.values() for text in of)
        return texts + sum(len(item.prompt) + len(item.answer) - 1 for item in self.items) + len(self.heads)

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        sequences = [*(len(text) for of in self.texts.values() for text in of), len(self.heads)]
        return max([*sequences, *(len(item.prompt) + len(item.answer) for item in self.items)])


@dataclass(slots=True)
class Run:
    """What one policy made of a suite. `logits` and `targets` by source, as `read_texts` returns them; `right` by item
    as `answers` does; `usage` by texts, items and heads."""

    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    right: list[list[bool]] = field(default_factory=list)
    heads: Fidelity | None = None
    usage: dict[str, Total] = field(default_factory=dict)


def run(probe: Probe, suite: Suite, limits: Limits, progress: Progress = lambda tokens: None) -> Run:
    """Run the whole suite on a probe. The probe has the policy."""
    done = Run()
    for source, texts in suite.texts.items():
        total = done.usage.setdefault("texts", Total())
        done.logits[source], done.targets[source] = read_texts(probe, texts, suite.steps, limits, total, progress)
    if suite.items:
        total = done.usage.setdefault("items", Total())
        done.right = list(answers(probe, suite.items, limits, total, progress))
    if suite.heads:
        total = done.usage.setdefault("heads", Total())
        done.heads = read_heads(probe, suite.heads, suite.head_steps, total, progress, limits.chunk)
    return done


@dataclass(frozen=True, slots=True)
class Comparison:
    """A policy beside the full cache: `texts` by source, `tasks` by name, `items` by task and name."""

    texts: Mapping[str, Quality]
    tasks: Mapping[str, Score]
    items: Mapping[str, Mapping[str, Score]]
    heads: Fidelity | None
    usage: Mapping[str, Total]

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, lists and texts; heads as `[layers][heads]`, null where nothing is known."""
        return {
            "texts": {source: dataclasses.asdict(of) for source, of in self.texts.items()},
            "tasks": {task: _score(of) for task, of in self.tasks.items()},
            "items": {task: {name: _score(of) for name, of in by.items()} for task, by in self.items.items()},
            "heads": None if self.heads is None else {
                name: _rows(getattr(self.heads, name)) for name in ("cosine", "error", "mass")
            },
            "usage": {
                part: dataclasses.asdict(of)
                | {name: getattr(of, name) for name in ("read_share", "held_share", "missed_share")}
                for part, of in self.usage.items()
            },
        }  # fmt: skip


def compare(suite: Suite, full: Run, other: Run, gate: float) -> Comparison:
    """`other` beside `full`, both of the same suite. A task counts where the full cache gives `gate` of its answers."""
    by_task: dict[str, dict[str, list[int]]] = {}
    for number, item in enumerate(suite.items):
        by_task.setdefault(item.task, {}).setdefault(item.name, []).append(number)
    return Comparison(
        texts={source: quality(full.logits[source], other.logits[source], of) for source, of in full.targets.items()},
        tasks={task: _scored(list(chain(*by_name.values())), full, other, gate) for task, by_name in by_task.items()},
        items={
            task: {name: _scored(numbers, full, other, gate) for name, numbers in by_name.items()}
            for task, by_name in by_task.items()
        },
        heads=other.heads,
        usage=other.usage,
    )


def _scored(numbers: Sequence[int], full: Run, other: Run, gate: float) -> Score:
    return score(
        [right for number in numbers for right in full.right[number]],
        [right for number in numbers for right in other.right[number]],
        gate,
    )


def _score(of: Score) -> dict[str, Any]:
    return dataclasses.asdict(of) | {"share": of.share}


def _rows(of: torch.Tensor) -> list[list[float | None]]:
    return [[None if x != x else round(x, 6) for x in row] for row in of.tolist()]
