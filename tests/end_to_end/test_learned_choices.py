"""Models whose own index chooses what each token reads, against transformers, in every placement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from real_workers import WorkerProcess, write_tiny_model
from scripted_drafts import Always, Scripted, texts_of
from tiny_decoders import BLOCK_INDEX, TOKEN_INDEX
from whole_engines import engine

from lamina import LLM, Completion
from lamina.errors import InvalidRequest, PolicyError
from lamina_workers.model_config.config import ModelConfig

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")

PROMPTS = [[(3 * i * i + n) % 101 for i in range(n)] for n in (1, 17, 70, 200)]
LENGTH = 24


MODELS = {"blocks of MiniMax-M3": BLOCK_INDEX, "tokens of DeepSeek V3.2": TOKEN_INDEX}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "model", **MODELS[request.param])


def most(model: Path) -> int:
    """How many attention workers can share the KV heads, of two."""
    return min(2, ModelConfig.from_folder(model).num_key_value_heads)


@pytest.fixture(scope="module")
def reference(model: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()


def generated(llm: LLM, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[Completion]:
    return llm.generate(prompts, max_tokens=LENGTH, temperature=0, ignore_eos=True, logprobs=20)


def off(reference: transformers.PreTrainedModel, found: Sequence[Completion]) -> float:
    """The largest difference of a log probability from that of transformers, of which the whole text is one prompt."""
    largest = 0.0
    for prompt, completion in zip(PROMPTS, found, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *completion.token_ids]])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        for wanted, given in zip(expected, completion.logprobs or (), strict=True):
            largest = max(largest, *(abs(each.logprob - float(wanted[each.token_id])) for each in given.top))
    return largest


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 7}, {"page_size": 32}, {"page_size": 256}],
    ids=["whole", "small chunks", "blocks inside pages", "one page"],
)
def test_logits_are_those_of_transformers(
    model: Path, reference: transformers.PreTrainedModel, options: dict[str, Any]
) -> None:
    with engine(model, **options) as llm:
        assert off(reference, generated(llm)) < 1e-4


@pytest.mark.parametrize("count", [1, 2])
def test_attention_workers_by_heads_change_nothing(
    model: Path, reference: transformers.PreTrainedModel, workers: list[WorkerProcess], count: int
) -> None:
    if count > most(model):
        with pytest.raises(InvalidRequest, match=r"one KV head.*one attention worker"):
            engine(model, workers)
        return
    with engine(model, workers[:count]) as llm:
        assert off(reference, generated(llm)) < 1e-4
        assert all(worker.status().queries > 0 for worker in workers[:count])


@pytest.mark.parametrize("remote", [False, True], ids=["one process", "attention workers"])
def test_drafts_are_cut_back_from_what_an_index_chooses_among(
    model: Path, reference: transformers.PreTrainedModel, workers: list[WorkerProcess], remote: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with engine(model) as llm:
        plain = generated(llm)
    texts = texts_of(PROMPTS, [[completion.token_ids] for completion in plain])
    monkeypatch.setattr("lamina.launch.builder.Speculation", Always)
    monkeypatch.setattr("lamina.launch.builder.load_proposer", lambda *_: Scripted(texts, "some", 101))
    with engine(model, workers[: most(model)] if remote else (), speculate="ngram") as llm:
        found = generated(llm)
    assert [completion.token_ids for completion in found] == [completion.token_ids for completion in plain]
    assert off(reference, found) < 1e-4
    assert all(0 < c.stats["accepted_tokens"] < c.stats["draft_tokens"] for c in found)


@pytest.mark.parametrize("count", [0, 2])
def test_a_prefix_of_the_cache_has_its_index_keys(
    model: Path, reference: transformers.PreTrainedModel, workers: list[WorkerProcess], count: int
) -> None:
    with engine(model, workers[: min(count, most(model))]) as llm:
        generated(llm)
        again = generated(llm)
        assert again[-1].usage.cached_tokens >= 192
        assert off(reference, again) < 1e-4


def test_less_is_read(model: Path, workers: list[WorkerProcess]) -> None:
    """In each layer with an index, at each head, the chosen ones of up to 224 keys, and all index keys."""
    specs = ModelConfig.from_folder(model).layer_specs()
    spec, index = next((spec, spec.index) for spec in specs if spec.index is not None)
    with engine(model, workers[: most(model)]) as llm:
        long = generated(llm)[-1]
    keys = sum(range(201, 201 + LENGTH - 1))
    chosen = index.top * index.block * (LENGTH - 1) / keys
    scanned = index.width / (spec.d_k + spec.own_v) * most(model) / spec.kv_heads  # once at each worker
    indexed = sum(spec.index is not None for spec in specs)
    read = (long.stats["kv_read"] * len(specs) - (len(specs) - indexed)) / indexed  # the other layers read all
    assert 0.8 * chosen + scanned < read < 1.2 * chosen + scanned < 0.95


def test_what_an_index_cannot_have_is_refused_by_name(model: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"shard is 'sequence'.*index.*shard='heads'"):
        engine(model, attention_workers=2, shard="sequence")
    with pytest.raises(PolicyError, match=r"index chooses.*page_top_k.*allowed: full"):
        engine(model, policy="page_top_k")
