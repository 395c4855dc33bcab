"""The numbers of a model that decide its cost (`ModelShape`): parameters, KV bytes and FLOPs, layer by layer.

Some layers keep, move and compute more than plain attention does: recurrent states (`StateShape`), and learned choices
of tokens (`ChoiceShape`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from lamina.errors import InvalidRequest
from lamina.simulator.costs.bounds import MAX_INTEGER, MAX_ITEMS, Amount, Count, Text, whole
from lamina.simulator.costs.packing import FLOATS, Packing, packing

STATE_RECORDS = 2
"""States that a holder keeps of a sequence: the one at its end, and the one before its last batch, from which that can
be computed again."""
CHUNK = 64
"""Tokens that a prompt's states are advanced by at a time: what flash-linear-attention takes."""
_FLOAT32 = 4
_MOST = 1 << 20
SMALL = 2e10
"""Parameters below which the host takes much of a dense model's step. Measured were 8, 32 and 70 billion."""
_UPDATES = {"lightning": 5, "mamba2": 5, "gated_delta": 7, "kda": 7}
"""FLOPs of one number of a state and one token: its decay, the outer product of k and v, the product with q, and for
delta rules the product with k besides."""


@dataclass(frozen=True, slots=True)
class StateShape:
    """The recurrent states of one layer: `heads` of `d_k` x `d_v` float32 numbers, and the last inputs of a causal
    convolution of width `conv` (0: none). `key_heads` q and k serve all heads. `kind` is one of lightning (arXiv
    2401.04658), mamba2 (2405.21060), gated_delta (2412.06464) and kda (2510.26692).

    Raises InvalidRequest for another kind, or a size out of its bounds.
    """

    kind: str
    heads: int
    d_k: int
    d_v: int
    key_heads: int
    conv: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _UPDATES:
            raise InvalidRequest(f"kind of a state is {self.kind!r:.80}; allowed are {', '.join(_UPDATES)}")
        for name in ("heads", "d_k", "d_v", "key_heads"):
            whole(f"{name} of a state", getattr(self, name), 1, _MOST)
        whole("conv of a state", self.conv, 0, 64)
        if self.heads % self.key_heads:
            raise InvalidRequest(f"a state has {self.key_heads} key heads; they must divide its heads, {self.heads}")

    @property
    def nbytes(self) -> int:
        """Of one layer and sequence. A key head's inputs are kept with each of its heads, since holders have heads."""
        inputs = max(0, self.conv - 1) * (2 * self.d_k + self.d_v)
        return _FLOAT32 * self.heads * (self.d_k * self.d_v + inputs)

    @property
    def channels(self) -> int:
        """q, k and v of one token: what the convolution is over, and what a holder is sent beside the gates."""
        return 2 * self.key_heads * self.d_k + self.heads * self.d_v

    @property
    def gate_bytes(self) -> int:
        """Float32 gates of one token: decays and strengths of writing."""
        gates = {"lightning": 0, "kda": self.d_k + 1}.get(self.kind, 2)
        return _FLOAT32 * self.heads * gates

    @property
    def outputs(self) -> int:
        """Numbers that come back of one token."""
        return self.heads * self.d_v

    @property
    def flops(self) -> int:
        """Of one token in decode."""
        return _UPDATES[self.kind] * self.heads * self.d_k * self.d_v + 2 * self.conv * self.channels

    @property
    def prompt_flops(self) -> int:
        """Of one token of a prompt, in chunks: products within the chunk, the state's with q and of k with v; for delta
        rules the products of keys, a triangular solve, and the products that it yields."""
        state, scores = self.heads * self.d_k * self.d_v, 2 * CHUNK * self.key_heads * self.d_k
        values, keys = 2 * CHUNK * self.heads * self.d_v, 2 * CHUNK * self.heads * self.d_k
        total = scores + values + 4 * state + 2 * self.conv * self.channels
        if self.kind in ("gated_delta", "kda"):
            total += scores + self.heads * CHUNK * CHUNK // 3 + keys + values + 2 * state
        return total


@dataclass(frozen=True, slots=True)
class ChoiceShape:
    """A learned choice of the `tokens` that one layer attends to. Keys of its own, `key_elements` numbers a token, are
    all read, and scored by `query_elements` numbers at `score_flops` FLOPs a key. Where all are 0 the choice of an
    earlier layer is used."""

    tokens: Count
    key_elements: Count = 0
    query_elements: Count = 0
    score_flops: Count = 0

    def __post_init__(self) -> None:
        whole("tokens of a choice", self.tokens, 1, 1 << 30)


