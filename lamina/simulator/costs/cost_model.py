"""Bytes, FLOPs and seconds of one batch, from a model's shape and a device's rates. Pure arithmetic, nothing hidden:
each time is max(bytes / bandwidth, FLOPs / rate) / efficiency, and what `Efficiency` adds.

The operators are those of Lamina's section 3 (arXiv 2405.01814): dense layers want 2 N B FLOPs for e N + 2 e B d bytes,
attention reads every sequence's own KV, and (2 + 2/G) e d bytes a token and layer cross between the two.

`Speculation` says how many tokens a step gives with drafts, `best_drafts` how many drafts pay, and `token_cost` what a
token then costs. A row of 1 + k tokens verifies k drafts over KV that is read once. If each draft is accepted with the
chance `a` where all before it were, a step gives a sequence (1 - a^(k+1)) / (1 - a) tokens in the mean (Leviathan et
al., arXiv 2211.17192, equation 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from lamina.errors import InvalidRequest
from lamina.scheduling.speculation import MAX_DRAFTS
from lamina.simulator.costs.bounds import Text, number_within, text, whole
from lamina.simulator.costs.hardware import Device, Link, at
from lamina.simulator.costs.shapes import ModelShape

FEW_TOKENS = 32
"""Tokens of a batch up to which packed weights are multiplied as they are on every CPU."""
ALPHA = 0.2
"""The slowdown by the network that Lamina's minimum bandwidth allows (section 4.1)."""


@dataclass(frozen=True, slots=True)
class KvPolicy:
    """What remains under a KV policy, as shares of everything: of the bytes that decode reads, and of the bytes held.
    With a `window`, no more than so many tokens are read and held of a sequence."""

    name: Text = "full"
    read: float = 1.0
    held: float = 1.0
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("read", "held"):
            number_within(f"{name} of policy {self.name!r}", getattr(self, name), 1e-6, 1)
        if self.window is not None:
            whole(f"window of policy {self.name!r}", self.window, 1, 1 << 24)

    def tokens_read(self, context: float) -> float:
        """Tokens that decode reads of a sequence with so many."""
        return self.read * self._seen(context)

    def tokens_held(self, context: float) -> float:
        return self.held * self._seen(context)

    def _seen(self, context: float) -> float:
        return context if self.window is None else min(context, self.window)


FULL = KvPolicy()


