"""Shared by the tests of servers: the real model, which is loaded once for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server_rig import MODEL

from lamina import LLM


def greedy(llm: LLM) -> LLM:
    """Requests that say nothing of sampling take the likeliest token, not one drawn as the model's maker advises."""
    llm._runtime.inputs._generation_config = {}
    return llm


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """In small batches: an abort waits for one."""
    with LLM(MODEL, threads=1, kv_memory="256MiB", max_batch_tokens=256) as llm:
        yield greedy(llm)


@pytest.fixture(scope="session")
def steady() -> Iterator[LLM]:
    """With a context of 512 tokens. No answer depends on what ran before."""
    options = {"weights": "float32", "prefix_cache": False, "max_model_len": 512}
    with LLM(MODEL, threads=1, kv_memory="256MiB", **options) as llm:  # type: ignore[arg-type]
        yield greedy(llm)
