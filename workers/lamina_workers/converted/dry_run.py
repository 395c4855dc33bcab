"""What each layer's attention is: one forward pass on the meta device, over tokens that do not exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.converted.attention_calls import AttentionCall, attention_by, masks_seen
from lamina_workers.converted.modeling import build, converting
from lamina_workers.errors import UnsupportedModelError

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
