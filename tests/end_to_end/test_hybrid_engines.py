"""Models whose layers keep states, or KV and states, behind the whole engine: greedy text as transformers' own."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_families import FAMILIES, VOCABULARY, written
from real_workers import WorkerProcess, until, worker_process

from lamina import LLM

TOKENS = 16
OPTIONS: dict[str, Any] = {"dtype": "float32", "threads": 1, "page_size": 16, "kv_memory": "16MiB", "lanes": 1}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def workers() -> Iterator[list[WorkerProcess]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(worker_process()) for _ in range(2)]


def prompts() -> list[list[int]]:
    """The last begins as the second does."""
    draw = random.Random(1)
    drawn = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in (3, 90, 41)]
    return [*drawn, [*drawn[1][:70], 5, 6, 7]]


def expected(model: Any) -> list[tuple[int, ...]]:
    found = []
    for prompt in prompts():
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(TOKENS):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        found.append(tuple(ids[-TOKENS:]))
    return found


def texts(folder: Path, workers: list[WorkerProcess], **options: Any) -> list[tuple[int, ...]]:
    for worker in workers:
        until(lambda worker=worker: not worker.status().session)  # the last engine's
    if workers:
        options |= {"attention_workers": [worker.address for worker in workers], "local_share": 0}
    with LLM(folder, max_batch_tokens=64, **OPTIONS | options) as llm:
        return [c.token_ids for c in llm.generate(prompts(), max_tokens=TOKENS, temperature=0, ignore_eos=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_text_in_every_placement(family: str, workers: list[WorkerProcess], tmp_path: Path) -> None:
    """In one process, at one worker, at two by heads; the prompts come in chunks of at most 64 tokens."""
    right = expected(written(family, tmp_path))
    assert texts(tmp_path, []) == right
    assert texts(tmp_path, workers[:1]) == right
    assert texts(tmp_path, workers, lanes=2) == right
