"""transformers' own `generate` with its KV on attention workers: the same tokens as with its own attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from attention_servers import running
from reference_models import reference

from lamina.behind.transformers_cache import LaminaCache, register
from lamina.errors import InvalidRequest, PolicyError, UnsupportedModelError
from lamina.policy_file import PolicyFile, write
from lamina_workers.errors import HolderLost

TOKENS = 24
WINDOW = {"num_hidden_layers": 4, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0, **WINDOW},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 20, **WINDOW},
    "phi3": {"sliding_window": 9},
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 9},
    "granite": {"attention_multiplier": 0.3},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "glm4": {"head_dim": 32},
    "cohere2": {"num_hidden_layers": 4, "sliding_window": 9},
    "gpt_oss": {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW},
    "deepseek_v3": {
        "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "v_head_dim": 48,
        "qk_rope_head_dim": 16, "n_routed_experts": 8, "moe_intermediate_size": 40, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    },
}  # fmt: skip
EAGER = {"gemma2", "gpt_oss"}  # transformers' sdpa has no soft caps, no sinks


def network(family: str, **options: Any) -> transformers.PreTrainedModel:
    register()
    model = reference(family, {**FAMILIES.get(family, {}), **options})
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def drawn(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(3, 97, (rows, columns), generator=torch.Generator().manual_seed(5))


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[0, :16], mask[2, :3] = 0, 0
    return {"input_ids": drawn(3, 21) * mask, "attention_mask": mask}


PROMPTS = {"single": {"input_ids": drawn(1, 37), "attention_mask": torch.ones(1, 37, dtype=torch.long)}}
PROMPTS["left-padded"] = padded()


@pytest.fixture(scope="module")
def workers() -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(kv_memory=1 << 22))[1] for _ in range(2)]


def generated(model: transformers.PreTrainedModel, prompt: dict[str, torch.Tensor], **more: Any) -> list[list[int]]:
    tokens: torch.Tensor = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False, **more)
    return tokens.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_transformers_own_attention(family: str, workers: list[str]) -> None:
    model = network(family)
    model.set_attn_implementation("eager" if family in EAGER else "sdpa")
    expected = {name: generated(model, prompt) for name, prompt in PROMPTS.items()}
    register()
    model.set_attn_implementation("lamina")
    cache = LaminaCache(model.config, workers, page_size=16)
    for name, prompt in PROMPTS.items():
        assert generated(model, prompt, cache=cache) == expected[name], name
        cache.reset()
    cache.close()


@pytest.fixture
def llama(workers: list[str]) -> Iterator[tuple[transformers.PreTrainedModel, LaminaCache]]:
    model = network("llama")
    cache = LaminaCache(model.config, workers, page_size=16, blocks=12)
    model.set_attn_implementation("lamina")
    yield model, cache
    cache.close()


Llama = tuple[transformers.PreTrainedModel, LaminaCache]


def test_a_draft_that_is_rejected_is_cut_off(llama: Llama) -> None:
    model, cache = llama
    prompt = {name: tensor[:, :12].repeat(1, 3) for name, tensor in PROMPTS["single"].items()}
    model.set_attn_implementation("sdpa")
    expected = generated(model, prompt)
    model.set_attn_implementation("lamina")
    assert generated(model, prompt, cache=cache, prompt_lookup_num_tokens=4) == expected
    cache.reset()
    assert generated(model, prompt, cache=cache, assistant_model=network("llama", num_hidden_layers=2)) == expected


def test_blocks_of_tokens_that_are_cut_off_are_free(llama: Llama) -> None:
    model, cache = llama
    ids = drawn(2, 80)
    with torch.inference_mode():
        expected = model(ids, cache=cache).logits
        for columns in (79, 64, 63, 17):
            cache.crop(columns - 80)
            assert cache.get_seq_length() == columns
            logits = model(ids[:, columns:], cache=cache).logits
            torch.testing.assert_close(logits, expected[:, columns:], atol=1e-4, rtol=0)


def test_a_cache_that_is_dropped_gives_its_memory_back(workers: list[str]) -> None:
    model = network("qwen2").bfloat16()
    model.set_attn_implementation("lamina")
    texts = [generated(model, PROMPTS["left-padded"], cache=LaminaCache(model.config, workers)) for _ in range(3)]
    assert texts[0] == texts[1] == texts[2]


def test_a_policy_chooses_what_is_read(workers: list[str]) -> None:
    model, prompt = network("qwen2"), {"input_ids": drawn(1, 120)}
    expected = generated(model, prompt)
    model.set_attn_implementation("lamina")
    texts = {
        policy: generated(model, prompt, cache=LaminaCache(model.config, workers, policy=policy))
        for policy in ("span(alpha=200, beta=0)", "span(alpha=4, beta=0)")
    }
    assert [text == expected for text in texts.values()] == [True, False]


def test_a_policy_file_has_one_for_each_head(workers: list[str], tmp_path: Path) -> None:
    model, prompt = network("qwen2"), {"input_ids": drawn(1, 120)}
    model.set_attn_implementation("lamina")
    short, file = "span(alpha=4, beta=0)", str(tmp_path / "policy.toml")
    expected = generated(model, prompt, cache=LaminaCache(model.config, workers, policy=short))
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    write(file, PolicyFile("", "", ((short,) * heads,) * layers))
    assert generated(model, prompt, cache=LaminaCache(model.config, workers, policy=file)) == expected
    write(file, PolicyFile("", "", (("full",) * heads,) * (layers + 1)))
    with pytest.raises(PolicyError, match=f"this policy has {layers + 1} layers; the model has {layers}"):
        generated(model, prompt, cache=LaminaCache(model.config, workers, policy=file))


def test_what_a_policy_has_read_is_known(workers: list[str]) -> None:
    model, prompt = network("qwen2", max_position_embeddings=1024), {"input_ids": drawn(1, 800)}
    model.set_attn_implementation("lamina")
    cache = LaminaCache(model.config, workers, page_size=16, policy="page_top_k(budget=0.2)")
    generated(model, prompt, cache=cache)
    savings = cache.savings()
    assert 0.1 < savings["kv_read"] < 0.9
    assert savings["kv_held"] == savings["kv_resident"] == 1
    cache.close()
    plain = LaminaCache(model.config, workers)
    generated(model, prompt, cache=plain)
    assert plain.savings() == {}


def test_a_prompt_in_chunks_and_padding_on_the_right(llama: Llama) -> None:
    model, cache = llama
    ids, mask = drawn(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[0, 9:22], mask[1, 20:22] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        model.set_attn_implementation("lamina")
        logits = [
            model(
                ids[:, first:end], attention_mask=mask[:, :end], position_ids=positions[:, first:end], cache=cache
            ).logits
            for first, end in ((0, 14), (14, 22), (22, 23), (23, 30))
        ]
    torch.testing.assert_close(torch.cat(logits, 1)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def test_a_batch_for_which_there_is_no_room_is_refused_and_the_cache_lives(llama: Llama) -> None:
    model, cache = llama
    with pytest.raises(InvalidRequest, match=r"13 more blocks of 16 tokens .* free: 12 of 12"):
        generated(model, {"input_ids": drawn(1, 200)}, cache=cache)
    for _ in range(3):
        cache.reset()
        generated(model, {"input_ids": drawn(1, 12 * 16 - TOKENS)}, cache=cache)
    with pytest.raises(InvalidRequest, match=r"goes on otherwise"):
        generated(model, {"input_ids": drawn(2, 250)}, cache=cache)


def test_what_a_cache_of_blocks_cannot_do_is_refused_by_name(llama: Llama) -> None:
    model, cache = llama
    prompt = PROMPTS["single"]
    with pytest.raises(InvalidRequest, match=r"beams.*allowed: greedy search and sampling \(num_beams=1\)"):
        generated(model, prompt, cache=cache, num_beams=2)
    cache.reset()
    with pytest.raises(InvalidRequest, match="a mask of the caller's own"), torch.inference_mode():
        model(prompt["input_ids"], attention_mask=torch.ones(1, 1, 37, 37, dtype=torch.bool), cache=cache)
    cache.reset()
    with pytest.raises(InvalidRequest, match=r"shape \(1, 30\); allowed: \(1, 37\)"), torch.inference_mode():
        model(prompt["input_ids"], attention_mask=torch.ones(1, 30), cache=cache)
    cache.reset()
    with pytest.raises(InvalidRequest, match="gradients"):
        model(prompt["input_ids"], cache=cache)
    cache.reset()
    with pytest.raises(InvalidRequest, match=r"without cache=LaminaCache"), torch.inference_mode():
        model(prompt["input_ids"], use_cache=False)
    model.set_attn_implementation("sdpa")
    with pytest.raises(InvalidRequest, match="whose attn_implementation is another"), torch.inference_mode():
        model(prompt["input_ids"], cache=cache)
    model.set_attn_implementation("lamina")
    packed = torch.cat([torch.arange(20), torch.arange(17)])[None]
    with pytest.raises(UnsupportedModelError, match="packed sequences"), torch.inference_mode():
        model(prompt["input_ids"], position_ids=packed, use_cache=False)
    hybrid = transformers.AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
    with pytest.raises(UnsupportedModelError, match=r"linear_attention.*allowed: full_attention, sliding_attention"):
        LaminaCache(hybrid, ["127.0.0.1:1"])


def test_a_worker_that_is_lost_is_waited_for_when_the_cache_is_reset() -> None:
    model = network("llama")
    expected = generated(model, PROMPTS["single"])
    with running(kv_memory=1 << 22) as (server, address):
        cache = LaminaCache(model.config, [address])
        model.set_attn_implementation("lamina")
        assert generated(model, PROMPTS["single"], cache=cache) == expected
        server.stop(0)
        cache.reset()
        with pytest.raises(HolderLost):
            generated(model, PROMPTS["single"], cache=cache)
    with running(kv_memory=1 << 22, listen=address):
        cache.reset()
        assert generated(model, PROMPTS["single"], cache=cache) == expected
        cache.close()
