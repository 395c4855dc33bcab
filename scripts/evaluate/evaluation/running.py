"""A prompt's tasks through a `Probe`: all at once, each in a fork of the prompt, one given token a step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lamina.measure.probe import Probe
from lamina.messages.engine_request import NOTHING_SPARED, KvSavings

from .kept_kv import KeptKV
from .tasks import Prompt, Task

Progress = Callable[[int], None]
"""Gets the number of tokens fed since its last call."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a task: what the model predicts in the place of each token, float32 `[tokens, vocab]`, and what was read."""

    logits: torch.Tensor
    usage: KvSavings


def read_tasks(probe: Probe, kept: KeptKV, prompt: Prompt, chunk: int, progress: Progress) -> dict[str, Outcome]:
    """The outcome of each task, by name. The prompt's last token is fed in decode, so each token of a task is predicted
    there, where policies choose."""
    base = kept.begin(probe, prompt.tokens[:-1], chunk, progress)
    handles = {task.name: probe.fork(base) for task in prompt.tasks}
    fed = {task.name: (prompt.tokens[-1], *task.tokens[:-1]) for task in prompt.tasks}
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in handles}
    for step in range(max(map(len, fed.values()))):
        going = [name for name, tokens in fed.items() if step < len(tokens)]
        found = probe.step([(handles[name], fed[name][step]) for name in going])
        for name, row in zip(going, found, strict=True):
            logits[name].append(row)
        progress(len(going))
    outcomes = {}
    for name, handle in handles.items():
        outcomes[name] = Outcome(torch.stack(logits[name]), probe.usage(handle) or NOTHING_SPARED)
        probe.close(handle)
    probe.close(base)
    return outcomes


def known(kept: KeptKV, prompt: Prompt, kv_dtype: str) -> dict[str, Outcome] | None:
    """What the full cache has predicted in an earlier run; None where some task is new."""
    files = {task.name: _file(kept, prompt, task, kv_dtype) for task in prompt.tasks}
    if not all(file.is_file() for file in files.values()):
        return None
    return {name: Outcome(torch.from_numpy(np.load(file)), NOTHING_SPARED) for name, file in files.items()}


def keep(kept: KeptKV, prompt: Prompt, kv_dtype: str, outcomes: dict[str, Outcome]) -> None:
    """Keep what the full cache predicts, beside the prompt's K and V."""
    for task in prompt.tasks:
        np.save(_file(kept, prompt, task, kv_dtype), outcomes[task.name].logits.numpy())


def _file(kept: KeptKV, prompt: Prompt, task: Task, kv_dtype: str) -> Path:
    key = hashlib.sha256(json.dumps([kv_dtype, task.tokens]).encode()).hexdigest()[:16]
    return kept.path(prompt.tokens[:-1]) / f"{task.name}.{key}.npy"


def all_of(outcomes: list[Outcome]) -> Outcome:
    """Of several prompts' tasks of the same name."""
    return Outcome(torch.cat([each.logits for each in outcomes]), KvSavings.of([each.usage for each in outcomes]))


def read_share(usage: KvSavings) -> float:
    """Bytes read in decode, as a share of reading everything."""
    return usage.read / usage.whole if usage.whole else 1.0


def held_share(usage: KvSavings) -> float:
    """Pages held at the end, as a share of keeping everything."""
    return usage.held / usage.kept if usage.kept else 1.0


def missed_share(usage: KvSavings) -> float:
    """The mean attention mass that a query did not read, as the policies estimate it."""
    return usage.missed / usage.queries if usage.queries else 0.0
