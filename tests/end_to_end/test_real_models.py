"""Real models of several families: greedy tokens are those of transformers, whatever attention workers there are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_export import export
from real_models import fetched, greedy_tokens, token_prompts
from real_workers import WorkerProcess, worker_process

from lamina import LLM, InvalidRequest
from lamina.models.resolve import resolve
from lamina_workers.model_config.config import ModelConfig

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

LENGTH = 64
KV_MEMORY = 512 << 20
SAMPLING: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0, "repetition_penalty": 1, "ignore_eos": True}


MODELS = [
    pytest.param("smollm2-135m", marks=pytest.mark.data),
    "gemma-3-270m",
    pytest.param("qwen2.5-coder-0.5b", marks=pytest.mark.soak),
]


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest) -> Path:
    return resolve(request.param) if request.param == "smollm2-135m" else fetched(request.param)


@pytest.fixture(scope="module")
def prompts(path: Path) -> list[list[int]]:
    return token_prompts(transformers.AutoTokenizer.from_pretrained(path), 4000)


@contextlib.contextmanager
def running(path: Path, **options: Any) -> Iterator[LLM]:
    with LLM(path, weights="float32", kv_memory=KV_MEMORY, max_model_len=5000, **options) as llm:
        yield llm


@contextlib.contextmanager
def distributed(path: Path, count: int, shard: str) -> Iterator[tuple[LLM, list[WorkerProcess]]]:
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker_process("--kv-memory", str(KV_MEMORY))) for _ in range(count)]
        addresses = [worker.address for worker in workers]
        yield stack.enter_context(running(path, attention_workers=addresses, shard=shard, local_share=0)), workers


@pytest.fixture(scope="module")
def alone(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens without attention workers."""
    with running(path) as llm:
        return [list(completion.token_ids) for completion in llm.generate(prompts, **SAMPLING)]


@pytest.fixture(scope="module")
def expected(
    path: Path, prompts: list[list[int]], alone: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """Greedy tokens of transformers, each list as far as no two logits are as good as equal."""
    unpacked = export(path, tmp_path_factory.mktemp("unpacked") / "model", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32).eval()
    return [greedy_tokens(model, prompt, tokens) for prompt, tokens in zip(prompts, alone, strict=True)]


def has_one_kv_head(path: Path) -> bool:
    return ModelConfig.from_folder(path).num_key_value_heads == 1


def check(got: list[list[int]], expected: list[list[int]]) -> None:
    assert [tokens[: len(wanted)] for tokens, wanted in zip(got, expected, strict=True)] == expected


def test_greedy_tokens_are_those_of_transformers_one_by_one_and_together(
    path: Path, prompts: list[list[int]], alone: list[list[int]], expected: list[list[int]]
) -> None:
    check(alone, expected)
    assert sum(map(len, expected)) > 0.9 * LENGTH * len(alone)  # few ties
    with running(path, max_batch_tokens=256) as llm:
        for prompt, wanted in zip([*prompts[:3], prompts[-1]], [*expected[:3], expected[-1]], strict=True):
            check([list(llm.generate(prompt, **SAMPLING).token_ids)], [wanted])
        again = llm.generate(prompts[-1], **SAMPLING)  # its prompt is in the prefix cache
        check([list(again.token_ids)], expected[-1:])
        assert again.usage.cached_tokens > 0.9 * len(prompts[-1])


@pytest.mark.parametrize(
    ("count", "shard"), [pytest.param(1, "heads", marks=pytest.mark.soak), (2, "heads"), (2, "sequence")]
)
def test_attention_workers_change_no_token(
    path: Path, prompts: list[list[int]], expected: list[list[int]], count: int, shard: str
) -> None:
    if shard == "heads" and count > 1 and has_one_kv_head(path):
        with pytest.raises(InvalidRequest, match=r"one KV head.*shard='sequence'"), distributed(path, count, shard):
            pass
        return
    with distributed(path, count, shard) as (llm, workers):
        got = [list(completion.token_ids) for completion in llm.generate(prompts, **SAMPLING)]
        assert all(worker.status().queries > 0 for worker in workers)
    check(got, expected)


def test_greedy_tokens_stay_the_same_when_a_worker_is_killed(
    path: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    shard = "sequence" if has_one_kv_head(path) else "heads"
    got: list[list[int]] = [[] for _ in prompts]
    with distributed(path, 2, shard) as (llm, workers):
        for number, event in enumerate(llm.stream(prompts, **SAMPLING)):
            got[event.prompt_index].append(event.token_id)
            if number == LENGTH * len(prompts) // 2:
                workers[1].process.kill()
    check(got, expected)
