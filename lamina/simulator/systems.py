"""The ways to serve a model that are compared: what machines each has, what of the KV fits, and what a batch takes.

Every one of them is a frozen description; `step` is pure. A system is one instance: several of them behind a load
balancer are `replicas` of `simulate`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from lamina.errors import InvalidRequest
from lamina.simulator.cost_model import (
    FULL,
    KvPolicy,
    Load,
    attention_time,
    busiest_share,
    dense_time,
    exchange_time,
    kv_heads,
    prefill_attention_time,
)
from lamina.simulator.hardware import Device, Link
from lamina.simulator.models import ModelShape

MEMORY_SHARE = 0.9
"""Of a device's memory that weights and KV may take; the rest is for activations. vLLM's default, too."""
IDLE_POWER = 0.3
"""Of a device's power, what it draws while it waits. Assumed: no vendor publishes it."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """One batch: its seconds, those in which each tier was busy, and the bytes that crossed the link."""

    seconds: float
    model: float = 0.0
    attention: float = 0.0
    network: float = 0.0
    link_bytes: float = 0.0


class System(Protocol):
    """What the event loop and the planner ask of a way to serve."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> ModelShape: ...
    @property
    def policy(self) -> KvPolicy: ...
    @property
    def max_batch_tokens(self) -> int:
        """Tokens of one batch, prefill chunks and decode rows together."""

    @property
    def max_sequences(self) -> int: ...
    @property
    def devices(self) -> tuple[tuple[Device, int], ...]:
        """Each kind and how many of it; the first is the model tier, the last the attention tier."""

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV fits. Raises InvalidRequest where not even the weights do."""

    @property
    def holders(self) -> int:
        """How many holders of KV the event loop must tell apart: 1 where all of them have the same of each sequence."""

    def step(self, load: Load) -> StepCost: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Colocated:
    """Weights, KV and attention on the same devices, by tensor parallelism, as vLLM does."""

    model: ModelShape
    device: Device
    tensor_parallel: int = 1
    chunked_prefill: bool = True
    batch_tokens: int = 2048
    max_sequences: int = 4096
    policy: KvPolicy = FULL
    kv_element: float = 2.0
    memory_share: float = MEMORY_SHARE
    label: str = ""

    def __post_init__(self) -> None:
        _positive(self, "tensor_parallel", "batch_tokens", "max_sequences", "kv_element")
        _share("memory_share", self.memory_share)

    @property
    def name(self) -> str:
        prefill = "" if self.chunked_prefill else ", whole prompts"
        return self.label or f"{self.tensor_parallel}x {self.device.name} co-located{prefill}"

    @property
    def max_batch_tokens(self) -> int:
        whole = max(self.batch_tokens, self.model.max_context)  # as vLLM asks where it doesn't cut prompts up
        return self.batch_tokens if self.chunked_prefill else whole

    @property
    def devices(self) -> tuple[tuple[Device, int], ...]:
        return ((self.device, self.tensor_parallel),)

    @property
    def kv_tokens(self) -> int:
        copies = busiest_share(self.model, self.tensor_parallel) * self.tensor_parallel  # more devices than KV heads
        room = self.tensor_parallel * self.device.memory * self.memory_share - self.model.weight_bytes
        _fits(self.model, self.device, self.tensor_parallel, room)
        return int(room / copies / self.model.kv_bytes_per_token(self.kv_element) / self.policy.held)

    @property
    def holders(self) -> int:
        return 1

    def step(self, load: Load) -> StepCost:
        dense = dense_time(self.model, self.device, self.tensor_parallel, load).seconds
        dense += prefill_attention_time(self.model, self.device, self.tensor_parallel, load)
        busiest = busiest_share(self.model, self.tensor_parallel)
        attention = attention_time(self.model, self.device, busiest, load, self.policy, self.kv_element).seconds
        return StepCost(dense + attention, dense, attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disaggregated:
    """Prompts on one instance, decode on another; the KV of a prompt crosses `link` in between. The event loop runs
    the two after each other: `step` is the decode instance's."""

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
    def max_batch_tokens(self) -> int:
        return self.decode.max_batch_tokens

    @property
    def max_sequences(self) -> int:
        return self.decode.max_sequences

    @property
    def devices(self) -> tuple[tuple[Device, int], ...]:
        return self.prefill.devices + self.decode.devices

    @property
    def kv_tokens(self) -> int:
        return self.decode.kv_tokens

    @property
    def holders(self) -> int:
        return self.decode.holders

    def step(self, load: Load) -> StepCost:
        return self.decode.step(load)

    def transfer_bytes(self, prompt: int) -> float:
        """That cross the link for a prompt's KV."""
        return self.policy.tokens_held(prompt) * self.model.kv_bytes_per_token(self.decode.kv_element)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloaded:
    """Lamina: dense layers on `model_count` devices, KV and attention on `attention_count` others: DOP(a, b).

    `lanes` batches rotate: while one is attended, another is in the dense layers, of which there are `model_replicas`
    (the paper: lanes - 1 of them; each is `model_count` devices). `overlap`: attention over the past begins when q
    arrives. `workers`: attention worker processes, where they aren't one a device; they share the devices.
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
    workers: int | None = None
    label: str = ""

    def __post_init__(self) -> None:
        _positive(self, "model_count", "attention_count", "model_replicas", "lanes", "batch_tokens", "max_sequences")
        _share("memory_share", self.memory_share)
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
    def kv_tokens(self) -> int:
        weights = self.model_count * self.model_device.memory * self.memory_share - self.model.weight_bytes
        _fits(self.model, self.model_device, self.model_count, weights)
        room = self.attention_count * self.attention_device.memory * self.memory_share
        return int(room / self.model.kv_bytes_per_token(self.kv_element) / self.policy.held)

    @property
    def holders(self) -> int:
        """Whole heads go to each worker, and who gets one more changes from sequence to sequence."""
        uneven = self.shard == "heads" and kv_heads(self.model) % self.attention_count
        return self.attention_count if uneven else 1

    @property
    def links(self) -> int:
        """Network cards that a batch crosses at a time, one a device."""
        return min(self.model_count, self.attention_count)

    def step(self, load: Load) -> StepCost:
        """All sequences go on by one token: `lanes` batches, each with its share of them."""
        lanes = min(self.lanes, max(1, load.decode))
        lane = replace(load, decode=-(-load.decode // lanes), prefill_tokens=-(-load.prefill_tokens // lanes))
        lane = replace(lane, prefill_pairs=load.prefill_pairs / lanes)
        dense = dense_time(self.model, self.model_device, self.model_count, lane).seconds
        exchange = exchange_time(self.model, self.link, self.links, lane, dense)
        dense += prefill_attention_time(self.model, self.model_device, self.model_count, lane)
        cells = max(1, lane.decode * (kv_heads(self.model) if self.shard == "heads" else self.attention_count))
        busiest = -(-cells // self.attention_count) / cells  # whole heads, dealt out evenly over all sequences
        attention = attention_time(
            self.model, self.attention_device, busiest, lane, self.policy, self.kv_element
        ).seconds
        hidden = min(attention, exchange.hidden) if self.overlap else 0.0
        alone = dense + exchange.seconds + attention - hidden
        busy = lanes * dense / min(lanes, self.model_replicas), lanes * attention, lanes * exchange.busy
        return StepCost(max(alone, *busy), *busy, link_bytes=lanes * exchange.nbytes)


def price(system: System) -> float:
    """Dollars an hour of all its devices."""
    return sum(device.price * count for device, count in system.devices)


def power(system: System, utilisation: tuple[float, ...]) -> float:
    """Mean watts of all its devices, given for each kind the share of time that it is busy. 0: one isn't published."""
    if any(device.power <= 0 for device, _ in system.devices):
        return 0.0
    return sum(
        device.power * count * (IDLE_POWER + (1 - IDLE_POWER) * min(1.0, busy))
        for (device, count), busy in zip(system.devices, utilisation, strict=True)
    )


def _fits(model: ModelShape, device: Device, count: int, room: float) -> None:
    if room <= 0:
        raise InvalidRequest(
            f"model {model.name!r} has {model.weight_bytes / 1e9:.1f} GB of weights, {count}x {device.name} have "
            f"{count * device.memory / 1e9:.1f} GB; allowed is a model that leaves room for KV"
        )


def _positive(system: object, *names: str) -> None:
    for name in names:
        if not getattr(system, name) > 0:
            raise InvalidRequest(f"{name} is {getattr(system, name)}; allowed is above 0")


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InvalidRequest(f"{name} is {value}; allowed is above 0 to 1")
