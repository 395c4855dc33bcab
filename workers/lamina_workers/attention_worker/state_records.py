"""The shape, cost and number of the records of a pool of states: read off its `HolderConfig`.

Promises both sides of the cut the same layout."""

from __future__ import annotations

from lamina_kernels.states.layout import StateLayout
from lamina_protocols.messages.layers import HolderConfig
from lamina_workers.errors import KVError, UnsupportedModelError


def state_layout(config: HolderConfig) -> StateLayout:
    """The one record shape of a pool of states. Raises UnsupportedModelError for one that the kernels cannot keep."""
    spec = config.layers[0]
    if not 0 < spec.key_heads <= spec.kv_heads or spec.kv_heads % spec.key_heads or spec.heads != spec.kv_heads:
        raise UnsupportedModelError(
            f"a {spec.kind} layer of {spec.kv_heads} states, {spec.heads} heads and {spec.key_heads} of keys; allowed: "
            "a head each, and a number of key heads that divides it"
        )
    decays = spec.kv_heads if spec.kind == "lightning" else 0
    for each in config.layers:
        if len(each.decays) != decays:
            raise UnsupportedModelError(f"{len(each.decays)} decays of a {spec.kind} layer, {decays} are due")
        if each.window or each.soft_cap or each.policies:
            raise UnsupportedModelError(f"a {spec.kind} layer with a window, a soft cap or policies, which states lack")
    try:
        return StateLayout(spec.kind, spec.d_k, spec.d_v, spec.conv)
    except ValueError as error:
        raise UnsupportedModelError(f"the kernels of this process cannot keep such states: {error}") from error


def state_pages(config: HolderConfig) -> int:
    """How many records the pool's memory holds. Raises KVError where there are not two for each layer."""
    size = state_layout(config).page_bytes
    least = 2 * len(config.layers) * size
    if config.kv_memory < least:
        raise KVError(f"kv_memory is {config.kv_memory} bytes; the least is {least}, two states for each layer")
    return config.kv_memory // size
