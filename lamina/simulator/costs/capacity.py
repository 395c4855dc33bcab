"""How much KV and how many states have room beside the weights."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import KvPolicy
from lamina.simulator.costs.hardware import Device
from lamina.simulator.costs.shapes import ModelShape

MEMORY_SHARE = 0.9
"""The share of a device's memory for weights and KV; the rest is for activations. vLLM's default, too."""
SEQUENCE_TOKENS = 4096
"""Tokens of the sequences for which memory is divided between KV and states: the engine's default."""
UNBOUNDED = 1 << 40
"""Tokens, or sequences, of what takes no memory."""


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
        beside = "" if draft is None else f", its draft model {more / 1e9:.1f} GB"
        raise InvalidRequest(
            f"model {model.name!r} has {model.weight_bytes / 1e9:.1f} GB of weights{beside}; {count}x {device.name} "
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
    copies: tuple[float, float] = (1.0, 1.0),
    beside: float = 0.0,
) -> Capacity:
    """What so many bytes hold, divided as the engine does it: in proportion to what sequences of `sequence_tokens`
    tokens take. `copies`: how often KV and states are kept; `beside`: bytes a token that something else takes."""
    a_token = model.kv_bytes_per_token(kv_element) * copies[0]
    a_sequence = model.state_bytes_held * copies[1]
    if not a_sequence:
        taken = a_token * policy.held + beside
        return Capacity(int(room / taken) if taken else UNBOUNDED, UNBOUNDED)
    sequences = room / (a_token * sequence_tokens + a_sequence)
    tokens = int(sequences * sequence_tokens / policy.held) if a_token else UNBOUNDED
    return Capacity(tokens, int(sequences))
