"""One policy's outcomes beside the full cache's, by task and over all tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamina.messages.engine_request import KvSavings

from .measures import Quality, Score, quality, score
from .running import Outcome, all_of, held_share, missed_share, read_share
from .tasks import Prompt, Task

ALL = "all"


@dataclass(frozen=True, slots=True)
class Compared:
    """A policy beside the full cache in one task."""

    quality: Quality
    score: Score
    usage: KvSavings

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "quality": dataclasses.asdict(self.quality),
            "answers": dataclasses.asdict(self.score),
            "usage": self.usage._asdict(),
            "read": read_share(self.usage),
            "held": held_share(self.usage),
            "missed": missed_share(self.usage),
        }


Outcomes = Sequence[Mapping[str, Outcome]]
"""Of each prompt, the outcome of each task."""


def compare(prompts: Sequence[Prompt], full: Outcomes, other: Outcomes) -> dict[str, Compared]:
    """By task, and over all tokens of all tasks as `ALL`."""
    compared, every = {}, []
    for task in prompts[0].tasks:
        name = task.name
        tasks = [next(of for of in prompt.tasks if of.name == name) for prompt in prompts]
        pair = tuple(all_of([each[name] for each in outcomes]) for outcomes in (full, other))
        targets = torch.tensor([token for of in tasks for token in of.tokens])
        right = [
            [x for of, each in zip(tasks, outcomes, strict=True) for x in found(of, each[name].logits)]
            for outcomes in (full, other)
        ]
        compared[name] = Compared(quality(pair[0].logits, pair[1].logits, targets), score(*right), pair[1].usage)
        every.append(compared[name])
    compared[ALL] = Compared(
        _mean([each.quality for each in every]),
        Score(*map(sum, zip(*(dataclasses.astuple(each.score) for each in every), strict=True))),
        KvSavings.of([each.usage for each in every]),
    )
    return compared


def found(task: Task, logits: torch.Tensor) -> list[bool]:
    """Whether each answer of a task is what the model finds likeliest."""
    likeliest = logits.argmax(-1).tolist()
    return [all(likeliest[at] == task.tokens[at] for at in answer) for answer in task.answers]


def _mean(of: Sequence[Quality]) -> Quality:
    """Over the tokens of several tasks."""
    total = sum(each.tokens for each in of)

    def mean(name: str) -> float:
        return float(sum(getattr(each, name) * each.tokens for each in of) / total)

    change, full_nll = mean("change"), mean("full_nll")
    return Quality(
        tokens=total,
        nll=mean("nll"),
        full_nll=full_nll,
        change=change,
        error=sum((each.error * each.tokens) ** 2 for each in of) ** 0.5 / total,
        relative=change / full_nll if full_nll > 0 else 0.0,
        divergence=mean("divergence"),
        worst=max(each.worst for each in of),
        agreement=mean("agreement"),
    )
