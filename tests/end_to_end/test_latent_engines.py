"""Latent attention through whole engines: DeepSeek and MiniCPM3 over attention workers, ranks and lost workers."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_workers import WorkerProcess, until, worker_process, write_tiny_model

from lamina import LLM
from lamina.errors import InvalidRequest
from lamina_protocols.messages.layers import HolderConfig
from lamina_workers.attention_worker.page_layout import page_bytes
from lamina_workers.errors import PolicyError, RanksError
from lamina_workers.model_config.config import ModelConfig

LATENT = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24}
LATENT |= {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": None}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "n_group": 4, "topk_group": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": LATENT | EXPERTS | {"architectures": ["DeepseekV2ForCausalLM"], "q_lora_rank": None},
    "deepseek_v3": LATENT | EXPERTS | {"architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 1},
    "minicpm3": LATENT | {"architectures": ["MiniCPM3ForCausalLM"], "tie_word_embeddings": False},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
rng = random.Random(31)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (1, 17, 70, 150)]
SHARED = [rng.randrange(101) for _ in range(80)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(folder / name, **config) for name, config in FAMILIES.items()}


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    with worker_process() as process:
        yield process


def engine(model: Path, **config: Any) -> LLM:
    """Small pools and chunks, float32: texts can be compared."""
    options = {"dtype": "float32", "kv_memory": "8MiB", "page_size": 16, "max_model_len": 1024, "max_batch_tokens": 64}
    return LLM(model, **options | {"threads": 1, "local_share": 0} | config)


def texts(llm: LLM, prompts: list[list[int]] = PROMPTS, max_tokens: int = 24) -> list[tuple[int, ...]]:
    found = llm.generate(prompts, max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return [completion.token_ids for completion in found]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deepseek_v3_keeps_576_numbers_a_token_and_layer(dtype: str) -> None:
    config = ModelConfig.from_dict(
        {"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432}
        | {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536}
        | {"max_position_embeddings": 4096}
    )
    specs = config.layer_specs()
    assert {(spec.kind, spec.kv_heads, spec.group, spec.own_v) for spec in specs} == {("latent", 1, 128, 0)}
    size = {"float32": 4, "bfloat16": 2}[dtype]
    assert page_bytes(HolderConfig(specs, 32, dtype, 1)) == 32 * (512 + 64) * size


@pytest.mark.real
@pytest.mark.parametrize("family", FAMILIES)
def test_one_text_in_every_placement(family: str, models: dict[str, Path]) -> None:
    with engine(models[family]) as llm:
        expected = texts(llm)
    for placement in (
        {"attention_workers": 1},
        {"attention_workers": 1, "query_first": "always"},
        {"attention_workers": 2, "shard": "sequence"},
        {"model_workers": 2},
        {"model_workers": 2, "attention_workers": 1},
    ):
        with engine(models[family], **placement) as llm:
            assert texts(llm) == expected, placement


def first_logprobs(model: Path, **config: Any) -> dict[tuple[int, int], float]:
    """The 20 likeliest tokens behind each prompt, by number of the prompt and token."""
    with engine(model, **config) as llm:
        found = llm.generate(PROMPTS, max_tokens=1, temperature=0, ignore_eos=True, logprobs=20)
    return {(n, each.token_id): each.logprob for n, answer in enumerate(found) for each in answer.logprobs[0].top}


def differ(exact: dict[tuple[int, int], float], rounded: dict[tuple[int, int], float]) -> float:
    """The difference that a quarter exceeds, as a share of the spread: where rounding chooses another expert, all of
    that prompt move by more."""
    both = exact.keys() & rounded.keys()
    assert len(both) > 0.8 * len(exact)
    off_by = sorted(abs(exact[key] - rounded[key]) for key in both)
    return off_by[len(off_by) * 3 // 4] / (max(exact.values()) - min(exact.values()))


@every_family
@pytest.mark.parametrize("attention", [0, pytest.param(1, marks=pytest.mark.real)])
def test_bfloat16_changes_first_tokens_by_little(family: str, attention: int, models: dict[str, Path]) -> None:
    exact = first_logprobs(models[family])
    assert 0 < differ(exact, first_logprobs(models[family], dtype="bfloat16", attention_workers=attention)) < 0.1


def test_a_worker_reached_over_grpc_and_without_compiled_exchanges(
    models: dict[str, Path], worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(models["deepseek_v3"]) as llm:
        expected = texts(llm)
    for way in ({"local_channel": False}, {"python": True}):
        if way.pop("python", False):
            monkeypatch.setenv("LAMINA_EXCHANGE", "python")
        until(lambda: not worker.status().session)  # the last engine's
        with engine(models["deepseek_v3"], attention_workers=[worker.address], **way) as llm:
            assert texts(llm) == expected


def test_heads_cannot_be_cut(models: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequest, match="with 2 attention_workers, but the model has one KV head"):
        engine(models["deepseek_v3"], attention_workers=2, shard="heads")
    with pytest.raises(RanksError, match=r"4 ranks cannot share a latent.*: 4 must divide the 6 query heads"):
        engine(models["deepseek_v3"], model_workers=4)


@pytest.mark.parametrize("attention", [0, pytest.param(1, marks=pytest.mark.real)])
def test_prefixes_and_preemption(models: dict[str, Path], attention: int) -> None:
    prompts = [SHARED + [at] * (at + 1) for at in range(6)]
    with engine(models["deepseek_v2"]) as llm:
        expected = texts(llm, prompts, 100)
    # Room for about three of the six at a time: a token takes 3 layers * 48 numbers * 4 bytes.
    with engine(models["deepseek_v2"], attention_workers=attention, kv_memory=600 * 576, max_model_len=512) as llm:
        counters = llm._runtime.engine._scheduler.counters  # type: ignore[union-attr]
        assert texts(llm, prompts, 100) == expected
        assert counters.preempted > 0
        assert texts(llm, prompts, 100) == expected
        assert counters.reused_tokens > 0


@pytest.mark.real
def test_a_worker_killed_changes_no_text(models: dict[str, Path]) -> None:
    with engine(models["deepseek_v3"]) as llm:
        expected = texts(llm, max_tokens=400)
    with engine(models["deepseek_v3"], attention_workers=2, shard="sequence") as llm:
        members = llm._runtime.pools.attention.workers  # type: ignore[union-attr]

        def kill() -> None:
            time.sleep(0.5)
            os.kill(members.status()[0].process or 0, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        assert texts(llm, max_tokens=400) == expected
        killer.join()
        names = llm._runtime.engine._holders.names  # type: ignore[union-attr]
        until(lambda: sorted(names.values()) == ["attention-0.1", "attention-1"], 30.0)


@pytest.mark.real
def test_a_static_policy_works_and_one_with_sketches_is_refused(models: dict[str, Path]) -> None:
    narrow = {"policy": "streaming(sink=2,recent=24)"}
    with engine(models["minicpm3"]) as llm:
        everything = texts(llm)
    with engine(models["minicpm3"], **narrow) as llm:
        expected = texts(llm)
    assert expected != everything
    with engine(models["minicpm3"], attention_workers=1, **narrow) as llm:
        assert texts(llm) == expected
    with pytest.raises(PolicyError, match=r"sketches are not made of latents.*allowed here are static policies"):
        engine(models["minicpm3"], policy="page_top_k")


def test_int8_changes_first_tokens_by_little(models: dict[str, Path]) -> None:
    exact = first_logprobs(models["minicpm3"])
    assert 0 < differ(exact, first_logprobs(models["minicpm3"], kv_dtype="int8")) < 0.2
