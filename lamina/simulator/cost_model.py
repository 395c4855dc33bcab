"""Bytes, FLOPs and seconds of one batch, from a model's shape and a device's rates. Pure arithmetic, nothing hidden:
each time is max(bytes / bandwidth, FLOPs / rate) / efficiency, and what `Efficiency` adds.

The operators are those of Lamina's section 3 (arXiv 2405.01814): dense layers want 2 N B FLOPs for e N + 2 e B d bytes,
attention reads every sequence's own KV, and (2 + 2/G) e d bytes a token and layer cross between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from lamina.errors import InvalidRequest
from lamina.simulator.hardware import Device, Link, at
from lamina.simulator.models import ModelShape

ALPHA = 0.2
"""The slowdown by the network that Lamina's minimum bandwidth allows (section 4.1)."""


@dataclass(frozen=True, slots=True)
class KvPolicy:
    """What a KV policy spares, as shares of everything: of the bytes that decode reads, and of those that are held.
    With a `window`, no more than so many tokens are read and held of a sequence."""

    name: str = "full"
    read: float = 1.0
    held: float = 1.0
    window: int | None = None

    def __post_init__(self) -> None:
        for name, share in (("read", self.read), ("held", self.held)):
            if not 0 < share <= 1:
                raise InvalidRequest(f"{name} of policy {self.name!r} is {share}; allowed is above 0 to 1")
        if self.window is not None and self.window < 1:
            raise InvalidRequest(f"window of policy {self.name!r} is {self.window}; allowed is 1 or more tokens")

    def tokens_read(self, context: float) -> float:
        """Of so many, in decode."""
        return self.read * self._seen(context)

    def tokens_held(self, context: float) -> float:
        return self.held * self._seen(context)

    def _seen(self, context: float) -> float:
        return context if self.window is None else min(context, self.window)


FULL = KvPolicy()


@dataclass(frozen=True, slots=True)
class Load:
    """One batch: `decode` sequences of which each reads `context` tokens of KV in the mean, and `prefill_tokens` whose
    queries meet `prefill_pairs` keys in all."""

    decode: int
    context: float
    prefill_tokens: int = 0
    prefill_pairs: float = 0.0

    @property
    def tokens(self) -> int:
        return self.decode + self.prefill_tokens


@dataclass(frozen=True, slots=True)
class Share:
    """One batch's part on equal devices: seconds, and what of it the overheads and collectives are."""

    seconds: float
    overhead: float = 0.0


def dense_time(model: ModelShape, device: Device, count: int, load: Load) -> Share:
    """The dense layers of one batch on `count` devices by tensor parallelism."""
    tokens, efficiency, element = load.tokens, device.efficiency, model.element
    if not tokens:
        return Share(0.0)
    moved = model.weights_read(tokens) + 2 * element * tokens * model.hidden
    best = max(moved / device.bandwidth, model.dense_flops(tokens, max(1, load.decode)) / rate(device, element)) / count
    overhead = efficiency.step_overhead + model.layers * efficiency.layer_overhead + tokens * efficiency.row_overhead
    if count > 1:
        overhead += 2 * model.layers * all_reduce_time(device, count, tokens * model.hidden * element)
    return Share(best / at(efficiency.dense, tokens) + overhead, overhead)


def all_reduce_time(device: Device, count: int, nbytes: float) -> float:
    """Of a ring over `count` devices: 2 (n - 1) / n of the bytes pass each link."""
    if device.interconnect <= 0:
        raise InvalidRequest(
            f"device {device.name!r} has no interconnect; allowed is tensor_parallel 1, or a device that has one"
        )
    wire = device.interconnect * device.efficiency.collective
    return device.efficiency.collective_latency + 2 * (count - 1) / count * nbytes / wire


def attention_time(
    model: ModelShape, device: Device, busiest: float, load: Load, policy: KvPolicy = FULL, kv_element: float = 2.0
) -> Share:
    """The attention of one batch's decode rows over their past, on the device that has the share `busiest` of it."""
    if not load.decode:
        return Share(0.0)
    efficiency, read = device.efficiency, policy.tokens_read(load.context)
    moved = load.decode * model.kv_bytes_read(read, kv_element) * busiest
    flops = load.decode * model.attention_flops(read) * busiest
    best = max(moved / device.bandwidth, flops / rate(device, kv_element))
    rows = load.decode * model.layers * efficiency.attention_row_overhead * busiest
    return Share(best / at(efficiency.attention, max(1.0, moved / model.layers)) + rows, rows)


def busiest_share(model: ModelShape, count: int) -> float:
    """The share of all KV that one of `count` tensor-parallel devices has at most: whole heads, so that more devices
    than heads spare nothing."""
    heads = kv_heads(model)
    return -(-heads // count) / heads


def kv_heads(model: ModelShape) -> int:
    """Into how many parts its KV can be cut by heads."""
    return min(group.kv_heads for group in model.groups)


def prefill_attention_time(model: ModelShape, device: Device, count: int, load: Load) -> float:
    """Attention of prefill rows, which computes rather than reads."""
    if not load.prefill_pairs:
        return 0.0
    flops = load.prefill_pairs * model.attention_flops(1.0)
    return flops / rate(device, model.element) / count / at(device.efficiency.dense, max(1, load.prefill_tokens))


def rate(device: Device, element: float) -> float:
    """FLOP/s for elements of so many bytes."""
    return device.flops_8bit if element <= 1 and device.flops_8bit else device.flops


def minimum_bandwidth(model: ModelShape, batch: int, model_seconds: float, attention_seconds: float) -> float:
    """Bytes a second between model and attention workers below which the network slows decode by more than ALPHA:
    (2 + 2/G) e d B L / (alpha (MTIME(B) + ATIME(B, l))), Lamina's equation in section 4.1."""
    return model.exchange_bytes(model.element) * batch / (ALPHA * (model_seconds + attention_seconds))


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one batch sends to the attention workers and gets back, over all layers: seconds, and those in which the
    link is busy in its busier direction."""

    seconds: float
    hidden: float
    """Seconds of k and v's sending and of their projection, during which attention can already run."""
    busy: float
    nbytes: float


def exchange_time(model: ModelShape, link: Link, links: int, load: Load, dense_seconds: float) -> Exchange:
    """Queries, keys and values out, partial outputs back, layer by layer, over `links` links at a time.
    `dense_seconds`: of the dense layers of the same batch, which have the projections of k and v in them."""
    element, wire = model.element, link.bandwidth * links
    total = model.exchange_bytes(element) * load.decode
    late = model.kv_exchange_bytes(element) * load.decode
    back = sum(group.layers * group.output_elements for group in model.groups) * element * load.decode
    stored = model.kv_exchange_bytes(element) * load.prefill_tokens
    return Exchange(
        seconds=(model.layers * link.round_trip if load.decode else 0.0) + total / wire,
        hidden=dense_seconds * model.kv_projection_share + late / wire,
        busy=max(total - back + stored, back) / wire,
        nbytes=total + stored,
    )
