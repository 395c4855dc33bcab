"""Ways to serve a model: the machines of each, the KV that fits, and the seconds of a batch.

Every one of them is a frozen description; `step` is pure. A system is one instance: several of them behind a load
balancer are `replicas` of `simulate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

from lamina.errors import InvalidRequest
from lamina.simulator.costs.bounds import Text, number_within, whole
from lamina.simulator.costs.cost_model import (
    FULL,
    KvPolicy,
    Load,
    Speculation,
    StepCost,
    check_drafts,
    draft_model,
    mixing_time,
    model_time,
    token_cost,
)
from lamina.simulator.costs.hardware import Device, Link, connection
from lamina.simulator.costs.offloaded import (
    MEMORY_SHARE,
    MOST,
    PAGE_SIZE,
    SEQUENCE_TOKENS,
    Capacity,
    Lane,
    Offloaded,
    capacity_of,
    room_beside,
)
from lamina.simulator.costs.shapes import ModelShape

__all__ = ["PAGE_SIZE", "Colocated", "Disaggregated", "Lane", "Offloaded", "System", "power", "price"]

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
    label: Text = ""

    def __post_init__(self) -> None:
        check_drafts(self.speculation, self.model)
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
        limit = max(self.batch_tokens, self.model.max_context)  # as vLLM asks where it doesn't cut prompts up
        return self.batch_tokens if self.chunked_prefill else limit

    @property
    def devices(self) -> tuple[tuple[Device, int], ...]:
        """Each kind and how many of it; the first is the model tier, the last the attention tier."""
        return ((self.device, self.tensor_parallel),)

    @property
    def capacity(self) -> Capacity:
        """What fits beside the weights. Raises InvalidRequest where not even they do."""
        count, draft = self.tensor_parallel, draft_model(self.speculation)
        room = room_beside(self.model, self.device, count, self.memory_share, draft)
        draft_bytes = 0.0 if draft is None else draft.kv_bytes_per_token()
        return capacity_of(self.model, self.policy, self.kv_element, self.sequence_tokens, room, count, draft_bytes)

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
        if load.prefix_tokens or load.prefix_pairs:
            pairs = load.prefill_pairs + load.prefix_pairs
            load = replace(load, prefill_pairs=pairs, prefix_pairs=0.0, prefix_tokens=0.0)
        dense = model_time(model, device, count, load, self.kv_element)
        if self.speculation is not None:
            dense += self.speculation.draft_time(device, load)
        attention = mixing_time(model, device, count, load, self.policy, self.kv_element)
        return StepCost(dense + attention, dense, attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disaggregated:
    """Prompts on one instance, decode on another, which may have its attention elsewhere again; the KV of a prompt
    crosses `link` in between, over one card for each device that both sides have. The event loop runs the two after
    each other: `step` is the decode instance's."""

    prefill: Colocated
    decode: Colocated | Offloaded
    link: Link
    label: Text = ""

    def __post_init__(self) -> None:
        if self.prefill.model != self.decode.model:
            raise InvalidRequest(
                f"prefill has model {self.prefill.model.name!r}, decode {self.decode.model.name!r}; allowed is one"
            )

    @property
    def name(self) -> str:
        a, b = self.prefill, self.decode
        after = b.name if isinstance(b, Offloaded) else f"{b.tensor_parallel}x {b.device.name}"
        return self.label or f"{a.tensor_parallel}x {a.device.name} prefill + {after} decode"

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
        kv_bytes = self.policy.tokens_held(prompt) * self.model.kv_bytes_per_token(self.decode.kv_element)
        return kv_bytes + self.model.state_bytes

    @property
    def wire(self) -> float:
        """Bytes a second between the devices that compute prompts and those that keep KV."""
        keeps, count = self.decode.devices[-1]
        return min(self.prefill.tensor_parallel, count) * connection(self.link, self.prefill.device, keeps)


System = Colocated | Disaggregated | Offloaded
"""A way to serve, as the event loop and the planner use it."""


def instances(system: System) -> tuple[Colocated | Offloaded, ...]:
    """The instances of a system: where prompts are elsewhere, both, and what decodes is the last."""
    return (system.prefill, system.decode) if isinstance(system, Disaggregated) else (system,)


def kept_window(system: System, window: int | None) -> int | None:
    """How many tokens a layer with that window keeps of a sequence at most; None: all."""
    if isinstance(system, Offloaded) and system.behind:
        return None
    windows = [tokens for tokens in (window, system.policy.window) if tokens is not None]
    return min(windows, default=None)


def with_decode(system: System, **changes: Any) -> System:
    """The system with these fields of what decodes."""
    if isinstance(system, Disaggregated):
        return replace(system, decode=replace(system.decode, **changes))
    return replace(system, **changes)


def changed(part: Any, change: Callable[[Any], Any], only: str | None = None) -> Any:
    """A system with its devices and links changed, all or those of one name."""
    new: dict[str, Any] = {}
    for item in fields(part):
        value = getattr(part, item.name)
        if isinstance(value, (Device, Link)):
            new[item.name] = change(value) if only in (None, value.name) else value
        elif is_dataclass(value) and hasattr(value, "step"):
            new[item.name] = changed(value, change, only)
    return replace(part, **new)


def without_prices(system: System) -> System:
    """The system as it would be if all devices were free: equal for all prices."""
    return changed(system, _free)  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def _free(part: Device | Link) -> Device | Link:
    return replace(part, price=0.0) if isinstance(part, Device) else part


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
