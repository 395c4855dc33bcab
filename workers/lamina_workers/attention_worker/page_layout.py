"""The shape, cost and number of a pool's pages of KV, or of its records of states.

All are functions of the pool's `HolderConfig`, and pages of the kernels of its device too. So model workers and
attention workers come to the same layout.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch

from lamina_kernels.paged.pages import DTYPES, Order, PageLayout
from lamina_kernels.select import Kernels, kernels
from lamina_kernels.sketches.layout import SketchLayout
from lamina_kernels.states.layout import StateLayout
from lamina_protocols.messages.layers import ATTENTION, LATENT, STATES, BlockConfig, HolderConfig
from lamina_protocols.messages.pools import pool_shape, pools
from lamina_workers.errors import KernelsUnavailable, KVError, PolicyError, UnsupportedModelError
from lamina_workers.kv_pages.head_policies import HeadPolicies


def state_layout(config: HolderConfig) -> StateLayout:
    """The one record shape of a pool of states. Raises UnsupportedModelError for one that the kernels cannot keep."""
    spec = config.layers[0]
    if not 0 < spec.key_heads <= spec.kv_heads or spec.kv_heads % spec.key_heads or spec.heads != spec.kv_heads:
        raise UnsupportedModelError(
            f"a {spec.kind} layer of {spec.kv_heads} states, {spec.heads} heads and {spec.key_heads} of keys; allowed: "
            "a head each, and a number of key heads that divides it"
        )
    decays = spec.kv_heads if spec.kind == "lightning" else 0
    for layer in config.layers:
        if len(layer.decays) != decays:
            raise UnsupportedModelError(f"{len(layer.decays)} decays of a {spec.kind} layer, {decays} are due")
        if layer.window or layer.soft_cap or layer.policies:
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


CPU = torch.device("cpu")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def attention_kernels(device: torch.device = CPU) -> Kernels:
    """The kernels that attend on a device. Raises KernelsUnavailable where the chosen ones cannot run here."""
    try:
        return kernels(torch.device(device.type))  # GPUs share theirs
    except (ValueError, ImportError) as error:
        raise KernelsUnavailable(str(error)) from error


def page_layout(config: HolderConfig, device: torch.device = CPU) -> PageLayout:
    """The page shape of one pool, as the kernels of the device lay it out.

    Raises UnsupportedModelError where the layers are none of attention, differ in what a page needs, or no page has
    their shape, KVError for a dtype that KV is not kept in.
    """
    shapes = {(spec.kind, spec.kv_heads, spec.group, spec.d_k, spec.d_v, spec.index) for spec in config.layers}
    if len(shapes) != 1:
        raise UnsupportedModelError(f"layers of unlike KV shapes in one pool: {sorted(shapes, key=str)}")
    spec = config.layers[0]
    if spec.kind not in (ATTENTION, LATENT):
        raise UnsupportedModelError(
            f"layers of kind {spec.kind!r:.80} keep no pages of KV, those of {ATTENTION} and {LATENT} do"
        )
    if config.dtype not in _DTYPES:
        raise KVError(f"KV dtype {config.dtype!r}, allowed: {', '.join(_DTYPES)}")
    chosen = attention_kernels(device)
    try:
        layout = chosen.layout(config.page_size, spec.d_k, spec.d_v, _DTYPES[config.dtype], spec.kind == LATENT)
        return replace(layout, d_index=spec.index.width) if spec.index else layout
    except ValueError as error:
        raise UnsupportedModelError(f"the kernels of this process cannot keep such KV: {error}") from error


def layout_name(layout: PageLayout) -> str:
    """Equal for holders whose pages mean the same byte by byte, and for no others."""
    dtype = str(layout.dtype).removeprefix("torch.")
    numbers = (
        layout.page_size,
        layout.d_k,
        layout.d_index,
        layout.own_v,
        layout.k_pack,
        layout.v_pack,
        layout.page_bytes,
    )
    return f"{dtype} {layout.order.value} {' '.join(map(str, numbers))}"


def page_bytes(config: HolderConfig) -> int:
    """Bytes of a page of one pool, on any device; of states, a record."""
    spec = config.layers[0]
    if spec.kind in STATES:
        return state_layout(config).page_bytes
    dtype = _DTYPES[config.dtype]
    kind = dtype, Order.TOKENS, spec.kind == LATENT, spec.key_width - spec.d_k
    return PageLayout(config.page_size, spec.d_k, spec.d_v, *kind).page_bytes


def page_cost(config: HolderConfig, device: torch.device = CPU) -> int:
    """Bytes of a page of one pool, and of its sketch where policies read one; of states, a record. Raises PolicyError
    where the device has no sketches."""
    if config.layers[0].kind in STATES:
        return page_bytes(config)
    policies = HeadPolicies.of(config)
    policies.check(device)
    layout = page_layout(config, device)
    if not policies.sketched:
        return layout.page_bytes
    try:
        return layout.page_bytes + SketchLayout(layout).sketch_bytes
    except ValueError as error:
        why = f"a policy chooses by sketches of pages, which the kernels of this process cannot make ({error})"
        raise PolicyError(f"{why}; allowed here are static policies") from error


def page_count(config: HolderConfig, device: torch.device = CPU) -> int:
    """How many pages of one pool its `kv_memory` holds. Raises KVError where there is not even one for each layer that
    keeps KV."""
    cost = page_cost(config, device)
    least = (1 + max(spec.kv_layer for spec in config.layers)) * cost
    if config.kv_memory < least:
        raise KVError(f"kv_memory is {config.kv_memory} bytes; the least is {least}, one page for each layer with KV")
    return config.kv_memory // cost


def block_bytes(config: BlockConfig, device: torch.device = CPU) -> int:
    """Bytes of memory that one block of an engine which owns its blocks takes: a page for each KV head of the layers of
    a block table, of which layers of other tables share the pages. Raises as `page_cost`."""
    costs = {pool_shape(pool.config.layers[0]): page_cost(pool.config, device) for pool in pools(config)}
    return sum(costs[shape] * page_count for shape, page_count in pages_of_block(config).items())


def pages_of_block(config: BlockConfig) -> dict[Hashable, int]:
    """How many pages a block has of each shape of layers."""
    counts: dict[Hashable, int] = {}
    for pool in pools(config):
        spec, layers = pool.config.layers[0], 1 + max(layer.kv_layer for layer in pool.config.layers)
        shape = pool_shape(spec)
        counts[shape] = max(counts.get(shape, 0), layers * spec.kv_heads)
    return counts


def page_counts(config: HolderConfig, device: torch.device = CPU) -> tuple[int, ...]:
    """How many pages each pool of a holder has. Raises as `page_count`, and as `state_pages`."""
    of_pools = [pool.config for pool in pools(config)]
    return tuple(
        state_pages(pool_config) if pool_config.layers[0].kind in STATES else page_count(pool_config, device)
        for pool_config in of_pools
    )
