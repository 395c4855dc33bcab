"""How a family of models may differ from Llama: one description, which config, weights and GGUF conversion follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Norms:
    """The names of a layer's norms in a checkpoint. "": there is none at that place."""

    before_attention: str = "input_layernorm"
    behind_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    behind_mlp: str = ""
    parallel: bool = False
    """The MLP reads what attention reads, and both are added to the residual stream at once."""


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """The names of a layer's experts in a checkpoint."""

    block: str = "mlp"
    """The module that has them."""
    router: str = "gate"
    maps: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """The maps of one expert: gate, up and down."""
    stacked: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    """The tensors of all experts together, gate and up in one, where a checkpoint has them so."""
    shared: str = "mlp.shared_expert"
    """The MLP that all tokens take, with maps as any MLP. Its own gate, if it has one, has `_gate` behind this name."""
    always: bool = False
    """Checkpoints always have `stacked`; False: some of them may."""


@dataclass(frozen=True, slots=True)
class States:
    """The layers of a family that keep a recurrent state: their kind, and the names of their tensors."""

    kind: Literal["lightning", "gated_delta", "mamba2", "kda"]
    """That of their `LayerSpec`."""
    module: str
    """Their module in a checkpoint's layer."""
    maps: Mapping[str, tuple[str, ...]]
    """Each tensor of projections, and what it holds in its order: the rows of q, k, v, of the output's gate z, and of
    the gates of the recurrence."""
    by_head: bool = False
    """A tensor of `maps` has its parts key head by key head; False: one part after the other."""
    conv: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The tensors of the convolution, and what each holds, as in `maps`."""
    low_rank: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """The parts that are made by two maps, one behind the other, and the names of both."""
    norm: str = "norm"
    """The norm of the output."""
    out: str = "out_proj"
    """The map of the output."""
    gate: Literal["sigmoid", "silu"] = "silu"
    """The activation of the output's gate."""


@dataclass(frozen=True, slots=True)
class Family:
    """One family. The defaults are Llama's."""

    model_type: str
    """That of its config.json."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that a config.json leaves out."""

    # What a config.json says, and under which keys.

    aliases: Mapping[str, str] = field(default_factory=dict)
    """Keys of the family's configs, and the name that each has here."""
    multimodal: bool = False
    """The model may be a part of one for pictures too. Its config is the `text_config` of that."""
    eps: str = "rms_norm_eps"
    """The key of the norms' epsilon."""
    qkv_bias: bool | str = "attention_bias"
    """Whether the maps of q, k and v have a bias, or the key that says so."""
    o_bias: bool | str = "attention_bias"
    """The same of the map of attention's output."""
    mlp_bias: bool | str = "mlp_bias"
    """The same of an MLP's maps."""
    windows: Literal["never", "always", "flag", "layers", "pattern"] = "never"
    """Layers with a window: "always" all of them where sliding_window is given; "flag" all, and "layers" some, if
    use_sliding_window says so; "pattern" all but each `pattern`th."""
    pattern: int = 0
    """Each layer of this number reads everything, the others a window."""
    rotary: Literal["all", "listed", "windowed", "typed"] = "all"
    """Layers with RoPE: "listed" by no_rope_layers; "windowed" those with a window; "typed" all of them if
    position_embedding_type is "rope"."""
    mlp_size: str = "intermediate_size"
    """The key of an MLP's width."""
    expert_size: str = ""
    """The key of an expert's width; "": there are no experts, or those of `groups`."""
    shared_expert: str = ""
    """The key of the width of one more expert, which all tokens take."""
    shared_gate: bool = True
    """The shared expert is weighted by a gate of its own."""
    groups: Literal["", "softmax", "sigmoid"] = ""
    """Experts are DeepSeek's: a token chooses within groups of them, by such scores."""
    latent: bool = False
    """Attention is DeepSeek's, over latents."""
    index: Literal["", "blocks", "tokens"] = ""
    """Layers choose what they read: blocks of keys as MiniMax-M3 does, or tokens as DeepSeek V3.2."""
    scales: tuple[str, str, str] = ("", "", "")
    """Keys of the numbers that multiply the embedding, what a layer adds, and the logits."""
    depth_scales: bool = False
    """MiniCPM's keys say what is multiplied by the depth and by the width."""
    divides_logits: bool = False
    """The last of `scales` divides the logits."""
    factors: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Keys by "attention", "state" or "mlp": of what multiplies the residual stream before that adds to it, and of what
    multiplies the addition."""

    # Mathematics.

    embedding_root: bool = False
    """The embedding is multiplied by the root of its width."""
    norm: Literal["rms", "layer"] = "rms"
    """RMS norm, or LayerNorm without a bias."""
    norm_offset: float = 0.0
    """It is added to the weights of norms."""
    normed_stream: bool = False
    """What a norm before attention or an MLP gives is the residual stream from there on."""
    qk_norm: Literal["", "head", "whole", "rotated"] = ""
    """Norms of q and k: head by head, over all heads at once, or head by head after the rotation."""
    interleaved: bool = False
    """RoPE turns pairs of neighbours; False: one half of a head against the other."""
    index_interleaved: bool = False
    """The same of an index's queries and keys."""
    partial: bool = False
    """RoPE may turn only a part of a head, by partial_rotary_factor."""
    sinks: bool = False
    """Query heads have attention sinks."""
    gated: bool = False
    """The output of attention is multiplied by a sigmoid, whose map is in the map of q."""
    states: States | None = None
    """The layers that keep a recurrent state."""
    mixers: Literal["typed", "alternating", "both"] = "typed"
    """A layer has attention or a state, by its type; or one of them or an MLP; or both of them at once."""
    ungated_mlp: bool = False
    """An MLP has two maps with an activation in between, and no gate."""
    clamped: bool = False
    """The gates of experts and MLPs are clamped."""
    expert_bias: bool = False
    """Experts and their router have biases, and a checkpoint has the experts of a layer in one tensor."""

    # Names in a checkpoint.

    norms: Norms = Norms()
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    experts: ExpertNames = ExpertNames()
    qkv: str = ""
    """The map that joins those of q, k and v; "": each has its own."""
    gate_up: str = ""
    """The map that joins those of an MLP's gate and up; "": each has its own."""
    unread: str = ""
    """A regular expression for the names of tensors that are not needed."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Parts of names, and what each is called here."""
