"""A system whose attention is on other devices than its weights (`Offloaded`): what devices with the weights do, what
those with the KV do, and what crosses between them.

`capacity_of` says how much KV and how many states a number of bytes holds, and `room_beside` how many bytes the weights
leave. Systems without offloaded attention use both too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from lamina.errors import InvalidRequest
from lamina.simulator.costs.bounds import Text, number_within, whole
from lamina.simulator.costs.cost_model import (
    FULL,
    Exchange,
    KvPolicy,
    Load,
    Speculation,
    StepCost,
    attention_time,
    busiest_share,
    check_drafts,
    draft_model,
    exchange_time,
    kv_projection_time,
    mixing_time,
    model_time,
    state_share,
    state_time,
    token_cost,
)
from lamina.simulator.costs.hardware import Device, Link, connection
from lamina.simulator.costs.shapes import ModelShape

MEMORY_SHARE = 0.9
"""The share of a device's memory for weights and KV; the rest is for activations. vLLM's default, too."""
SEQUENCE_TOKENS = 4096
"""Tokens of the sequences for which memory is divided between KV and states: the engine's default."""
UNBOUNDED = 1 << 40
"""Tokens, or sequences, of what takes no memory; tokens of a batch where prompts take no time."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many tokens' KV fit, and how many sequences' states; `UNBOUNDED` of what a model does not have."""

    tokens: int
    sequences: int


def room_beside(model: ModelShape, device: Device, count: int, share: float, draft: ModelShape | None = None) -> float:
    """Bytes that weights leave for KV, a draft model's too, which are on one of the devices. Raises InvalidRequest
    where they leave none."""
    more = 0.0 if draft is None else draft.weight_bytes
    room = count * device.memory * share - model.weight_bytes - more
    if room <= 0:
        remark = "" if draft is None else f", its draft model {more / 1e9:.1f} GB"
        raise InvalidRequest(
            f"model {model.name!r} has {model.weight_bytes / 1e9:.1f} GB of weights{remark}; {count}x {device.name} "
            f"have {count * device.memory / 1e9:.1f} GB, of which {share:.0%} may be used; allowed is a model that "
            "leaves room for KV"
        )
    return room


def capacity_of(
    model: ModelShape,
    policy: KvPolicy,
    kv_element: float,
    sequence_tokens: int,
    room: float,
    count: int = 1,
    beside: float = 0.0,
) -> Capacity:
    """What so many bytes hold, divided as the engine does it: in proportion to what sequences of `sequence_tokens`
    tokens take. `count`: of tensor-parallel devices; with more of them than heads, each head is kept more than once.
    `beside`: bytes a token that something else takes."""
    a_token = model.kv_bytes_per_token(kv_element) * (busiest_share(model, count) * count)
    a_sequence = model.state_bytes_held * (state_share(model, count) * count)
    if not a_sequence:
        token_bytes = a_token * policy.held + beside
        return Capacity(int(room / token_bytes) if token_bytes else UNBOUNDED, UNBOUNDED)
    sequences = room / (a_token * sequence_tokens + a_sequence)
    tokens = int(sequences * sequence_tokens / policy.held) if a_token else UNBOUNDED
    return Capacity(tokens, int(sequences))


MOST = 1 << 24
"""The most devices of a kind, lanes, and tokens of a batch."""
_SHARES = 20
"""Equal steps from 0 to 1, between which `best_local_share` chooses."""
PAGE_SIZE = 32
"""Tokens of a KV page of the engine."""


