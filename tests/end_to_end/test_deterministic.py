"""One text for a request that runs alone in the engine, whatever ran before it: `deterministic`, in bfloat16."""

from __future__ import annotations

import random

import pytest

from lamina import LLM, SamplingParams

pytestmark = [pytest.mark.data, pytest.mark.real]

PROMPT = [(7 * i) % 4000 + 300 for i in range(70)]  # some pages, and a part of one


def alone(llm: LLM) -> tuple[tuple[int, ...], list[float]]:
    completion = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=48, logprobs=1, ignore_eos=True))[0]
    return tuple(completion.token_ids), [token.logprob for token in completion.logprobs or []]


@pytest.mark.parametrize("attention_workers", [0, 1])
def test_what_ran_before_changes_no_rounding(attention_workers: int) -> None:
    """Hits in the prefix cache, and where the pages of earlier requests lay, gave one request several texts."""
    draw = random.Random(5)
    with LLM(
        "smollm2-135m", dtype="bfloat16", deterministic=True, threads=1, kv_memory="64MiB", max_model_len=512,
        attention_workers=attention_workers,
    ) as llm:  # fmt: skip
        first = alone(llm)
        assert len(first[1]) == 48
        for _ in range(2):
            others = [[draw.randrange(300, 4000) for _ in range(draw.randrange(1, 300))] for _ in range(5)]
            llm.generate([*others, PROMPT], SamplingParams(temperature=1, seed=3, max_tokens=draw.randrange(1, 60)))
            assert alone(llm) == first
