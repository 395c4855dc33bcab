"""Allocations that fail in the engine's process: the batch runs again, and no token changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from real_workers import write_tiny_model

from lamina import LLM
from lamina.engine import batch
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.decoder.model import Decoder
from lamina_workers.model_worker import model_worker

PLACES = {
    "the batch's input": (batch, "batch_work"),
    "attention": (AttentionWorker, "handle"),
    "dense layers": (Decoder, "forward"),
    "sampling": (model_worker, "sample"),
}
ERRORS = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA")]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(write_tiny_model(tmp_path_factory.mktemp("tiny")), dtype="float32", kv_memory="4M", threads=1) as llm:
        yield llm


@pytest.mark.fault("F12")
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES)
def test_a_failed_allocation_costs_no_token(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    prompts = [[1, 2, 3], list(range(60))]
    expected = [completion.token_ids for completion in llm.generate(prompts, max_tokens=12, temperature=0)]
    owner, name = PLACES[place]
    right, calls = getattr(owner, name), [0]

    def failing(*what: object, **how: object) -> object:
        calls[0] += 1
        if calls[0] in (2, 5):
            raise error
        return right(*what, **how)

    monkeypatch.setattr(owner, name, failing)
    again = [completion.token_ids for completion in llm.generate(prompts, max_tokens=12, temperature=0)]
    assert again == expected
    assert calls[0] > 5
    llm._runtime.engine._scheduler.check_integrity()  # type: ignore[union-attr]