class Lane(NamedTuple):
    """One of several batches in rotation, by what each tier does for it, in seconds."""

    dense: float
    local: float
    """Attention on the model devices."""
    attention: float
    exchange: Exchange
    hop: float
    """The way from one replica of the weights to the next, in each layer."""
    past: float
    """The part of `attention` that is not for states."""
    hidden: float = 0.0
    """The seconds of `past` that are hidden where q goes first: attention begins when q arrives. Those of states are
    not, which need k and v first of all."""

    @property
    def alone(self) -> float:
        """Both tiers attend at once."""
        return self.dense + self.hop + max(self.local, self.exchange.seconds + self.attention - self.hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloaded:
    """Lamina: dense layers on `model_count` devices, KV and attention on `attention_count` others: DOP(a, b).

    `local_share`: the share of the KV that stays beside the weights, in whole sequences, and is attended there while
    the rest is attended elsewhere. It is more where the attention devices are full, and less where the model devices
    are. 0: the model devices keep none.

    `lanes` batches rotate: while one is attended, another is in the dense layers, of which there are `model_replicas`
    (the paper: lanes - 1 of them; each is `model_count` devices). Batches with prompts stay on the first of them, as in
    the engine. `overlap`: q goes first where that makes a step shorter, as the engine finds out by trying, so that
    attention over the past begins when q arrives; else q, k and v go together, and the token's own key is attended with
    its past. `workers`: attention worker processes, where one machine is shared by several; else there is one a device.
    `attention_memory_share`: of devices without weights.

    `behind`: the model is another engine's. All attention is where the KV is, that of prompts too, whose q, k and v are
    waited for, and layers with a window keep all tokens.
    """

    model: ModelShape
    model_device: Device
    attention_device: Device
    link: Link
    model_count: int = 1
    attention_count: int = 1
    model_replicas: int = 1
    lanes: int = 1
    overlap: bool = True
    shard: str = "heads"
    batch_tokens: int = 2048
    max_sequences: int = 4096
    policy: KvPolicy = FULL
    kv_element: float = 2.0
    memory_share: float = MEMORY_SHARE
    attention_memory_share: float = MEMORY_SHARE
    sequence_tokens: int = SEQUENCE_TOKENS
    workers: int | None = None
    speculation: Speculation | None = None
    local_share: float = 0.0
    behind: bool = False
    label: Text = ""

    def __post_init__(self) -> None:
        check_drafts(self.speculation, self.model)
        counts = ["model_count", "attention_count", "model_replicas", "lanes", "batch_tokens", "max_sequences"]
        counts += ["sequence_tokens"] if self.workers is None else ["sequence_tokens", "workers"]
        for name in counts:
            whole(name, getattr(self, name), 1, MOST)
        number_within("kv_element", self.kv_element, 0.25, 8)
        for name in ("memory_share", "attention_memory_share"):
            number_within(name, getattr(self, name), 0.01, 1)
        number_within("local_share", self.local_share, 0, 1)
        if self.shard not in ("heads", "sequence"):
            raise InvalidRequest(f"shard is {self.shard!r}; allowed are heads, sequence")
        if self.local_share and self.model_replicas > 1:
            raise InvalidRequest(
                f"local_share is {self.local_share:g} with {self.model_replicas} replicas of the weights, of which one "
                "could read what is there; allowed is 0"
            )

    @property
    def name(self) -> str:
        dop = f"DOP({self.model_count}, {self.attention_count})"
        more = f", {self.lanes} lanes" if self.lanes > 1 else ""
        more += f", {self.model_replicas} replicas of the weights" if self.model_replicas > 1 else ""
        more += f", {self.local_share:.0%} local" if self.local_share else ""
        return self.label or f"{dop} {self.model_device.name} + {self.attention_device.name}{more}"

    @property
    def max_batch_tokens(self) -> int:
        return self.batch_tokens

    @property
    def devices(self) -> tuple[tuple[Device, int], ...]:
        model = (self.model_device, self.model_count * self.model_replicas)
        return model, (self.attention_device, self.attention_count)

    @property
    def capacity(self) -> Capacity:
        """What fits, in both tiers where KV is kept in both. Raises InvalidRequest where the weights do not."""
        local, remote = self._tiers()
        return Capacity(
            min(UNBOUNDED, local.tokens + remote.tokens), min(UNBOUNDED, local.sequences + remote.sequences)
        )

    def _tiers(self) -> tuple[Capacity, Capacity]:
        """What fits beside the weights, and on the attention devices."""
        model, draft, local_bytes = self.model, draft_model(self.speculation), self._model_room
        remote_bytes = self.attention_count * self.attention_device.memory * self.attention_memory_share
        remote = capacity_of(model, self.policy, self.kv_element, self.sequence_tokens, remote_bytes)
        drafted = 0.0 if draft is None else draft.kv_bytes_per_token()
        if drafted:  # the draft model's KV of all sequences is beside the weights
            remote = Capacity(min(remote.tokens, int(local_bytes / drafted)), remote.sequences)
        room = local_bytes - remote.tokens * drafted
        if not self.local_share or room <= 0:
            return Capacity(0, 0), remote
        count, element = self.model_count, self.kv_element
        return capacity_of(model, self.policy, element, self.sequence_tokens, room, count, drafted), remote

    @property
    def _model_room(self) -> float:
        """Bytes beside the weights."""
        draft = draft_model(self.speculation)
        return room_beside(self.model, self.model_device, self.model_count, self.memory_share, draft)

    @property
    def kv_tokens(self) -> int:
        return self.capacity.tokens

    @property
    def prompt_tokens(self) -> int:
        a_token = self.model.kv_bytes_per_token(self.kv_element)
        return int(self._model_room / a_token) if a_token else UNBOUNDED

    @property
    def wire(self) -> float:
        """Bytes a second between a replica of the weights and the attention devices: over one network card for each
        device that both sides have."""
        return self._wire(1)

    def _wire(self, replicas: int) -> float:
        cards = min(self.model_count * replicas, self.attention_count)
        return cards * connection(self.link, self.model_device, self.attention_device)

    def local_part(self, load: Load) -> float:
        """The share of this load's KV that the model devices keep: `local_share`, as far as there is room."""
        if not self.local_share:
            return 0.0
        tokens = load.decode * self.policy.tokens_held(load.context)
        local, remote = (min(tier.tokens, tier.sequences * max(1.0, load.context)) for tier in self._tiers())
        tokens = max(tokens, 1.0)
        if tokens >= local + remote:
            return local / max(1.0, local + remote)
        return min(max(self.local_share, 1 - remote / tokens), local / tokens)

    def lane(self, load: Load, query_first: bool = False, share: float | None = None) -> Lane:
        """One batch, with the tiers to itself; `query_first`: q is sent before k and v. `share`: of its KV, what the
        model devices keep (None: as `local_part` says)."""
        model, share = self.model, self.local_part(load) if share is None else share
        dense, local, away = self._dense(load), 0.0, load
        if share:
            near, away = load.part(share), load.part(1 - share)
            local = mixing_time(model, self.model_device, self.model_count, near, self.policy, self.kv_element)
        by_heads = self.shard == "heads"
        cells = max(1, (away.decode or 1) * (model.kv_heads if by_heads else self.attention_count))
        busiest = -(-cells // self.attention_count) / cells  # whole heads, dealt out evenly over all sequences
        attention = attention_time(model, self.attention_device, away, self.policy, self.kv_element, busiest=busiest)
        states = state_share(model, self.attention_count, away.decode)
        mixing = attention + state_time(model, self.attention_device, away, states)
        lane = Lane(dense, local, mixing, self._exchange(away), self._hop(load), attention)
        return self._with_query_first(lane, load) if query_first else lane

    def _with_query_first(self, lane: Lane, load: Load) -> Lane:
        """The lane where q is sent before k and v."""
        late = kv_projection_time(self.model, self.model_device, self.model_count, load) + lane.exchange.keys
        more = self.model.attentions * self.link.query_first_time
        return Lane(
            lane.dense + more, lane.local, lane.attention, lane.exchange, lane.hop, lane.past, min(lane.past, late)
        )

    def _dense(self, load: Load) -> float:
        """Seconds of all that the model devices do beside attention in decode."""
        device = self.model_device
        dense = model_time(self.model, device, self.model_count, load, self.kv_element)
        return dense if self.speculation is None else dense + self.speculation.draft_time(device, load)

    def step(self, load: Load) -> StepCost:
        """All sequences go on by one token, by speculation in the mean: `lanes` batches with their shares of them."""
        return token_cost(self.speculation, load, self._step)

    def _step(self, load: Load) -> StepCost:
        """A batch in the better order of messages."""
        if self.behind and load.prefill_tokens:
            pairs = load.prefill_pairs + load.prefix_pairs
            load = replace(
                load, prefill_pairs=0.0, prefill_keys=0.0, prefix_tokens=load.prefill_tokens, prefix_pairs=pairs
            )
        together, first = self._orders(load)
        return together if first is None or first.seconds >= together.seconds else first

    def _orders(self, load: Load) -> tuple[StepCost, StepCost | None]:
        """A batch with q, k and v together; and one with q first, where that is tried."""
        lanes, replicas = int(min(self.lanes, max(1, load.decode))), self.model_replicas
        share, part = self.local_part(load), load.divided(lanes)
        lane = self.lane(part, share=share)
        # The largest lane sets the pace; all of them together have no more sequences than there are.
        exchange = lane.exchange
        if part != load or replicas > 1:
            exchange = self._exchange(load.part(1 - share) if share else load, replicas)
        full = load.decode / -(-load.decode // lanes) if load.decode else lanes
        least = 0.0
        if replicas > 1 and load.prefill_tokens:  # one batch has the prompts, and stays on one replica
            least = self._dense(replace(load, decode=part.decode))

        def cost(lane: Lane) -> StepCost:
            model, attention = lanes * (lane.dense + lane.local), full * lane.attention
            seconds = max(lane.alone, model / min(lanes, replicas), attention, exchange.busy, least)
            return StepCost(seconds, model / replicas, attention, exchange.busy, exchange.nbytes)

        return cost(lane), cost(self._with_query_first(lane, part)) if self.overlap else None

    def _exchange(self, load: Load, replicas: int = 1) -> Exchange:
        ranges = min(self.attention_count, max(1, int(load.context) // PAGE_SIZE))
        copies = 1 if self.shard == "heads" else ranges
        wire = self._wire(replicas)
        exchange = exchange_time(self.model, self.link, wire, load, copies=copies, workers=self.workers or 1)
        return exchange._replace(keys=exchange.keys + exchange.stored, stored=0.0) if self.behind else exchange

    def _hop(self, load: Load) -> float:
        """Seconds of a lane's way to the next replica, with the residual stream and what attention gave, a layer."""
        if self.model_replicas == 1:
            return 0.0
        wire = self.model_count * connection(self.link, self.model_device, self.model_device)
        width = sum(group.layers * (self.model.hidden + group.output_elements) for group in self.model.groups)
        moved = load.tokens * width * self.model.activation / wire
        return (self.model.attentions + self.model.states) * self.link.round_trip / 2 + moved


def best_local_share(system: Offloaded, load: Load) -> float:
    """The share of this load's KV beside the weights with which a step is shortest, as the engine's "auto" finds it by
    trying; the smallest of those that are equal."""
    shares = (part / _SHARES for part in range(_SHARES + 1))
    return min(shares, key=lambda share: (replace(system, local_share=share).step(load).seconds, share))
