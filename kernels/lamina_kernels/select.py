"""Which implementation of the kernels this process uses: chosen once per device, and said in the log."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any, Protocol

import torch

from lamina_kernels.pages import Pages, Rows
from lamina_kernels.partial import Partial

logger = logging.getLogger("lamina")


class Kernels(Protocol):
    """What a module of kernels offers. A plan is made once a batch and window, and read by `attend` alone."""

    def plan(self, pages: Pages, rows: Rows, window: int | None = None, threads: int = 1) -> Any:
        """Check `rows`, and cut their work into equal shares for `threads`."""

    def attend(
        self,
        pages: Pages,
        plan: Any,
        layer: int,
        q: torch.Tensor,
        scale: float,
        soft_cap: float | None = None,
        out: torch.Tensor | None = None,
    ) -> Partial:
        """Attention of q `[n, d_k]` over the pages of `layer`."""

    def plan_append(self, pages: Pages, slots: torch.Tensor) -> Any:
        """Check slots, int64 `[layers, n]`."""

    def append(self, pages: Pages, plan: Any, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k `[n, d_k]` and v `[n, d_v]` at the slots of `layer`."""

    def gather(self, pages: Pages, table: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages as dense k and v."""

    def copy(self, pages: Pages, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copy whole pages."""

    def merge_into(self, into: Partial, past: Partial, index: torch.Tensor | None) -> None:
        """Merge `past` into `into`, in place: its vector i into vector `index[i]`, or into vector i without an index.

        into: out `[N, d_v]` and lse float32 `[N]`, contiguous; past: out `[n, d_v]` and lse float32 `[n]`, in other
        memory; index: int64 `[n]`, all distinct; without it n is N. Either out is float32, bfloat16 or float16.
        As `partial.merge`: sums in float32, rounded once to the dtype of into; only empties merge to the empty one.
        Raises ValueError, and changes nothing, on other shapes and dtypes and on an index outside [0, N).
        """


@cache
def kernels(device: torch.device) -> Kernels:
    """The kernels for `device`. `LAMINA_KERNELS`, one of reference and cpu, overrides the choice."""
    if device.type != "cpu":
        raise ValueError(f"there are kernels for the device cpu, got {device}")
    name = os.environ.get("LAMINA_KERNELS", "cpu")
    chosen: Kernels
    if name == "cpu":
        from lamina_kernels import cpu_decode

        chosen = cpu_decode
    elif name == "reference":
        from lamina_kernels import reference

        chosen = reference
    else:
        raise ValueError(f"LAMINA_KERNELS must be reference or cpu, got {name!r}")
    logger.info("attention kernels for %s: %s", device, name)
    return chosen
