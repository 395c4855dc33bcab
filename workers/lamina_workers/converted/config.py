"""The facts of a converted model, where the rest of Lamina looks for those of a native one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.converted.dry_run import NO_ATTENTIONS, Attentions, dry_run
from lamina_workers.converted.modeling import model_class, read_config, transformers
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig, Residuals
from lamina_workers.model_config.config_keys import Keys
from lamina_workers.model_config.mixers import ATTENTION
from lamina_workers.model_config.rope_config import RopeConfig

_SWITCHING_ROPES = ("dynamic", "longrope")
"""RoPE that rotates all keys otherwise once a sequence is longer than the model was trained for."""


@dataclass(frozen=True, slots=True)
class ConvertedConfig(ModelConfig):
    """`ModelConfig` of a model whose computation is not described but taken from transformers: `raw` is its
    config.json, as text. What only native weights are made from is neutral here. `version` is that of transformers.
    """

    raw: str = ""
    version: str = ""
    attentions: Attentions = NO_ATTENTIONS

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        return self.attentions.specs

    def with_rope_scaling(self, scaling: Mapping[str, Any]) -> ModelConfig:
        raise UnsupportedModelError(
            f"rope_scaling of {self.architecture} is what its config.json says: it is converted"
        )

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def converted_config(raw: Mapping[str, Any]) -> ConvertedConfig:
    """The facts of a parsed config.json. Raises UnsupportedModelError for what Lamina cannot run, ModelFileError for
    what is missing or out of bounds."""
    architecture, kind = model_class(raw)
    config = read_config(raw)
    found = dry_run(kind, config)
    spec, keys = found.specs[0], Keys(raw, {})
    vocabulary, positions = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    for name, value, most in (("vocab_size", vocabulary, 1 << 22), ("max_position_embeddings", positions, 1 << 30)):
        if type(value) is not int or not 1 <= value <= most:
            raise ModelFileError(f"{name} is {value!r}, expected an integer from 1 to {most}")
    context = min(filter(None, (positions, found.context, _trained(config))))
    layers = len(found.specs)
    return ConvertedConfig(
        architecture=architecture,
        vocab_size=int(vocabulary or 0),
        hidden_size=int(getattr(config, "hidden_size", 0) or 0),
        intermediate_size=0,
        num_hidden_layers=layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.d_k,
        v_head_dim=spec.d_v,
        rms_norm_eps=0.0,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        activation="",
        scale=spec.scale,
        soft_cap=None,
        logit_soft_cap=None,
        embedding_scale=1.0,
        residuals=Residuals(),
        logit_scale=1.0,
        sinks=False,
        windows=tuple(each.window for each in found.specs),
        rotary=(False,) * layers,
        sparse=(False,) * layers,
        mixers=(ATTENTION,) * layers,
        moe=None,
        rope=RopeConfig(kind="default", theta=1e4, positions=context, original=context),
        window_rope=None,
        bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
        eos_token_ids=keys.token_ids("eos_token_id"),
        raw=json.dumps(raw, sort_keys=True),
        version=transformers().__version__,
        attentions=found,
    )


def _trained(config: Any) -> int | None:
    """The positions up to which RoPE does not switch; None where it never does."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    tables = rope.values() if all(isinstance(each, dict) for each in rope.values()) else [rope]
    limits = []
    for table in tables:
        if table.get("rope_type", table.get("type")) in _SWITCHING_ROPES:
            limit = table.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limits.append(int(limit or config.max_position_embeddings))
    return min(limits, default=None)
