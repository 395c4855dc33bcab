"""Whole engines over attention workers that serve one engine after another, and what their texts are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from real_workers import WorkerProcess, until

from lamina import LLM

Prompts = Sequence[Sequence[int]]


def engine(folder: Path, workers: Sequence[WorkerProcess] = (), **options: Any) -> LLM:
    """Small pools and chunks, float32: texts can be compared. It waits until the workers' last engine is gone."""
    for worker in workers:
        until(lambda worker=worker: not worker.status().session)  # type: ignore[misc]
    if workers:
        options["attention_workers"] = [worker.address for worker in workers]
    if options.get("attention_workers"):
        options = {"local_share": 0} | options
    small = {"dtype": "float32", "threads": 1, "page_size": 16, "kv_memory": "16MiB", "max_batch_tokens": 64}
    return LLM(folder, **small | {"lanes": 1} | options)


def texts(llm: LLM, prompts: Prompts, max_tokens: int) -> list[tuple[int, ...]]:
    """Greedy tokens."""
    completions = llm.generate(prompts, max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return [completion.token_ids for completion in completions]


def streamed(
    llm: LLM, prompts: Prompts, max_tokens: int, after: Callable[[int], object] = lambda count: None
) -> list[tuple[int, ...]]:
    """Greedy tokens as they come; `after` is called after each, with how many there are of all prompts."""
    tokens: list[list[int]] = [[] for _ in prompts]
    events = llm.stream(prompts, max_tokens=max_tokens, temperature=0, ignore_eos=True)
    for count, event in enumerate(events, 1):
        tokens[event.prompt_index].append(event.token_id)
        after(count)
    return list(map(tuple, tokens))


def greedy(model: Any, prompts: Prompts, max_tokens: int) -> list[tuple[int, ...]]:
    """Greedy tokens of a model of transformers, which computes the whole text for each."""
    tokens = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(max_tokens):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        tokens.append(tuple(ids[-max_tokens:]))
    return tokens


def first_logprobs(llm: LLM, prompts: Prompts) -> dict[tuple[int, int], float]:
    """The 20 likeliest tokens behind each prompt, by number of the prompt and token."""
    completions = llm.generate(prompts, max_tokens=1, temperature=0, ignore_eos=True, logprobs=20)
    tops = [(number, top) for number, each in enumerate(completions) for top in each.logprobs[0].top]
    return {(number, top.token_id): top.logprob for number, top in tops}


def shifts(exact: dict[tuple[int, int], float], rounded: dict[tuple[int, int], float]) -> list[float]:
    """By how much rounding moved each log probability, as a share of their spread, in order. Where it chooses another
    expert or key, all of that prompt move far."""
    both = exact.keys() & rounded.keys()
    assert len(both) > 0.8 * len(exact)
    spread = max(exact.values()) - min(exact.values())
    return sorted(abs(exact[key] - rounded[key]) / spread for key in both)


def third_quartile(values: list[float]) -> float:
    return values[len(values) * 3 // 4]
