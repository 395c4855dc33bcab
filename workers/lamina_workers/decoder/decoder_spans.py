"""A decoder's weights as spans between mixers, where the machine can run them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lamina_kernels.compile import programs
from lamina_kernels.dense.dense import Linear, Weight, gelu_tanh_mul, silu_mul
from lamina_kernels.dense_spans import Behind, Gate, Heads, Span, Spans, States
from lamina_workers.decoder.config import ModelConfig, Residuals
from lamina_workers.decoder.decoder_weights import DecoderWeights, MixerWeights
from lamina_workers.decoder.moe import Mlp
from lamina_workers.decoder.state_layers import OutputGate


def decoder_spans(config: ModelConfig, weights: DecoderWeights, query_first: bool = False) -> Spans | None:
    """Span i ends before the mixer of layer i, with the inputs of a state, or with q, k and v (`query_first`: with the
    normed residual stream); the one past the last layer ends with the logits, or with the normed stream where the head
    has to be applied to that. None where a map is neither packed nor multiplied by `few_rows`, or a layer is not built
    as those of Llama or Qwen3-Next."""
    family = config.family
    if family.norm != "rms" or family.qk_norm not in ("", "head") or config.residuals != Residuals():
        return None
    plain = not (family.norms.parallel or family.normed_stream)
    if not plain or config.v_head_dim != config.head_dim:
        return None
    if not programs.can_run() or weights.norm.dtype != torch.bfloat16:  # packed maps take float32 too
        return None
    behind: list[Behind | None] = [None]
    ends: list[Heads | States | Weight | None] = []
    for layer in weights.layers:
        found, inputs = _behind(layer), _inputs(config, layer)
        if found is None or inputs is None:
            return None
        behind.append(found)
        ends.append(None if query_first and isinstance(inputs, Heads) else inputs)
    norms = [*(layer.input_norm for layer in weights.layers if layer.input_norm is not None), weights.norm]
    ends.append(_head(weights.head))
    return Spans([Span(*parts) for parts in zip(behind, norms, ends, strict=True)], config.rms_norm_eps)


def _behind(layer: MixerWeights) -> Behind | None:
    """What follows the mixer, where it is one MLP."""
    if len(layer.mlps) != 1 or layer.joins or layer.latent is not None or layer.input_norm is None:
        return None
    (of,) = layer.mlps
    mlp = of.mlp
    if not isinstance(mlp, Mlp) or mlp.gating not in (silu_mul, gelu_tanh_mul) or of.norm is None:
        return None
    output, gate_up, down = layer.output.few_rows, mlp.gate_up.few_rows, mlp.down.few_rows
    gate = None if layer.gate is None else _gate(layer.gate, layer.input_norm)
    if output is None or gate_up is None or down is None or (gate is None and layer.gate is not None):
        return None
    return Behind(
        output, of.norm, gate_up, down, mlp.gating is gelu_tanh_mul, layer.attended_norm, of.norm_behind, gate
    )


def _gate(gate: OutputGate, entering: torch.Tensor) -> Gate | None:
    by = gate.map.few_rows if isinstance(gate.map, Linear) else None
    if by is None or not gate.fuses:
        return None
    return Gate(by, entering, gate.activation is F.silu, gate.norm, gate.group, gate.eps)


def _inputs(config: ModelConfig, layer: MixerWeights) -> Heads | States | None:
    """What a mixer reads, where it is attention or a gated delta net."""
    qkv, state = layer.qkv.few_rows, layer.state
    if qkv is None or layer.index is not None:
        return None
    if state is None:
        return Heads(qkv, config.num_attention_heads, config.num_key_value_heads, layer.qk_norms)
    gates = None if state.gates is None else state.gates.few_rows
    if gates is None or not state.fuses or state.constants.conv is None or state.rate is None or state.offset is None:
        return None
    return States(qkv, gates, state.rate, state.offset)


def _head(head: Linear) -> Weight | None:
    found = head.few_rows
    return found[0] if found is not None and found[1] is None else None