@dataclass(frozen=True, slots=True)
class Load:
    """One batch: `decode` sequences, of which each reads `context` tokens of KV in the mean, and prefill rows of
    `prefill_tokens` whose queries meet `prefill_pairs` keys in all, reading `prefill_keys` tokens of KV.

    `prefix_tokens` of the prefill's tokens meet `prefix_pairs` keys besides, of what is held where decode reads it.
    `prompts` of its prompts end in it, whose states go to where decode reads them. Each of the decoding sequences has
    `drafts` tokens in the mean that are verified beside its own, over the same KV, which is read once.
    """

    decode: float
    context: float
    prefill_tokens: float = 0
    prefill_pairs: float = 0.0
    prefill_keys: float = 0.0
    prefix_tokens: float = 0.0
    prefix_pairs: float = 0.0
    prompts: float = 0.0
    drafts: float = 0.0

    def __post_init__(self) -> None:
        # NaN compares false.
        if not (
            0 <= self.decode < math.inf
            and 0 <= self.context < math.inf
            and 0 <= self.prefill_tokens < math.inf
            and 0 <= self.drafts < math.inf
        ):  # written out: it is asked a million times for a plan
            raise InvalidRequest(f"a batch is {self}; allowed are finite numbers, 0 or more")
        if not self.prefill_tokens and (self.prefill_pairs or self.prefix_pairs or self.prompts):
            raise InvalidRequest(f"a batch is {self}; allowed are pairs and ends of a prefill that has tokens")

    @property
    def decode_tokens(self) -> float:
        """Tokens of the decoding sequences, drafts included. Each needs logits."""
        return self.decode * (1 + self.drafts)

    @property
    def tokens(self) -> float:
        return self.decode_tokens + self.prefill_tokens

    def divided(self, lanes: int) -> Load:
        """The largest of `lanes` equal parts, whole sequences each."""
        return self._scaled(-(-self.decode // lanes), 1 / lanes)

    def part(self, share: float) -> Load:
        """This share of the sequences and of the prompts."""
        return self._scaled(self.decode * share, share)

    def _scaled(self, decode: float, share: float) -> Load:
        """The batch with so many in decode, and this share of the prefill."""
        return Load(
            decode,
            self.context,
            self.prefill_tokens * share,
            self.prefill_pairs * share,
            self.prefill_keys * share,
            self.prefix_tokens * share,
            self.prefix_pairs * share,
            self.prompts * share,
            self.drafts,
        )


class StepCost(NamedTuple):
    """One batch: its seconds, those in which each tier was busy, and the bytes that crossed the link."""

    seconds: float
    model: float = 0.0
    attention: float = 0.0
    network: float = 0.0
    link_bytes: float = 0.0

    def shared(self, whole: StepCost, tokens: float) -> StepCost:
        """The cost of one token of each sequence, where a step gives `tokens` of them: this step, of decode alone,
        divided by `tokens`, and in full what `whole`, the same step with prefill, takes beyond it."""
        keep = 1 / tokens - 1
        return StepCost(
            whole.seconds + keep * self.seconds,
            whole.model + keep * self.model,
            whole.attention + keep * self.attention,
            whole.network + keep * self.network,
            whole.link_bytes + keep * self.link_bytes,
        )


def dense_time(model: ModelShape, device: Device, count: int, load: Load) -> float:
    """Seconds of the dense layers of one batch on `count` devices by tensor parallelism, with what comes on top."""
    tokens, efficiency = load.tokens, device.efficiency
    if not tokens:
        return 0.0
    overhead = (
        efficiency.step_overhead + model.layers * efficiency.layer_overhead + load.decode * efficiency.row_overhead
    )
    if count > 1:
        overhead += model.all_reduces * all_reduce_time(device, count, tokens * model.hidden * model.activation)
    if device.unpack:
        overhead += model.unpacked(tokens, load.decode_tokens, FEW_TOKENS) / device.unpack / count
    experts = 0.0
    if (flops := model.expert_flops(tokens)) > 0:
        moved = model.experts_read(tokens) / efficiency.experts
        flops /= efficiency.experts_compute or efficiency.experts
        experts = _roofline(moved, flops, device, model, tokens)
    return (_roofline(*_matrices(model, load), device, model, tokens) + experts) / count + overhead


def kv_projection_time(model: ModelShape, device: Device, count: int, load: Load) -> float:
    """The part of `dense_time` that the projections of k and v are: what is left to do when q can leave.

    It is what the dense layers would be faster by without them, not their own roofline: where bytes bound one and FLOPs
    the other, that could shrink on a better device by more than the whole does, and a step of it would take longer.
    """
    if not load.tokens:
        return 0.0
    moved, flops = _matrices(model, load)
    seconds = _roofline(moved, flops, device, model, load.tokens)
    less = flops - model.kv_projection_flops(load.tokens)
    others = _roofline(moved - model.kv_projection_bytes, less, device, model, load.tokens)
    return (seconds - others) / count


def _matrices(model: ModelShape, load: Load) -> tuple[float, float]:
    """Bytes and FLOPs of all but attention and experts for one batch, which has tokens."""
    moved = model.weights_read(load.tokens, experts=False) + 2 * model.activation * load.tokens * model.hidden
    return moved, model.dense_flops(load.tokens, max(1, load.decode_tokens), experts=False)


def _roofline(moved: float, flops: float, device: Device, model: ModelShape, tokens: float) -> float:
    """Seconds of matrices on one device, by what it reaches of its rates. CPUs multiply packed weights in 8 bits, those
    that unpack them for many tokens in 16 then; other devices multiply in 16."""
    element, efficiency = model.element, device.efficiency
    if model.packing is not None:
        packed = device.kind == "cpu" and (not device.unpack or tokens <= FEW_TOKENS)
        element = 1.0 if packed else 2.0
    share = at(efficiency.dense, tokens)
    return max(moved / device.bandwidth / share, flops / rate(device, element) / efficiency.of_flops(element, tokens))


def all_reduce_time(device: Device, count: int, nbytes: float) -> float:
    """Seconds of an all-reduce by a ring over `count` devices: 2 (n - 1) / n of the bytes pass each link."""
    if device.interconnect <= 0:
        raise InvalidRequest(
            f"device {device.name!r} has no interconnect; allowed is tensor_parallel 1, or a device that has one"
        )
    wire = device.interconnect * device.efficiency.collective
    return device.efficiency.collective_latency + 2 * (count - 1) / count * nbytes / wire


def attention_time(
    model: ModelShape,
    device: Device,
    load: Load,
    policy: KvPolicy = FULL,
    kv_element: float = 2.0,
    *,
    busiest: float = 1.0,
    queries: float | None = None,
) -> float:
    """Seconds of the attention of one batch's decode rows over their past, on the device that has most to do: it reads
    the share `busiest` of the KV, and computes the share `queries` of the query heads (None: the same). A sequence's
    drafts are computed over what is read for it once.

    Prefill's rows over a prefix that is held here are in it: they read it once, and compute each pair.
    """
    if not load.decode and not load.prefix_pairs:
        return 0.0
    if not model.attentions:
        return 0.0
    efficiency, read = device.efficiency, policy.tokens_read(load.context)
    queries = busiest if queries is None else queries
    rows, tokens = load.decode, load.decode_tokens
    work = [(rows * nbytes, tokens * flops) for nbytes, flops in model.attention_work(read, kv_element)]
    if load.prefix_tokens:
        keys = load.prefix_pairs / load.prefix_tokens
        more = model.attention_work(keys, kv_element)
        work = [(a + b, f + load.prefix_tokens * g) for (a, f), (b, g) in zip(work, more, strict=True)]
    # A choice is made before the attention to what it chose, so that each has its own bound.
    best = sum(
        max(moved * busiest / device.bandwidth, flops * queries / rate(device, kv_element)) for moved, flops in work
    )
    moved = sum(moved for moved, _ in work)
    overhead = rows * model.attentions * efficiency.attention_row_overhead * busiest
    return best / at(efficiency.attention, max(1.0, moved * busiest / model.attentions)) + overhead


def state_time(model: ModelShape, device: Device, load: Load, share: float = 1.0) -> float:
    """Seconds in which one batch's decode rows update and read their states, on the device that has most to do, which
    is the share `share` of them. A state is read and written once a token; the context does not matter."""
    if not load.decode or not model.states:
        return 0.0
    moved, flops = 2 * load.decode * model.state_bytes * share, load.decode * model.state_flops * share
    best = max(moved / device.bandwidth, flops / device.flops)
    rows = load.decode * model.states * device.efficiency.attention_row_overhead * share
    return best / at(device.efficiency.attention, max(1.0, moved / model.states)) + rows


def prefill_state_time(model: ModelShape, device: Device, count: int, load: Load) -> float:
    """Seconds in which the states of prefill rows are advanced, in chunks, beside the dense layers."""
    if not load.prefill_tokens or not model.states:
        return 0.0
    flops = load.prefill_tokens * model.state_prompt_flops / device.flops
    moved = 2 * load.prompts * model.state_bytes / device.bandwidth
    efficiency = device.efficiency
    reached = efficiency.of_flops(model.activation, load.prefill_tokens)
    return max(flops / reached, moved / efficiency.attention[-1][1]) / count


def prefill_attention_time(model: ModelShape, device: Device, count: int, load: Load, kv_element: float = 2.0) -> float:
    """Seconds of the attention of prefill rows over what is held beside the dense layers: FLOPs of their pairs, or
    bytes of the keys where few tokens follow many. A layer's window is applied to the mean of keys that a token meets.
    """
    if not load.prefill_pairs:
        return 0.0
    keys = load.prefill_pairs / load.prefill_tokens
    efficiency = device.efficiency
    flops = load.prefill_tokens * model.prefill_flops(keys) / rate(device, model.activation)
    moved = model.kv_bytes_read(load.prefill_keys, kv_element) / device.bandwidth
    reached = efficiency.of_flops(model.activation, load.prefill_tokens)
    return max(flops / reached, moved / efficiency.attention[-1][1]) / count


def model_time(model: ModelShape, device: Device, count: int, load: Load, kv_element: float = 2.0) -> float:
    """Seconds of all that `count` devices with the weights do for one batch beside attention and states in decode."""
    seconds = dense_time(model, device, count, load)
    seconds += prefill_attention_time(model, device, count, load, kv_element)
    return seconds + prefill_state_time(model, device, count, load)


def mixing_time(
    model: ModelShape, device: Device, count: int, load: Load, policy: KvPolicy = FULL, kv_element: float = 2.0
) -> float:
    """Seconds of attention and states of one batch's decode rows, on `count` devices by tensor parallelism."""
    attention = attention_time(
        model, device, load, policy, kv_element, busiest=busiest_share(model, count), queries=1 / count
    )
    return attention + state_time(model, device, load, state_share(model, count))


def busiest_share(model: ModelShape, count: int) -> float:
    """The share of all KV that one of `count` tensor-parallel devices has at most: whole heads, so that more devices
    than heads spare nothing."""
    return -(-model.kv_heads // count) / model.kv_heads


def state_share(model: ModelShape, count: int, sequences: float = 1) -> float:
    """The share of these sequences' states that one of `count` devices has at most: whole heads, dealt out evenly over
    all sequences."""
    cells = max(1.0, sequences * model.state_heads)
    return -(-cells // count) / cells


def rate(device: Device, element: float) -> float:
    """FLOP/s for elements of so many bytes."""
    return device.flops_8bit if element <= 1 and device.flops_8bit else device.flops


def minimum_bandwidth(model: ModelShape, batch: float, model_seconds: float, attention_seconds: float) -> float:
    """Bytes a second between model and attention workers below which the network slows decode by more than ALPHA:
    (2 + 2/G) e d B L / (alpha (MTIME(B) + ATIME(B, l))), Lamina's equation in section 4.1."""
    return model.exchange_bytes(model.activation) * batch / (ALPHA * (model_seconds + attention_seconds))


class Exchange(NamedTuple):
    """What one batch sends to the attention workers and gets back, over all layers. Times are seconds."""

    queries: float
    """The bytes of queries, and of what is sent to states."""
    keys: float
    """The bytes of k and v of decode rows."""
    outputs: float
    """The bytes of partial outputs."""
    stored: float
    """The bytes of the KV and states of prefill rows, which no token waits for."""
    waiting: float
    """The batch's announcement, round trips, and what each worker and row takes beside its bytes."""
    nbytes: float

    @property
    def seconds(self) -> float:
        """Seconds that a batch waits, with nothing else under way."""
        return self.waiting + self.queries + self.keys + self.outputs

    @property
    def busy(self) -> float:
        """Seconds in which the link is busy in its busier direction."""
        return max(self.queries + self.keys + self.stored, self.outputs)


def exchange_time(
    model: ModelShape, link: Link, wire: float, load: Load, *, copies: int = 1, workers: int = 1
) -> Exchange:
    """Queries, keys and values out, partial outputs back, layer by layer, over `wire` bytes a second in all.

    `copies`: how many workers each query goes to, and a partial output of its width comes back from: 1 where they share
    heads, all where they share ranges. `workers`: how many share one machine.
    """
    element, rows = model.activation, load.decode_tokens + load.prefix_tokens
    query_bytes = rows * copies * model.asked_elements * element
    output_bytes = rows * copies * model.output_elements * element
    query_bytes += load.decode * model.state_bytes_sent(element)
    output_bytes += load.decode * model.state_bytes_returned(element)
    key_bytes, stored = (
        model.kv_bytes_per_token(element) * count for count in (load.decode_tokens, load.prefill_tokens)
    )
    stored += load.prompts * model.state_bytes
    trips = (model.attentions if rows else 0) + (model.states if load.decode else 0)
    a_layer = link.round_trip + (workers - 1) * link.worker_time + rows * workers * link.row_time
    announced = link.announce_time + load.decode * workers * link.announce_row_time if trips else 0.0
    return Exchange(
        queries=query_bytes / wire,
        keys=key_bytes / wire,
        outputs=output_bytes / wire,
        stored=stored / wire,
        waiting=announced + trips * a_layer,
        nbytes=query_bytes + output_bytes + key_bytes + stored,
    )


NGRAM = "ngram"
_PADDING = 1024
"""Rows by which tables of one vocabulary may differ."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """Drafts that are verified beside each token. Raises InvalidRequest for a number out of bounds.

    `name`: "ngram", or the model that drafts as an engine loads it; `draft` is its shape. `tokens`: drafts of a
    sequence and step at most. `acceptance`: the chance of a draft where those before it were accepted. `proposed`: the
    share of steps in which there are any, since prompts repeat themselves only here and there; a model always drafts.
    """

    acceptance: float
    tokens: int = 4
    proposed: float = 1.0
    name: str = NGRAM
    draft: ModelShape | None = None

    def __post_init__(self) -> None:
        text("name of what drafts", self.name)
        number_within("acceptance", self.acceptance, 0, 1)
        number_within("proposed", self.proposed, 0, 1)
        whole("tokens of speculation", self.tokens, 1, MAX_DRAFTS)
        if (self.draft is None) is not (self.name == NGRAM):
            raise InvalidRequest(f"drafts are by {self.name!r:.80}; allowed are {NGRAM}, or a model with its shape")
        if self.draft is not None and self.proposed < 1:
            raise InvalidRequest(f"proposed is {self.proposed:g} of a model that drafts; allowed is 1")
        if self.draft is not None and self.draft.states:
            raise InvalidRequest(f"draft model {self.draft.name!r} keeps states, which it could not go back to")

    def check(self, model: ModelShape) -> None:
        """Raise InvalidRequest where drafts of this model cannot be verified."""
        if model.states:
            raise InvalidRequest(f"speculation with {model.name!r} is not described: what drafts take of its states")
        if any(group.choice is not None for group in model.groups):
            raise InvalidRequest(f"speculation with {model.name!r} is not described: each draft chooses its own tokens")
        if self.draft is None:
            return
        rows = [shape.embedding // shape.hidden for shape in (self.draft, model)]
        if abs(rows[0] - rows[1]) > _PADDING:
            raise InvalidRequest(
                f"draft model {self.draft.name!r} has a vocabulary of {rows[0]}, {model.name!r} of {rows[1]}; allowed "
                f"is the same, padded by up to {_PADDING}"
            )

    def tokens_a_step(self, drafts: int) -> float:
        """Tokens that a sequence gets in the mean of a step with so many drafts, where there are any."""
        a = self.acceptance
        drafted = drafts + 1 if a == 1 else (1 - a ** (drafts + 1)) / (1 - a)
        return 1 + self.proposed * (drafted - 1)

    def load(self, load: Load, drafts: int) -> Load:
        """The batch with so many drafts for each of its sequences, where there are any."""
        return replace(load, drafts=self.proposed * drafts)

    def draft_time(self, device: Device, load: Load) -> float:
        """Seconds in which the drafts of a batch are made: a step of the draft model, on one device, for each; and
        those in which it reads the batch's prompts."""
        if self.draft is None or not load.drafts:
            return 0.0
        alone = Load(load.decode, load.context)
        step = dense_time(self.draft, device, 1, alone) + attention_time(self.draft, device, alone)
        prompts = replace(load, decode=0, drafts=0, prefix_tokens=0, prefix_pairs=0, prompts=0)
        reading = dense_time(self.draft, device, 1, prompts) + prefill_attention_time(self.draft, device, 1, prompts)
        return load.drafts * step + reading


def draft_model(speculation: Speculation | None) -> ModelShape | None:
    """The model whose weights and KV the drafts need."""
    return None if speculation is None else speculation.draft


def check_drafts(speculation: Speculation | None, model: ModelShape) -> None:
    """Raise InvalidRequest where a model cannot have such drafts."""
    if speculation is not None:
        speculation.check(model)


def token_cost(speculation: Speculation | None, load: Load, step: Callable[[Load], StepCost]) -> StepCost:
    """What one more token of each decoding sequence costs, by `step` of a batch with drafts, and all of its prefill.

    There are as many drafts as give the most tokens a second without prefill: none where they do not pay.
    """
    if speculation is None or not load.decode:
        return step(load)
    drafts, alone = best_drafts(speculation, load, step)
    with_prefill = step(speculation.load(load, drafts)) if load.prefill_tokens else alone
    return alone.shared(with_prefill, speculation.tokens_a_step(drafts))


def best_drafts(speculation: Speculation, load: Load, step: Callable[[Load], StepCost]) -> tuple[int, StepCost]:
    """How many drafts give the most tokens a second, and what a step of decode alone takes with them."""
    decode = Load(load.decode, load.context)
    tried = ((drafts, step(speculation.load(decode, drafts))) for drafts in range(speculation.tokens + 1))
    return max(tried, key=lambda each: speculation.tokens_a_step(each[0]) / each[1].seconds)
