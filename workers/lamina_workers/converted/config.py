"""The facts of a converted model (`ConvertedConfig`), where the rest of Lamina looks for those of a native one.

No description says what each layer's attention is. One forward pass on the meta device tells it, over a few tokens
without weights (`dry_run`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.converted.attention_calls import AttentionCall, attention_by, masks_seen
from lamina_workers.converted.modeling import build, converting, model_class, read_config, transformers
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig, Residuals
from lamina_workers.model_config.config_keys import Keys
from lamina_workers.model_config.mixers import ATTENTION
from lamina_workers.model_config.rope_config import RopeConfig

_TOKENS = 7
_STEP = 16  # kernels keep vectors of a multiple of it


@dataclass(frozen=True, slots=True)
class Attentions:
    """The attentions of a model. `specs`: what holders keep, in vectors that kernels can keep; `shapes`: (kv_heads,
    d_k, d_v) as the model's own code has them. `context`: the longest sequence for which the masks are as `specs` say,
    None: any."""

    specs: tuple[LayerSpec, ...]
    shapes: tuple[tuple[int, int, int], ...]
    sinks: tuple[bool, ...]
    context: int | None


NO_ATTENTIONS = Attentions((), (), (), None)


def dry_run(kind: Any, config: Any) -> Attentions:
    """Run the model once without weights. Raises UnsupportedModelError naming what Lamina cannot attend."""
    calls: list[AttentionCall] = []

    def note(call: AttentionCall) -> torch.Tensor:
        _check_shapes(call, len(calls))
        calls.append(call)
        return call.q.new_empty(1, _TOKENS, call.q.shape[1], call.v.shape[-1])

    model = build(kind, config, torch.float32, masked=True)
    with converting("the dry run of"), masks_seen(), attention_by(note), torch.inference_mode():
        tokens = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
        model(input_ids=tokens, position_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return _attentions(type(model).__name__, config, calls)


def _check_shapes(call: AttentionCall, number: int) -> None:
    q, k, v = call.q.shape, call.k.shape, call.v.shape
    if len(q) != 4 or len(k) != 4 or len(v) != 4 or {q[2], k[2], v[2]} != {_TOKENS} or q[0] != 1:
        raise UnsupportedModelError(
            f"attention {number} is not of the {_TOKENS} tokens of the batch: q {list(q)}, k {list(k)}, v {list(v)}"
        )
    if q[1] % k[1] or v[1] != k[1] or q[3] != k[3]:
        raise UnsupportedModelError(f"attention {number} has q {list(q)}, k {list(k)}, v {list(v)}, which do not fit")


def _attentions(name: str, config: Any, calls: list[AttentionCall]) -> Attentions:
    layers = getattr(config, "num_hidden_layers", None)
    numbers = [call.layer for call in calls]
    if not calls:
        raise UnsupportedModelError(f"{name} attends without transformers' attention interface, so it cannot be cut")
    if len(set(numbers)) < len(numbers) and None not in numbers:
        raise UnsupportedModelError(f"{name} has more than one attention in a layer: {numbers[:8]}")
    if isinstance(layers, int) and len(calls) != layers:
        raise UnsupportedModelError(
            f"{name} has {layers} layers, of which {len(calls)} attend; others keep a state that is no keys and values"
        )
    chunks = [call.mask.chunk for call in calls if call.mask is not None and call.mask.chunk is not None]
    specs = tuple(
        LayerSpec(
            kv_layer=layer,
            heads=call.q.shape[1],
            kv_heads=call.k.shape[1],
            d_k=-(-call.k.shape[3] // _STEP) * _STEP,
            d_v=-(-call.v.shape[3] // _STEP) * _STEP,
            scale=call.scale,
            window=call.window if call.mask is None else call.mask.window,
            soft_cap=call.soft_cap,
        )
        for layer, call in enumerate(calls)
    )
    return Attentions(
        specs,
        tuple((call.k.shape[1], call.k.shape[3], call.v.shape[3]) for call in calls),
        tuple(call.sinks is not None for call in calls),
        min(chunks, default=None),
    )


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


def converted_config(raw: Mapping[str, Any]) -> ConvertedConfig:
    """The facts of a parsed config.json. Raises UnsupportedModelError for what Lamina cannot run, ModelFileError for
    what is missing or out of bounds."""
    architecture, kind = model_class(raw)
    config = read_config(raw)
    attentions = dry_run(kind, config)
    spec, keys = attentions.specs[0], Keys(raw, {})
    vocabulary, positions = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    for name, value, limit in (("vocab_size", vocabulary, 1 << 22), ("max_position_embeddings", positions, 1 << 30)):
        if type(value) is not int or not 1 <= value <= limit:
            raise ModelFileError(f"{name} is {value!r}, expected an integer from 1 to {limit}")
    context = min(filter(None, (positions, attentions.context, _trained(config))))
    layers = len(attentions.specs)
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
        windows=tuple(spec.window for spec in attentions.specs),
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
        attentions=attentions,
    )


def _trained(config: Any) -> int | None:
    """The positions up to which RoPE does not switch; None where it never does."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    tables = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    limits = []
    for table in tables:
        if table.get("rope_type", table.get("type")) in _SWITCHING_ROPES:
            limit = table.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limits.append(int(limit or config.max_position_embeddings))
    return min(limits, default=None)
