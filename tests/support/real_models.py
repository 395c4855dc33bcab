"""Real models against transformers: prompts, greedy tokens, and where two tokens are too close to call."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.models.cache import is_whole
from lamina.models.resolve import alias_folder

TIE = 1e-4  # of two logits in float32: closer ones may change places with the order of sums
WORDS = [
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):\n",
    "Water boils at",
    "1, 2, 3, 4, 5,",
    "The three laws of motion are",
    "Dear Sir or Madam,\n",
    "In the year 1969,",
    "Q: What is photosynthesis?\nA:",
    "The quick brown fox jumps over",
    "Ingredients: flour, eggs,",
    "Once more unto the breach,",
    "import numpy as np\n",
    "The most important thing to know about memory is",
    "Überraschung: 日本語 and emoji 🎉 are",
]


def fetched(name: str) -> Path:
    """The folder of the alias `name`; the test is skipped where it was not fetched."""
    if not is_whole(folder := alias_folder(name)):
        pytest.skip(f"{name} is not on this machine: run scripts/fetch_models")
    return folder


def token_prompts(tokenizer: Any, longest: int) -> list[list[int]]:
    """16 prompts as token ids, the last one of `longest` tokens."""
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return [tokenizer(words).input_ids for words in WORDS] + [tokenizer(text[: 10 * longest]).input_ids[:longest]]


def greedy_tokens(model: Any, prompt: Sequence[int], guess: Sequence[int]) -> list[int]:
    """What the transformers `model` (float32) takes greedily after `prompt`, as far as `guess` says the same.

    One forward pass over all of `guess` is enough, since each token follows from those before it. The list ends before
    two logits that are as good as equal, or with the first token that `guess` has not.
    """
    ids = torch.tensor([[*prompt, *guess[:-1]]])
    with torch.no_grad():
        logits = model(ids, logits_to_keep=len(guess)).logits[0]
    wanted: list[int] = []
    for row, token in zip(logits, guess, strict=True):
        first, second = row.topk(2).values
        if first - second < TIE:
            break
        wanted.append(int(row.argmax()))
        if wanted[-1] != token:
            break
    return wanted