@dataclass(frozen=True)  # without slots: what is cached has its place beside the fields
class LayerGroup:
    """`layers` layers that are alike. Parameters and elements are for one of them.

    A layer has attention (`kv_heads` above 0), a recurrent `state`, both beside each other, or neither. `projections`
    are the parameters around them (`kv_projections` of them, those of attention's k and v); `mlp`: parameters
    that every token uses. With `experts`, each token uses `top_k` of them besides, with `expert` parameters each; the
    router and shared experts are part of `mlp`. `vectors`: norms and biases, which are stored and read but not
    multiplied. `kv_elements`: what the cache keeps of a token; `query_elements`, `output_elements`: what attention is
    sent of it, and sends back. `score_flops`: FLOPs of one token with one key, both products. `window`: None reads
    everything. `prompt_score_flops`: the same in prefill, where it differs. `choice`: attention is to tokens that are
    chosen for each query.

    MLA is counted as it decodes, in the absorbed form: there is one KV head, of the latent and its rotary part; queries
    and outputs are of the latent's width; and `kv_projections` makes the latent alone, since what made k and v of it
    works on queries and outputs instead (DeepSeek-V2, arXiv 2405.04434, section 2.1). Prompts are not absorbed.
    """

    layers: Count
    kv_heads: Count
    projections: Count
    kv_projections: Count
    mlp: Count
    kv_elements: Count
    query_elements: Count
    output_elements: Count
    score_flops: Count
    experts: Count = 0
    top_k: Count = 0
    expert: Count = 0
    window: Count | None = None
    vectors: Count = 0
    prompt_score_flops: Count = 0
    state: StateShape | None = None
    choice: ChoiceShape | None = None

    @cached_property
    def attends(self) -> bool:
        return self.kv_heads > 0

    @cached_property
    def all_reduces(self) -> int:
        """All-reduces of a layer by tensor parallelism: one behind what mixes tokens, one behind the MLP."""
        return (self.attends or self.state is not None) + (self.mlp > 0 or self.experts > 0)

    @cached_property
    def kept_elements(self) -> int:
        """What the cache keeps of a token, keys for choices included."""
        return self.kv_elements + (self.choice.key_elements if self.choice else 0)

    @cached_property
    def asked_elements(self) -> int:
        """What attention is sent of a token's queries, those for choices included."""
        return self.query_elements + (self.choice.query_elements if self.choice else 0)

    @cached_property
    def parameters(self) -> int:
        """All parameters of one layer."""
        return self.projections + self.mlp + self.vectors + self.experts * self.expert

    def experts_read(self, tokens: float) -> float:
        """How many experts of a layer `tokens` tokens use, if each takes any k alike: E (1 - (1 - k / E) ^ tokens)."""
        if not self.experts:
            return 0.0
        return self.experts * (1.0 - math.pow(1.0 - self.top_k / self.experts, tokens))

    def read(self, context: float) -> float:
        """How many of `context` tokens one token attends to."""
        tokens = context if self.window is None else min(context, self.window)
        return tokens if self.choice is None else min(tokens, self.choice.tokens)

    def prompt_flops(self, keys: float) -> float:
        """FLOPs of one token of a prompt with so many keys. Where it chooses, the lesser of all of them as prompts are
        computed, and of those chosen as decode computes them."""
        score_flops = self.prompt_score_flops or self.score_flops
        if self.choice is None:
            return score_flops * self.read(keys)
        return self.choice.score_flops * keys + min(score_flops * keys, self.score_flops * self.read(keys))


