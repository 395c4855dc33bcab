"""How a family of models may differ from Llama: one description, which config, weights and GGUF conversion follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Norms:
    """What a layer's norms are called in a checkpoint: before and behind attention, before and behind the MLP. "":
    there is none. `parallel`: the MLP reads what attention reads, and both are added at once."""

    before_attention: str = "input_layernorm"
    behind_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    behind_mlp: str = ""
    parallel: bool = False


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What experts are called in a checkpoint: the module that has them, its router, the maps of each; `stacked`: the
    tensors that have those of all experts, gate and up in one, where a checkpoint has them so, as it does `always` or
    perhaps; `shared`: the MLP that all tokens take, with the maps of a plain one, and where it has a gate of its own
    that with `_gate` behind."""

    block: str = "mlp"
    router: str = "gate"
    maps: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    shared: str = "mlp.shared_expert"
    always: bool = False


@dataclass(frozen=True, slots=True)
class States:
    """A family's layers that keep a state. `kind` is that of their `LayerSpec`, `at` their module in a checkpoint.

    `maps`: the tensors with the rows of q, k, v, of the output's gate z, and of the gates of the recurrence, each with
    what it has in its order; `by_head`: it has them key head by key head, else one after the other. `conv`: in the same
    way the tensors of the convolution. `low_rank`: what has two maps, one behind the other. `norm`, `out`: the norm and
    the map of the output. `gate`: the output's gate is a sigmoid or SiLU.
    """

    kind: Literal["lightning", "gated_delta", "mamba2", "kda"]
    at: str
    maps: Mapping[str, tuple[str, ...]]
    by_head: bool = False
    conv: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    low_rank: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    norm: str = "norm"
    out: str = "out_proj"
    gate: Literal["sigmoid", "silu"] = "silu"


@dataclass(frozen=True, slots=True)
class Family:
    """One family. `model_type` is config.json's, `defaults` stand in for keys that it leaves out.

    Config. `aliases`: what other keys are called here. `eps`: the key of the norms' epsilon. `qkv_bias`, `o_bias`,
    `mlp_bias`: whether there are biases, or the key that says so. `windows`: "always" where sliding_window is given,
    "flag" and "layers" if use_sliding_window says so (in all layers, or in some), "pattern" in all but each `pattern`th
    layer. `rotary`: which layers have RoPE; "typed": all, if position_embedding_type is "rope". `mlp_size` and
    `expert_size`: the keys of the width of an MLP, and of one expert; "": there are none. `shared_expert`: the key of
    the width of one more that all tokens take, by a gate of its own with `shared_gate`. `ungated_mlp`: an MLP has an
    activation between two maps. `groups`: experts are DeepSeek's, chosen within groups by such scores. `latent`:
    attention is DeepSeek's, over latents. `depth_scales`: MiniCPM's keys say what the depth and the width multiply.
    `expert_bias`: experts have biases, and are stacked in the checkpoint. `clamped`: experts and MLPs have a clamped
    gate. `index`: layers choose what they read, blocks of keys as MiniMax-M3, or tokens as DeepSeek V3.2;
    `index_interleaved`: as `interleaved`, of index queries and keys. `scales`: keys of the numbers that the embedding,
    each layer's additions and the logits are multiplied by; `embedding_root`: the embedding by the root of its width.

    Mathematics. `sinks`: query heads have attention sinks. `norm`: RMS norm, or LayerNorm without a bias; `norm_offset`
    is added to norms' weights. `qk_norm`: q and k are normed head by head, as a whole, or head by head when they are
    rotated. `interleaved`: RoPE turns pairs of neighbours, instead of one half of a head against the other. `partial`:
    partial_rotary_factor may leave out a part. `states`: the layers that keep a state. `mixers`: a layer has attention
    or a state, by its type, or in place of both an MLP, or both at once. `gated`: what attention gives is multiplied by
    a sigmoid, whose map is in that of q. `normed_stream`: what a norm before attention or MLP gives is the residual
    stream from then on. `factors`: keys of what the stream is multiplied by before attention, a state layer or MLP adds
    to it, and of what that is multiplied by.

    Checkpoint. `norms`; `qk_norm_names`; `experts`; `qkv` and `gate_up`: the maps that are joined there, else "";
    `unread`: a regular expression for names of tensors that nothing here needs; `renamed`: what parts of names are
    called here. `multimodal`: the model may be part of one for pictures too, and its config the `text_config` of that.
    """

    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    eps: str = "rms_norm_eps"
    qkv_bias: bool | str = "attention_bias"
    o_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    windows: Literal["never", "always", "flag", "layers", "pattern"] = "never"
    pattern: int = 0
    rotary: Literal["all", "listed", "windowed", "typed"] = "all"
    expert_size: str = ""
    shared_expert: str = ""
    shared_gate: bool = True
    mlp_size: str = "intermediate_size"
    ungated_mlp: bool = False
    groups: Literal["", "softmax", "sigmoid"] = ""
    latent: bool = False
    expert_bias: bool = False
    clamped: bool = False
    index: Literal["", "blocks", "tokens"] = ""
    index_interleaved: bool = False
    scales: tuple[str, str, str] = ("", "", "")
    depth_scales: bool = False
    divides_logits: bool = False
    embedding_root: bool = False
    sinks: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    qk_norm: Literal["", "head", "whole", "rotated"] = ""
    interleaved: bool = False
    partial: bool = False
    states: States | None = None
    mixers: Literal["typed", "alternating", "both"] = "typed"
    gated: bool = False
    normed_stream: bool = False
    factors: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    experts: ExpertNames = ExpertNames()
    norms: Norms = Norms()
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    qkv: str = ""
    gate_up: str = ""
    unread: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    multimodal: bool = False
