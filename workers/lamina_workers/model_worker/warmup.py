"""Loads the kernels that a model worker needs before its first batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lamina_kernels.compile.launch import load_each
from lamina_kernels.dense import dense
from lamina_kernels.exchange.exchange_loop import exchange_kernel
from lamina_kernels.sketches import sketches
from lamina_kernels.states import advance
from lamina_protocols.messages.layers import STATES, HolderConfig
from lamina_protocols.messages.pools import pools
from lamina_workers.attention_worker.page_layout import attention_kernels, page_layout
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.ports.direct import enabled


def prepare_kernels(
    holder: HolderConfig,
    dtype: torch.dtype,
    places: tuple[torch.device, torch.device],
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Load the kernels. The first time on a machine they are compiled, which takes some seconds.

    `places`: where the model is, and where KV is kept; the present is attended where the model is.
    """
    stages: list[tuple[str, Iterable[tuple[int, int]]]] = []
    for pool in pools(holder):
        if pool.config.layers[0].kind in STATES:
            stages.append(("state kernels", advance.prepare()))
            continue
        for where in dict.fromkeys(places):
            layout = page_layout(pool.config, where)
            stages.append(("attention kernels", attention_kernels(where).prepare(layout)))
        if HeadPolicies.of(pool.config).sketched:
            stages.append(("sketch kernels", sketches.prepare(page_layout(pool.config, places[1]))))
    stages.append(("dense kernels", dense.prepare(dtype, places[0])))
    if enabled():
        stages.append(("exchange kernels", load_each((exchange_kernel,))))
    for what, steps in stages:
        for done, total in steps:
            if progress is not None:
                progress(f"preparing {what}", done, total)
