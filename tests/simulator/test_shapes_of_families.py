"""The simulator counts what the holders of a running model keep: KV of a token and states of a sequence."""

from __future__ import annotations

from typing import Any

import pytest
from hybrid_families import FAMILIES as HYBRIDS
from reference_models import COMMON
from transformers import AutoConfig

from lamina.simulator.costs.model_configs import from_config
from lamina_protocols.messages.layers import STATES, HolderConfig
from lamina_protocols.messages.pools import pools
from lamina_workers.attention_worker.page_layout import page_bytes
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_config.families import FAMILIES

PAGE_SIZE = 16
_LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_group": 2, "topk_group": 1}
_INDEX = {"q_lora_rank": 24, "index_topk": 16, "index_head_dim": 32, "index_n_heads": 4}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", {**_LATENT, **_EXPERTS, "n_routed_experts": 8}),
    "deepseek_v3": ("deepseek_v3", {**_LATENT, **_EXPERTS, "n_routed_experts": 8, "q_lora_rank": 24}),
    "deepseek_v32": ("deepseek_v32", {**_LATENT, **_EXPERTS, **_INDEX, "n_routed_experts": 8}),
    "glm_moe_dsa": ("glm_moe_dsa", {**_LATENT, **_EXPERTS, **_INDEX, "n_routed_experts": 8}),
    "minicpm3": ("minicpm3", {**_LATENT, "q_lora_rank": 24}),
    "gemma2": ("gemma2", {"head_dim": 16}),
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
}


@pytest.mark.parametrize("name", [*HYBRIDS, *OTHERS])
def test_a_shape_is_of_what_holders_keep(name: str) -> None:
    kind, more = (HYBRIDS | OTHERS)[name]
    raw = AutoConfig.for_model(kind, **{**COMMON, **more}).to_dict()
    running, shape = ModelConfig.from_dict(raw), from_config(raw, name)
    kept = states = sent = 0
    for pool in pools(HolderConfig(running.layer_specs(), PAGE_SIZE, "float32", 1 << 24)):
        spec, mixers = pool.config.layers[0], len(pool.layers)
        bytes_of_all = mixers * spec.kv_heads * page_bytes(pool.config)
        if spec.kind in STATES:
            states += bytes_of_all
            sent += mixers * (2 * spec.key_heads * spec.d_k + spec.kv_heads * spec.d_v)
        else:
            kept += bytes_of_all // PAGE_SIZE
            sent += mixers * spec.heads * spec.d_k
    assert shape.kv_bytes_per_token(4.0) == kept
    assert shape.state_bytes == states
    assert sum(g.layers * (g.query_elements + (g.state.channels if g.state else 0)) for g in shape.groups) == sent
    assert shape.attentions == running.attention_layers
    windows = {g.window for g in shape.groups if g.attends}
    assert windows == {spec.window for spec in running.layer_specs() if spec.kind not in STATES}


def test_every_family_that_runs_is_described() -> None:
    """Nothing that the decoder computes is refused, or has no shape, for the words of its own config."""
    named = {kind for kind, _ in (HYBRIDS | OTHERS).values()}
    with_states_or_latents = {f.model_type for f in FAMILIES.values() if f.states is not None or f.latent}
    assert with_states_or_latents - {"qwen3_5", "qwen3_5_moe"} <= named  # those two have the text's config within
