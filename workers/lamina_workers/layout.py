"""How a holder's pages look, and how many it has: read off a `HolderConfig`, for both sides of the cut.

Knows nothing of what is kept in a page, or of who owns it.
"""

from __future__ import annotations

import torch

from lamina_kernels.pages import DTYPES, PageLayout
from lamina_kernels.select import kernels
from lamina_protocols.messages import HolderConfig
from lamina_workers.errors import KVError, UnsupportedModelError

KV_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def page_layout(config: HolderConfig) -> PageLayout:
    """The one page shape of a holder.

    Raises UnsupportedModelError where layers differ in what a page needs or no page has their shape, KVError for a
    dtype that KV is not kept in.
    """
    shapes = {(spec.kind, spec.kv_heads, spec.group, spec.d_k, spec.d_v) for spec in config.layers}
    if len(shapes) != 1 or config.layers[0].kind != "attention":
        raise UnsupportedModelError(f"layers of unlike KV shapes in one pool: {sorted(shapes)}")
    if config.dtype not in KV_DTYPES:
        raise KVError(f"KV dtype {config.dtype!r}, allowed: {', '.join(KV_DTYPES)}")
    spec = config.layers[0]
    try:
        chosen = kernels(torch.device("cpu"))
        return chosen.layout(config.page_size, spec.d_k, spec.d_v, KV_DTYPES[config.dtype])
    except ValueError as error:
        raise UnsupportedModelError(f"no page of KV can have this shape: {error}") from error


def page_count(config: HolderConfig) -> int:
    """How many pages `kv_memory` holds. Raises KVError where there is not even one for each layer that keeps KV."""
    page_bytes = page_layout(config).page_bytes
    least = (1 + max(spec.kv_layer for spec in config.layers)) * page_bytes
    if config.kv_memory < least:
        raise KVError(f"kv_memory is {config.kv_memory} bytes; the least is {least}, one page for each layer with KV")
    return config.kv_memory // page_bytes
