"""The shape, cost and number of a holder's pages: read off a `HolderConfig` and the kernels of its device.

Promises both sides of the cut the same layout."""

from __future__ import annotations

import torch

from lamina_kernels.paged.pages import DTYPES, Order, PageLayout
from lamina_kernels.select import Kernels, kernels
from lamina_kernels.sketches.sketches import SketchLayout
from lamina_protocols.messages import HolderConfig
from lamina_workers.attention_worker.head_policies import HeadPolicies
from lamina_workers.errors import KernelsUnavailable, KVError, PolicyError, UnsupportedModelError

CPU = torch.device("cpu")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def attention_kernels(device: torch.device = CPU) -> Kernels:
    """The kernels that attend on a device. Raises KernelsUnavailable where the chosen ones cannot run here."""
    try:
        return kernels(torch.device(device.type))  # GPUs share theirs
    except (ValueError, ImportError) as error:
        raise KernelsUnavailable(str(error)) from error


def page_layout(config: HolderConfig, device: torch.device = CPU) -> PageLayout:
    """The one page shape of a holder, as the kernels of its device lay it out.

    Raises UnsupportedModelError where layers differ in what a page needs or no page has their shape, KVError for a
    dtype that KV is not kept in.
    """
    shapes = {(spec.kind, spec.kv_heads, spec.group, spec.d_k, spec.d_v) for spec in config.layers}
    if len(shapes) != 1 or config.layers[0].kind != "attention":
        raise UnsupportedModelError(f"layers of unlike KV shapes in one pool: {sorted(shapes)}")
    if config.dtype not in _DTYPES:
        raise KVError(f"KV dtype {config.dtype!r}, allowed: {', '.join(_DTYPES)}")
    spec = config.layers[0]
    chosen = attention_kernels(device)
    try:
        return chosen.layout(config.page_size, spec.d_k, spec.d_v, _DTYPES[config.dtype])
    except ValueError as error:
        raise UnsupportedModelError(f"the kernels of this process cannot keep such KV: {error}") from error


def layout_name(layout: PageLayout) -> str:
    """Equal for holders whose pages mean the same byte by byte, and for no others."""
    dtype = str(layout.dtype).removeprefix("torch.")
    numbers = (layout.page_size, layout.d_k, layout.d_v, layout.k_pack, layout.v_pack, layout.page_bytes)
    return f"{dtype} {layout.order.value} {' '.join(map(str, numbers))}"


def page_bytes(config: HolderConfig) -> int:
    """Bytes of a page of such holders, on any device."""
    spec = config.layers[0]
    return PageLayout(config.page_size, spec.d_k, spec.d_v, _DTYPES[config.dtype], Order.TOKENS).page_bytes


def page_cost(config: HolderConfig, device: torch.device = CPU) -> int:
    """Bytes of a page, and of its sketch where policies read one. Raises PolicyError where the device has none."""
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
    """How many pages `kv_memory` holds. Raises KVError where there is not even one for each layer that keeps KV."""
    page_bytes = page_cost(config, device)
    least = (1 + max(spec.kv_layer for spec in config.layers)) * page_bytes
    if config.kv_memory < least:
        raise KVError(f"kv_memory is {config.kv_memory} bytes; the least is {least}, one page for each layer with KV")
    return config.kv_memory // page_bytes
