"""Texts and tasks through a `Probe`, in batches: what the model predicts, what it answers, what that read and kept.

The probe has the policy. Everything is measured in decode, one token a step, where policies choose what they read; a
prompt is prefilled in chunks before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch

from lamina.measure.probe import Probe
from lamina_protocols.messages import Usage

from .tasks import Item

Progress = Callable[[int], None]
"""Gets the number of tokens fed since its last call."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`batch` sequences at a time, prompts in chunks of `chunk` tokens."""

    batch: int = 4
    chunk: int = 1024


@dataclass(slots=True)
class Total:
    """`Usage` of several sequences; `held` and `kept` as they were at the end of each."""

    read: int = 0
    whole: int = 0
    missed: float = 0.0
    queries: int = 0
    worst: float = 0.0
    held: int = 0
    kept: int = 0

    def add(self, usage: Usage | None) -> None:
        """None: a sequence that was read and kept whole; it is not counted."""
        if usage is None:
            return
        for name in ("read", "whole", "missed", "queries", "held", "kept"):
            setattr(self, name, getattr(self, name) + getattr(usage, name))
        self.worst = max(self.worst, usage.worst)

    @property
    def read_share(self) -> float:
        """Bytes read in decode, as a share of reading everything."""
        return self.read / self.whole if self.whole else 1.0

    @property
    def held_share(self) -> float:
        """Pages held at the end, as a share of keeping everything."""
        return self.held / self.kept if self.kept else 1.0

    @property
    def missed_share(self) -> float:
        """The mean attention mass that a query did not read, as the policies estimate it."""
        return self.missed / self.queries if self.queries else 0.0


def read_texts(
    probe: Probe, texts: Sequence[Sequence[int]], steps: int, limits: Limits, total: Total, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model predicts after each of `steps` given tokens of each text, and what came.

    A text is its prompt, then `steps` tokens and the one after. Returns logits float32 `[texts * steps, vocab]`, by
    text, and targets int64 `[texts * steps]`.
    """
    logits, targets = [], []
    for at in range(0, len(texts), limits.batch):
        batch = texts[at : at + limits.batch]
        prompts = [text[: -steps - 1] for text in batch]
        with _opened(probe, prompts, limits, total, progress) as handles:
            seen = []
            for step in range(steps):
                fed = [(handle, text[step - steps - 1]) for handle, text in zip(handles, batch, strict=True)]
                seen.append(probe.step(fed))
                progress(len(batch))
        logits.append(torch.stack(seen, 1).flatten(0, 1))
        targets += [token for text in batch for token in text[-steps:]]
    return torch.cat(logits), torch.tensor(targets)


def answers(
    probe: Probe, items: Sequence[Item], limits: Limits, total: Total, progress: Progress
) -> Iterator[list[bool]]:
    """For each item, in order, whether each of its answers is right."""
    for at in range(0, len(items), limits.batch):
        batch = items[at : at + limits.batch]
        first: list[int] = []
        with _opened(probe, [item.prompt for item in batch], limits, total, progress, first) as handles:
            said = [[token] for token in first]
            for step in count():
                going = [number for number, item in enumerate(batch) if step < len(item.answer) - 1]
                if not going:
                    break
                fed = [(handles[n], said[n][step] if batch[n].scored is None else batch[n].answer[step]) for n in going]
                likeliest = probe.step(fed).argmax(-1).tolist()
                for number, token in zip(going, likeliest, strict=True):
                    said[number].append(token)
                progress(len(going))
        for item, tokens in zip(batch, said, strict=True):
            right = [a == b for a, b in zip(tokens, item.answer, strict=True)]
            yield [all(right)] if item.scored is None else [right[n] for n in item.scored]


@contextmanager
def _opened(
    probe: Probe,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    total: Total,
    progress: Progress,
    first: list[int] | None = None,
) -> Iterator[list[int]]:
    """Handles of sequences with these prompts; the likeliest next tokens are put into `first`. Closes them."""
    handles = []
    for prompt in prompts:
        handles.append(probe.open())
        logits = probe.prefill(handles[-1], prompt, limits.chunk)
        if first is not None:
            first.append(int(logits.argmax()))
        progress(len(prompt))
    yield handles
    for handle in handles:
        total.add(probe.usage(handle))
        probe.close(handle)
