"""The numbers of a model that decide its cost: parameters, KV bytes and FLOPs, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """`layers` layers that are alike. Parameters and elements are for one of them.

    `projections` are the parameters of q, k, v and o (`kv_projections` of them, those of k and v); `mlp`: parameters
    that every token uses. With `experts`, each token uses `top_k` of them besides, with `expert` parameters each; the
    router and shared experts are part of `mlp`. `vectors`: norms and biases, which are stored and read but not
    multiplied. `kv_elements`: what the cache keeps of a token; `query_elements`, `output_elements`: what attention is
    sent of it, and sends back. `score_flops`: FLOPs of one token with one key, both products. `window`: None reads
    everything. `prompt_score_flops`: the same in prefill, where it differs.

    MLA is counted as it decodes, in the absorbed form: there is one KV head, of the latent and its rotary part; queries
    and outputs are of the latent's width; and `kv_projections` makes the latent alone, since what made k and v of it
    works on queries and outputs instead (DeepSeek-V2, arXiv 2405.04434, section 2.1). Prompts are not absorbed.
    """

    layers: int
    kv_heads: int
    projections: int
    kv_projections: int
    mlp: int
    kv_elements: int
    query_elements: int
    output_elements: int
    score_flops: int
    experts: int = 0
    top_k: int = 0
    expert: int = 0
    window: int | None = None
    vectors: int = 0
    prompt_score_flops: int = 0

    @property
    def multiplied(self) -> int:
        """Parameters of one layer that a token is multiplied with."""
        return self.projections + self.mlp + self.top_k * self.expert

    @property
    def parameters(self) -> int:
        """Of one layer, all of them."""
        return self.projections + self.mlp + self.vectors + self.experts * self.expert

    def experts_read(self, tokens: float) -> float:
        """How many experts of a layer `tokens` tokens use, if each takes any k alike: E (1 - (1 - k / E) ^ tokens)."""
        if not self.experts:
            return 0.0
        return self.experts * (1.0 - math.pow(1.0 - self.top_k / self.experts, tokens))

    def read(self, context: float) -> float:
        """How many of `context` tokens one token attends to."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as the cost model sees it. `embedding`: parameters of the input table, which are stored and not
    multiplied; `head`: those of the output layer (the same table where `tied`). `element`: bytes of a weight and an
    activation. `vectors`: the last norm."""

    name: str
    hidden: int
    groups: tuple[LayerGroup, ...]
    embedding: int
    head: int
    tied: bool
    max_context: int
    element: float = 2.0
    published_weight_bytes: float | None = None
    """The weights' bytes as a paper prints them, where they differ from the count; they are used then."""
    vectors: int = 0

    @property
    def layers(self) -> int:
        return sum(group.layers for group in self.groups)

    @property
    def parameters(self) -> int:
        layers = sum(group.layers * group.parameters for group in self.groups)
        return layers + self.embedding + self.vectors + (0 if self.tied else self.head)

    @property
    def weight_bytes(self) -> float:
        """What the weights take in memory."""
        return self.parameters * self._stored

    def weights_read(self, tokens: float) -> float:
        """Bytes of weights that a batch of `tokens` tokens reads: all but the input table, and of the experts as many
        as the batch is expected to use."""
        if tokens <= 0:
            return 0.0
        read = float(self.head + self.vectors)
        for group in self.groups:
            always = group.projections + group.mlp + group.vectors
            read += group.layers * (always + group.experts_read(tokens) * group.expert)
        return read * self._stored

    def dense_flops(self, tokens: float, sampled: float | None = None) -> float:
        """FLOPs of all but attention for a batch of `tokens` tokens, of which `sampled` (None: all) need logits."""
        layers = sum(group.layers * group.multiplied for group in self.groups)
        return 2.0 * (layers * tokens + self.head * (tokens if sampled is None else sampled))

    def attention_flops(self, context: float) -> float:
        """FLOPs of attention for one token that has `context` tokens before it and with it, over all layers."""
        return float(sum(group.layers * group.score_flops * group.read(context) for group in self.groups))

    def prefill_flops(self, keys: float) -> float:
        """FLOPs of attention for one token of a prompt that meets so many keys, over all layers."""
        return float(
            sum(
                group.layers * (group.prompt_score_flops or group.score_flops) * group.read(keys)
                for group in self.groups
            )
        )

    def kv_bytes_per_token(self, element: float = 2.0) -> float:
        """What the cache keeps of a token over all layers, at `element` bytes an element."""
        return self._kv_elements * element

    def kv_bytes_read(self, context: float, element: float = 2.0) -> float:
        """Bytes of KV that one token reads over all layers, in layers with a window no more than that."""
        return sum(group.layers * group.kv_elements * group.read(context) for group in self.groups) * element

    def exchange_bytes(self, element: float = 2.0) -> float:
        """Bytes of q, k, v and attention's output that one token sends and gets back over all layers.

        For GQA this is (2 + 2/G) e d L (Lamina, arXiv 2405.01814v2). k and v are `kv_bytes_per_token` of it.
        """
        there = sum(group.layers * (group.query_elements + group.output_elements) for group in self.groups)
        return (there + self._kv_elements) * element

    @property
    def kv_projection_bytes(self) -> float:
        """The part of `weights_read` that the projections of k and v are."""
        return self._kv_projections * self._stored

    def kv_projection_flops(self, tokens: float) -> float:
        """The part of `dense_flops` that the projections of k and v are."""
        return 2.0 * self._kv_projections * tokens

    @property
    def _kv_projections(self) -> int:
        return sum(group.layers * group.kv_projections for group in self.groups)

    @property
    def _kv_elements(self) -> int:
        return sum(group.layers * group.kv_elements for group in self.groups)

    @property
    def _stored(self) -> float:
        """Bytes of a parameter in memory."""
        return self.element if self.published_weight_bytes is None else self.published_weight_bytes / self.parameters
