"""Ways to serve a model: the machines of each, the KV that fits, and the seconds of a batch.

Every one of them is a frozen description; `step` is pure. A system is one instance: several of them behind a load
balancer are `replicas` of `simulate`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lamina.errors import InvalidRequest
from lamina.simulator.costs.capacity import MEMORY_SHARE, SEQUENCE_TOKENS, UNBOUNDED, Capacity, capacity_of, room_beside
from lamina.simulator.costs.cost_model import (
    FULL,
    Exchange,
    KvPolicy,
    Load,
    StepCost,
    attention_time,
    busiest_share,
    dense_time,
    exchange_time,
    kv_heads,
    kv_projection_time,
    prefill_attention_time,
    prefill_state_time,
    state_share,
    state_time,
)
from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.models import ModelShape
from lamina.simulator.costs.speculation import Speculation, best_drafts, token_cost
from lamina.simulator.costs.tables import number_within, whole

MOST = 1 << 24
"""Bounds of devices of a kind, of lanes, and of tokens of a batch."""
PAGE_SIZE = 16
"""Tokens of a KV page: vLLM's default."""
IDLE_POWER = 0.3
"""The share of a device's power that it draws while it waits. Assumed: no vendor publishes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Colocated:
    """Weights, KV and attention on the same devices, by tensor parallelism, as vLLM does.

    Without `chunked_prefill` a batch takes as many prompt tokens as the model has context, or `batch_tokens` if that is
    more: so a prompt is whole, unless the batch is full.
    """

    model: ModelShape
    device: Device
    tensor_parallel: int = 1
    chunked_prefill: bool = True
    batch_tokens: int = 2048
    max_sequences: int = 4096
    policy: KvPolicy = FULL
    kv_element: float = 2.0
    memory_share: float = MEMORY_SHARE
    sequence_tokens: int = SEQUENCE_TOKENS
    speculation: Speculation | None = None
    label: str = ""

    def __post_init__(self) -> None:
        _check_speculation(self.speculation, self.model)
        for name in ("tensor_parallel", "batch_tokens", "max_sequences", "sequence_tokens"):
            whole(name, getattr(self, name), 1, MOST)
        number_within("kv_element", self.kv_element, 0.25, 8)
        number_within("memory_share", self.memory_share, 0.01, 1)

    @property
    def name(self) -> str:
        prefill = "" if self.chunked_prefill else ", whole prompts"
        return self.label or f"{self.tensor_parallel}x {self.device.name} co-located{prefill}"

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of one batch, prefill chunks and decode rows together."""
        whole = max(self.batch_tokens, self.model.max_context)  # as vLLM asks where it doesn't cut prompts up
        return self.batch_tokens if self.chunked_prefill else whole

    @property
    def devices(self) -> tuple[tuple[Device, int], ...]:
        """Each kind and how many of it; the first is the model tier, the last the attention tier."""
        return ((self.device, self.tensor_parallel),)

    @property
    def capacity(self) -> Capacity:
        """What fits beside the weights. Raises InvalidRequest where not even they do."""
        count, draft = self.tensor_parallel, _draft(self.speculation)
        room = room_beside(self.model, self.device, count, self.memory_share, draft)
        # With more devices than heads, each head is kept more than once.
        copies = busiest_share(self.model, count) * count, state_share(self.model, count) * count
        beside = 0.0 if draft is None else draft.kv_bytes_per_token()
        return capacity_of(self.model, self.policy, self.kv_element, self.sequence_tokens, room, copies, beside)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV fits. Raises InvalidRequest where not even the weights do."""
        return self.capacity.tokens

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt whose KV fits beside the dense layers while it is computed. A longer one's past is read
        where decode reads it."""
        return self.kv_tokens

    def step(self, load: Load) -> StepCost:
        """All sequences go on by one token, by speculation in the mean."""
        return token_cost(self.speculation, load, self._step)

    def _step(self, load: Load) -> StepCost:
        model, device, count = self.model, self.device, self.tensor_parallel
        # A prefix lies where everything lies: its pairs are like those of the rest of the prompt.
        load = replace(load, prefill_pairs=load.prefill_pairs + load.prefix_pairs, prefix_pairs=0.0, prefix_tokens=0.0)
        dense = dense_time(model, device, count, load)
        dense += prefill_attention_time(model, device, count, load, self.kv_element)
        dense += prefill_state_time(model, device, count, load)
        attention = attention_time(
            model, device, load, self.policy, self.kv_element, busiest=busiest_share(model, count), queries=1 / count
        )
        attention += state_time(model, device, load, state_share(model, count))
        if self.speculation is not None:
            dense += self.speculation.draft_time(device, load)
        return StepCost(dense + attention, dense, attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disaggregated:
    """Prompts on one instance, decode on another; the KV of a prompt crosses `link` in between, over one card for each
    device that both sides have. The event loop runs the two after each other: `step` is the decode instance's."""

    prefill: Colocated
    decode: Colocated
    link: Link
    label: str = ""

    def __post_init__(self) -> None:
        if self.prefill.model != self.decode.model:
            raise InvalidRequest(
                f"prefill has model {self.prefill.model.name!r}, decode {self.decode.model.name!r}; allowed is one"
            )

    @property
    def name(self) -> str:
        a, b = self.prefill, self.decode
        return (
            self.label or f"{a.tensor_parallel}x {a.device.name} prefill + {b.tensor_parallel}x {b.device.name} decode"
        )

    @property
    def model(self) -> ModelShape:
        return self.decode.model

    @property
    def policy(self) -> KvPolicy:
        return self.decode.policy

    @property
    def speculation(self) -> Speculation | None:
        return self.decode.speculation

    @property
    def max_batch_tokens(self) -> int:
        return self.decode.max_batch_tokens

    @property
    def max_sequences(self) -> int:
        return self.decode.max_sequences

    @property
    def devices(self) -> tuple[tuple[Device, int], ...]:
        return self.prefill.devices + self.decode.devices

    @property
    def capacity(self) -> Capacity:
        return self.decode.capacity

    @property
    def kv_tokens(self) -> int:
        return self.decode.kv_tokens

    @property
    def prompt_tokens(self) -> int:
        return self.prefill.kv_tokens

    def step(self, load: Load) -> StepCost:
        return self.decode.step(load)

    def transfer_bytes(self, prompt: int) -> float:
        """Bytes that cross the link for a prompt's KV and states."""
        kept = self.policy.tokens_held(prompt) * self.model.kv_bytes_per_token(self.decode.kv_element)
        return kept + self.model.state_bytes

    @property
    def wire(self) -> float:
        """Bytes a second between the two instances."""
        cards = min(self.prefill.tensor_parallel, self.decode.tensor_parallel)
        return cards * _wire(self.link, self.prefill.device, self.decode.device)


@dataclass(frozen=True, slots=True)
class Lane:
    """One of several batches in rotation, by what each tier does for it, in seconds."""

    dense: float
    attention: float
    exchange: Exchange
    hidden: float
    """The seconds of attention that are hidden where q goes first: attention begins when q arrives. Those of states are
    not, which need k and v first of all."""

    @property
    def alone(self) -> float:
        return self.dense + self.exchange.seconds + self.attention - self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloaded:
    """Lamina: dense layers on `model_count` devices, KV and attention on `attention_count` others: DOP(a, b).

    `lanes` batches rotate: while one is attended, another is in the dense layers, of which there are `model_replicas`
    (the paper: lanes - 1 of them; each is `model_count` devices). `overlap`: q goes first where that makes a step
    shorter, as the engine finds out by trying, so that attention over the past begins when q arrives; else q, k and v
    go together. `workers`: attention worker processes, where one machine is shared by several;
    else there is one a device.
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
    sequence_tokens: int = SEQUENCE_TOKENS
    workers: int | None = None
    speculation: Speculation | None = None
    label: str = ""

    def __post_init__(self) -> None:
        _check_speculation(self.speculation, self.model)
        counts = (
            *("model_count", "attention_count", "model_replicas", "lanes", "batch_tokens", "max_sequences"),
            "sequence_tokens",
        )
        for name in counts if self.workers is None else (*counts, "workers"):
            whole(name, getattr(self, name), 1, MOST)
        number_within("kv_element", self.kv_element, 0.25, 8)
        number_within("memory_share", self.memory_share, 0.01, 1)
        if self.shard not in ("heads", "sequence"):
            raise InvalidRequest(f"shard is {self.shard!r}; allowed are heads, sequence")

    @property
    def name(self) -> str:
        dop = f"DOP({self.model_count}, {self.attention_count})"
        lanes = f", {self.lanes} lanes" if self.lanes > 1 else ""
        return self.label or f"{dop} {self.model_device.name} + {self.attention_device.name}{lanes}"

    @property
    def max_batch_tokens(self) -> int:
        return self.batch_tokens

    @property
    def devices(self) -> tuple[tuple[Device, int], ...]:
        model = (self.model_device, self.model_count * self.model_replicas)
        return model, (self.attention_device, self.attention_count)

    @property
    def capacity(self) -> Capacity:
        """What fits. Raises InvalidRequest where the weights do not."""
        room = self.attention_count * self.attention_device.memory * self.memory_share
        found = capacity_of(self.model, self.policy, self.kv_element, self.sequence_tokens, room)
        draft, beside = _draft(self.speculation), self._model_room
        if draft is None:
            return found
        return Capacity(min(found.tokens, int(beside / draft.kv_bytes_per_token())), found.sequences)

    @property
    def _model_room(self) -> float:
        """Bytes beside the weights."""
        draft = _draft(self.speculation)
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
        """Bytes a second between the tiers: over one network card for each device that both sides have."""
        cards = min(self.model_count, self.attention_count)
        return cards * _wire(self.link, self.model_device, self.attention_device)

    def lane(self, load: Load, query_first: bool = False) -> Lane:
        """One batch, with the tiers to itself; `query_first`: q is sent before k and v."""
        model, device, count = self.model, self.model_device, self.model_count
        dense = dense_time(model, device, count, load)
        dense += prefill_attention_time(model, device, count, load, self.kv_element)
        dense += prefill_state_time(model, device, count, load)
        if self.speculation is not None:
            dense += self.speculation.draft_time(device, load)
        by_heads = self.shard == "heads"
        cells = max(1, load.decode * (kv_heads(model) if by_heads else self.attention_count))
        busiest = -(-cells // self.attention_count) / cells  # whole heads, dealt out evenly over all sequences
        attention = attention_time(model, self.attention_device, load, self.policy, self.kv_element, busiest=busiest)
        share = state_share(model, self.attention_count, load.decode)
        mixing = attention + state_time(model, self.attention_device, load, share)
        exchange = self._exchange(load)
        if not query_first:
            return Lane(dense, mixing, exchange, 0.0)
        late = kv_projection_time(model, device, count, load) + exchange.keys
        return Lane(dense + model.attentions * self.link.query_first_time, mixing, exchange, min(attention, late))

    def query_first(self, load: Load) -> bool:
        """Whether the engine sends q before k and v, in decode of all these sequences."""
        return self.overlap and self._ordered(load, True).seconds < self._ordered(load).seconds

    def drafted(self, load: Load) -> Load:
        """A batch of decode alone, with the drafts that pay."""
        if self.speculation is None:
            return load
        return self.speculation.load(load, best_drafts(self.speculation, load, self._step)[0])

    def step(self, load: Load) -> StepCost:
        """All sequences go on by one token, by speculation in the mean: `lanes` batches with their shares of them."""
        return token_cost(self.speculation, load, self._step)

    def _step(self, load: Load) -> StepCost:
        """In the better order of messages."""
        together = self._ordered(load)
        if not self.overlap:
            return together
        return min(together, self._ordered(load, True), key=lambda cost: cost.seconds)

    def _ordered(self, load: Load, query_first: bool = False) -> StepCost:
        lanes = int(min(self.lanes, max(1, load.decode)))
        lane = self.lane(load.divided(lanes), query_first)
        # The largest lane sets the pace; all of them together have no more sequences than there are.
        whole = self._exchange(load)
        full = load.decode / -(-load.decode // lanes) if load.decode else lanes
        dense, attention = lanes * lane.dense, full * lane.attention
        seconds = max(lane.alone, dense / min(lanes, self.model_replicas), attention, whole.busy)
        return StepCost(seconds, dense / self.model_replicas, attention, whole.busy, whole.nbytes)

    def _exchange(self, load: Load) -> Exchange:
        ranges = min(self.attention_count, max(1, int(load.context) // PAGE_SIZE))
        copies = 1 if self.shard == "heads" else ranges
        return exchange_time(self.model, self.link, self.wire, load, copies=copies, workers=self.workers or 1)


System = Colocated | Disaggregated | Offloaded
"""A way to serve, as the event loop and the planner use it."""


def price(system: System) -> float:
    """Dollars an hour of all its devices."""
    return sum(device.price * count for device, count in system.devices)


def before_first_token(system: System, prompt: float) -> float:
    """Seconds that a request with so many tokens waits for its first one beside all steps; they are part of its TTFT,
    and no device is busy then."""
    return system.devices[0][0].efficiency.before_first_token(prompt)


def power(system: System, utilisation: tuple[float, ...]) -> float:
    """Mean watts of all its devices, given for each kind the share of time that it is busy. 0: one isn't published."""
    if any(device.power <= 0 for device, _ in system.devices):
        return 0.0
    return sum(
        device.power * count * (IDLE_POWER + (1 - IDLE_POWER) * min(1.0, busy))
        for (device, count), busy in zip(system.devices, utilisation, strict=True)
    )


def _draft(speculation: Speculation | None) -> ModelShape | None:
    """The model whose weights and KV the drafts need."""
    return None if speculation is None else speculation.draft


def _check_speculation(speculation: Speculation | None, model: ModelShape) -> None:
    if speculation is not None:
        speculation.check(model)


def _wire(link: Link, *ends: Device) -> float:
    """Bytes a second of one connection: no more than either end's network card has."""
    return min([link.bandwidth, *(device.network for device in ends if device.network)])
