"""Latent attention through whole engines: how large its pages are, preemption, policies, and what cannot be.
`test_families` has its log probabilities in bfloat16 and int8."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from real_workers import WorkerProcess, write_tiny_model
from tiny_decoders import LATENTS
from whole_engines import engine, texts

from lamina.errors import InvalidRequest
from lamina_protocols.messages.layers import HolderConfig
from lamina_workers.attention_worker.page_layout import page_bytes
from lamina_workers.errors import PolicyError, RanksError
from lamina_workers.model_config.config import ModelConfig

rng = random.Random(31)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (1, 17, 70, 150)]
SHARED = [rng.randrange(101) for _ in range(80)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(folder / name, **config) for name, config in LATENTS.items()}


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


def test_heads_cannot_be_cut(models: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequest, match="with 2 attention_workers, but the model has one KV head"):
        engine(models["deepseek_v3"], attention_workers=2, shard="heads")
    with pytest.raises(RanksError, match=r"4 ranks cannot share a latent.*: 4 must divide the 6 query heads"):
        engine(models["deepseek_v3"], model_workers=4)


def test_prefixes_and_preemption(models: dict[str, Path]) -> None:
    prompts = [SHARED + [at] * (at + 1) for at in range(6)]
    with engine(models["deepseek_v2"]) as llm:
        expected = texts(llm, prompts, 100)
    # Room for about three of the six at a time: a token takes 3 layers * 48 numbers * 4 bytes.
    with engine(models["deepseek_v2"], kv_memory=600 * 576, max_model_len=512) as llm:
        counters = llm._runtime.engine._scheduler.counters  # type: ignore[union-attr]
        assert texts(llm, prompts, 100) == expected
        assert counters.preempted > 0
        assert texts(llm, prompts, 100) == expected
        assert counters.reused_tokens > 0


def test_a_static_policy_works_and_one_with_sketches_is_refused(
    models: dict[str, Path], workers: list[WorkerProcess]
) -> None:
    narrow = {"policy": "streaming(sink=2,recent=24)"}
    with engine(models["minicpm3"]) as llm:
        everything = texts(llm, PROMPTS, 24)
    with engine(models["minicpm3"], **narrow) as llm:
        expected = texts(llm, PROMPTS, 24)
    assert expected != everything
    with engine(models["minicpm3"], workers[:1], **narrow) as llm:
        assert texts(llm, PROMPTS, 24) == expected
    with pytest.raises(PolicyError, match=r"sketches are not made of latents.*allowed here are static policies"):
        engine(models["minicpm3"], policy="page_top_k")