@dataclass(frozen=True)
class ModelShape:
    """A model as the cost model sees it. `embedding`: parameters of the input table, which are stored and not
    multiplied; `head`: those of the output layer (the same table where `tied`). `element`: bytes of a weight; of 1, the
    input table and the head keep 2, and so do activations and KV. `vectors`: the last norm."""

    name: Text
    hidden: Annotated[int, Field(ge=1, le=MAX_INTEGER)]
    groups: Annotated[tuple[LayerGroup, ...], Field(max_length=MAX_ITEMS)]
    embedding: Count
    head: Count
    tied: bool
    max_context: Count
    element: Annotated[float, Field(ge=0.1, le=8)] = 2.0
    published_weight_bytes: Amount | None = None
    """The weights' bytes as a paper prints them, where they differ from the count; they are used then."""
    vectors: Count = 0
    packing: Packing | None = None
    """How matrices are kept in few bits; None: all weights take `element` bytes each."""

    def with_weights(self, name: str) -> ModelShape:
        """The model with its weights kept in that way: a float's name, or what `packing` knows; "auto" leaves them.
        Raises InvalidRequest."""
        if name == "auto":
            return self
        if (element := FLOATS.get(name)) is None:
            return replace(self, packing=packing(name))
        published = self.published_weight_bytes if element == self.element else None
        return replace(self, element=element, published_weight_bytes=published, packing=None)

    @cached_property
    def activation(self) -> float:
        """Bytes of an activation: weights of 8 bits are multiplied with numbers that are kept in 16."""
        return max(2.0, self.element)

    @cached_property
    def layers(self) -> int:
        return sum(group.layers for group in self.groups)

    @cached_property
    def parameters(self) -> int:
        layers = sum(group.layers * group.parameters for group in self.groups)
        return layers + self.embedding + self.vectors + (0 if self.tied else self.head)

    @cached_property
    def active_parameters(self) -> int:
        """Those that one token uses: all but the experts that are not chosen."""
        experts = sum(group.layers * group.experts * group.expert for group in self.groups)
        return self.parameters - experts + self._routed

    @cached_property
    def kind(self) -> Literal["small", "dense", "sparse"]:
        """Which measured models it is like: "sparse" with experts, or latents for KV; "small" below `SMALL`."""
        if any(group.experts or group.prompt_score_flops for group in self.groups):  # latents alone differ in prompts
            return "sparse"
        return "small" if self.parameters < SMALL else "dense"

    @cached_property
    def weight_bytes(self) -> float:
        """What the weights take in memory."""
        if self.packing is None and self.element >= 2:
            return self.parameters * self._float
        tables = self.embedding + (0 if self.tied else self.head)
        layers = self.packable - tables
        return tables * self._table + layers * self._stored + (self.parameters - self.packable) * self._float

    def weights_read(self, tokens: float, experts: bool = True) -> float:
        """Bytes of weights that a batch of `tokens` tokens reads: all but the input table, and of the experts as many
        as the batch is expected to use (`experts` False: none)."""
        if tokens <= 0:
            return 0.0
        layers = self.matrices * self._stored + (self.experts_read(tokens) if experts else 0.0)
        return self.head * self._table + layers + (self.parameters - self.packable) * self._float

    def experts_read(self, tokens: float) -> float:
        """The part of `weights_read` that experts are: those that so many tokens are expected to use."""
        used = sum(group.layers * group.experts_read(tokens) * group.expert for group in self.groups)
        return used * self._stored

    @cached_property
    def packable(self) -> int:
        """Parameters of all matrices: what may be packed."""
        return self.parameters - self.vectors - sum(group.layers * group.vectors for group in self.groups)

    @cached_property
    def matrices(self) -> int:
        """Parameters of all layers that every token is multiplied with: all but experts, norms and biases."""
        return sum(group.layers * (group.projections + group.mlp) for group in self.groups)

    def unpacked(self, tokens: float, sampled: float, most: float) -> float:
        """Packed weights that are multiplied with more than `most` tokens of a batch, of which `sampled` need
        logits."""
        if self.packing is None:
            return 0.0
        count = float(self.matrices * (tokens > most) + self.head * (sampled > most))
        for group in self.groups:
            if group.experts and tokens * group.top_k / group.experts > most:
                count += group.layers * group.experts_read(tokens) * group.expert
        return count

    def dense_flops(self, tokens: float, sampled: float | None = None, experts: bool = True) -> float:
        """FLOPs of all but attention for a batch of `tokens` tokens, of which `sampled` (None: all) need logits;
        `experts` False: and of all but experts."""
        dense = 2.0 * (self.matrices * tokens + self.head * (tokens if sampled is None else sampled))
        return dense + (self.expert_flops(tokens) if experts else 0.0)

    def expert_flops(self, tokens: float) -> float:
        """The part of `dense_flops` that experts are."""
        return 2.0 * tokens * self._routed

    @cached_property
    def _routed(self) -> int:
        """Parameters of the experts that one token uses."""
        return sum(group.layers * group.top_k * group.expert for group in self.groups)

    def attention_work(self, context: float, element: float = 2.0) -> tuple[tuple[float, float], tuple[float, float]]:
        """Bytes of KV and FLOPs of one token that has `context` tokens before it and with it, over all layers: of the
        learned choices, and of the attention that follows them."""
        elements = flops = chosen = scored = 0.0
        for group in self.groups:
            tokens = group.layers * group.read(context)
            elements += group.kv_elements * tokens
            flops += group.score_flops * tokens
            if group.choice is not None:
                chosen += group.layers * group.choice.key_elements * context
                scored += group.layers * group.choice.score_flops * context
        return (chosen * element, scored), (elements * element, flops)

    def attention_flops(self, context: float) -> float:
        """FLOPs of attention for one token that has `context` tokens before it and with it, over all layers."""
        (_, scored), (_, flops) = self.attention_work(context)
        return scored + flops

    def prefill_flops(self, keys: float) -> float:
        """FLOPs of attention for one token of a prompt that meets so many keys, over all layers."""
        return float(sum(group.layers * group.prompt_flops(keys) for group in self.groups))

    def kv_bytes_per_token(self, element: float = 2.0) -> float:
        """What the cache keeps of a token over all layers, at `element` bytes an element."""
        return self._kv_elements * element

    def kv_bytes_read(self, context: float, element: float = 2.0) -> float:
        """Bytes of KV that one token reads over all layers: no more than a layer's window or choice, and all keys that
        choices are made by."""
        (key_bytes, _), (kv_bytes, _) = self.attention_work(context, element)
        return key_bytes + kv_bytes

    @cached_property
    def kv_heads(self) -> int:
        """Into how many parts its KV can be cut by heads; 1 where it has none."""
        return min((group.kv_heads for group in self.groups if group.attends), default=1)

    @cached_property
    def attentions(self) -> int:
        """Layers that attend."""
        return sum(group.layers for group in self.groups if group.attends)

    @cached_property
    def states(self) -> int:
        """Layers that have a recurrent state."""
        return sum(group.layers for group in self.groups if group.state is not None)

    @cached_property
    def all_reduces(self) -> int:
        return sum(group.layers * group.all_reduces for group in self.groups)

    @cached_property
    def state_heads(self) -> int:
        """Into how many parts the states can be cut; 0: there are none."""
        return min((group.state.heads for group in self.groups if group.state is not None), default=0)

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of one sequence's states over all layers, whatever its length: what each token reads, and writes."""
        return self._of_states(lambda state: state.nbytes)

    @cached_property
    def state_bytes_held(self) -> int:
        """What a sequence's states take in memory."""
        return STATE_RECORDS * self.state_bytes

    @cached_property
    def state_flops(self) -> int:
        """FLOPs of all states for one token in decode."""
        return self._of_states(lambda state: state.flops)

    @cached_property
    def state_prompt_flops(self) -> int:
        """FLOPs of all states for one token of a prompt."""
        return self._of_states(lambda state: state.prompt_flops)

    def state_bytes_sent(self, element: float = 2.0) -> float:
        """Bytes of q, k, v and the gates that one token sends to the states of all layers."""
        channels, gates, _ = self._state_messages
        return channels * element + gates

    def state_bytes_returned(self, element: float = 2.0) -> float:
        return self._state_messages[2] * element

    @cached_property
    def asked_elements(self) -> int:
        """Elements of one token's queries, over all layers."""
        return sum(group.layers * group.asked_elements for group in self.groups)

    @cached_property
    def output_elements(self) -> int:
        """Elements of one token's outputs of attention, over all layers."""
        return sum(group.layers * group.output_elements for group in self.groups)

    def exchange_bytes(self, element: float = 2.0) -> float:
        """Bytes of q, k, v, gates and outputs that one token sends and gets back over all layers.

        For GQA this is (2 + 2/G) e d L (Lamina, arXiv 2405.01814v2). k and v are `kv_bytes_per_token` of it.
        """
        messages = self.asked_elements + self.output_elements
        states = self.state_bytes_sent(element) + self.state_bytes_returned(element)
        return (messages + self._kv_elements) * element + states

    @cached_property
    def kv_projection_bytes(self) -> float:
        """The part of `weights_read` that the projections of k and v are."""
        return self._kv_projections * self._stored

    def kv_projection_flops(self, tokens: float) -> float:
        """The part of `dense_flops` that the projections of k and v are."""
        return 2.0 * self._kv_projections * tokens

    @cached_property
    def _kv_projections(self) -> int:
        return sum(group.layers * group.kv_projections for group in self.groups)

    @cached_property
    def _kv_elements(self) -> int:
        return sum(group.layers * group.kept_elements for group in self.groups)

    @cached_property
    def _state_messages(self) -> tuple[int, int, int]:
        """One token's messages with all states: elements that are sent, bytes of the gates, elements that come back."""
        total = self._of_states
        return (
            total(lambda state: state.channels),
            total(lambda state: state.gate_bytes),
            total(lambda state: state.outputs),
        )

    def _of_states(self, number: Callable[[StateShape], int]) -> int:
        return sum(group.layers * number(group.state) for group in self.groups if group.state is not None)

    @cached_property
    def _table(self) -> float:
        """Bytes of a weight of the input table and the head in memory: where matrices have 8 bits, these keep 16."""
        if self.packing is None:
            return self._float if self.element >= 2 else self.activation
        return self.packing.table or self.packing.nbytes

    @cached_property
    def _stored(self) -> float:
        """Bytes of a matrix's weight of a layer in memory."""
        return self._float if self.packing is None else self.packing.nbytes

    @cached_property
    def _float(self) -> float:
        """Bytes of a weight that is not packed."""
        return self.element if self.published_weight_bytes is None else self.published_weight_bytes / self.parameters
