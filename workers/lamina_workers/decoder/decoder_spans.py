"""A decoder's weights as spans between attentions, where the machine can run them."""

from __future__ import annotations

import torch

from lamina_kernels.cpu import programs
from lamina_kernels.cpu.spans import Behind, Heads, Span, Spans
from lamina_kernels.dense import Linear
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.decoder_weights import DecoderWeights
from lamina_workers.decoder.moe import Mlp


def decoder_spans(config: ModelConfig, weights: DecoderWeights, query_first: bool = False) -> Spans | None:
    """Span i ends before the attention of layer i, with q, k and v, or `query_first` with the normed residual stream;
    the one past the last layer ends with the logits, or with the normed stream where the head has to be applied to
    that. None where a map is not multiplied by `few_rows`, or a layer has experts."""
    behind: list[Behind | None] = [None]
    heads: list[Heads] = []
    for layer in weights.layers:
        qkv, mlp = layer.qkv.few_rows, layer.mlp
        if not isinstance(mlp, Mlp) or config.head_dim % 2:
            return None
        output, gate_up, down = layer.output.few_rows, mlp.gate_up.few_rows, mlp.down.few_rows
        if qkv is None or output is None or gate_up is None or down is None:
            return None
        behind.append(Behind(output, layer.post_norm, gate_up, down))
        heads.append(Heads(qkv, config.num_attention_heads, config.num_key_value_heads, layer.qk_norms))
    if not programs.can_run():
        return None
    norms = [*(layer.input_norm for layer in weights.layers), weights.norm]
    ends: list[Heads | torch.Tensor | None] = [*((None,) * len(heads) if query_first else heads), _head(weights.head)]
    return Spans([Span(*parts) for parts in zip(behind, norms, ends, strict=True)], config.rms_norm_eps)


def _head(head: Linear) -> torch.Tensor | None:
    found = head.few_rows
    return found[0] if found is not None and found[1] is None else None
