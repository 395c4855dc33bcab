"""The implementation of the kernels that this process uses: chosen once per device, and logged."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch

from lamina_kernels.paged.pages import PageLayout, Pages
from lamina_kernels.paged.rows import Ints, Rows, Table
from lamina_kernels.partial import Partial

CHOICES = {"cpu": ("cpu", "triton"), "cuda": ("triton",)}  # by kind of device, its default first

logger = logging.getLogger("lamina")


class Grown(Protocol):
    """The plans of rows that go on from batch to batch."""

    def next(self, start: Sequence[int], count: Sequence[int], hi: Sequence[int], moved: Mapping[int, Table]) -> Any:
        """The plan of the same rows with other queries: the first position, how many they are and up to where they
        read, of each row. Where rows have more keys, these are before the queries or are the queries' own. The plan
        before it is not valid any more. Rows in `moved`, by number, have other tables from now on, of the same layers
        and heads. Pages behind a row's window may be gone."""


class Kernels(Protocol):
    """The functions of a module of kernels. A plan is made once for the rows of a batch, and read by `attend` alone."""

    def layout(self, page_size: int, d_k: int, d_v: int, dtype: torch.dtype, latent: bool = False) -> PageLayout:
        """How these kernels lay out a page. `latent`: V is the front of K. Raises ValueError for what they cannot
        keep."""

    def prepare(self, layout: PageLayout) -> Iterator[tuple[int, int]]:
        """Load what pages of `layout` need, compiling it where it never was; yields how many steps of how many are
        done, the first time before the first step."""

    def plan(self, pages: Pages, rows: Rows, threads: int = 1) -> Any:
        """Check `rows`, and cut their work into equal shares for `threads`, once for all layers.

        Raises ValueError on rows that overlap, read beyond their table, or name pages that do not exist, and on pages
        of another order. Page -1 is none: a layer where one is read cannot be attended.
        Their tables may be kept, not copied: they must not change while the plan is used.
        """

    def grown(self, plan: Any) -> Grown | None:
        """Makes the plans of the next batches of a plan, of the same rows, each further than before. None where that
        does not follow from the plan.

        Only then may the slots of an append plan change, between batches, in memory that the caller keeps. Nothing is
        checked again: the pages of new keys must be in the plan's tables before they are read, and exist.
        """

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
        """Attention of q `[n, d_k]` over the pages of `layer`: out `[n, d_v]` in q's dtype, lse float32 `[n]`.

        softmax(cap(scale * q.k)) v over the keys that a query sees (`Rows`), where cap(x) is
        soft_cap * tanh(x / soft_cap), or x without a soft cap.
        """

    def plan_lists(self, pages: Pages, items: int, group: int, threads: int = 1) -> Any:
        """Room for so many lists of pages, each with a query of `group` heads."""

    def attend_lists(
        self,
        pages: Pages,
        plan: Any,
        lists: Table,
        lengths: Ints,
        q: torch.Tensor,
        scale: float,
        soft_cap: float | None = None,
    ) -> Partial:
        """Attention of q `[items * group, d_k]`, item by item, over the first lengths[i] tokens of the pages in
        lists[i], all of which each query sees. lists: int32 `[items, most]`; lengths: int64 `[items]`.
        Raises ValueError where a list that long names a page that does not exist."""

    def plan_append(self, pages: Pages, slots: torch.Tensor) -> Any:
        """Check slots, int64 `[layers, n]` (page * page_size + offset for each vector), once for all layers. They must
        not change while the plan is used."""

    def append(self, pages: Pages, plan: Any, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k `[n, d_k]` and v `[n, d_v]`, rounded to the pages' dtype, at the slots of `layer`. Of latents v is
        `[n, 0]`."""

    def merge_into(self, into: Partial, past: Partial, index: torch.Tensor | None) -> None:
        """Merge `past` into `into`, in place: its vector i into vector `index[i]`, or into vector i without an index.

        into: out `[N, d_v]` and lse float32 `[N]`, contiguous; past: out `[n, d_v]` and lse float32 `[n]`, in other
        memory; index: int64 `[n]`, all distinct; without it n is N. Either out is float32, bfloat16 or float16.
        As `partial.merge`: sums in float32, rounded once to the dtype of into; only empties merge to the empty one.
        Raises ValueError, and changes nothing, on other shapes and dtypes and on an index outside [0, N); of an index
        on a GPU, which the host does not wait for, it skips what is outside.
        """


@cache
def kernels(device: torch.device) -> Kernels:
    """The kernels for `device`: the first choice for its type, or the one that `LAMINA_KERNELS` names.

    Raises ValueError for another name or device, and on a CPU for triton without its interpreter; ImportError where
    the package triton is missing.
    """
    if device.type not in CHOICES:
        raise ValueError(f"there are kernels for the devices {' and '.join(CHOICES)}, got {device}")
    choices = CHOICES[device.type]
    name = os.environ.get("LAMINA_KERNELS", choices[0])
    if name not in choices:
        raise ValueError(f"LAMINA_KERNELS must be {' or '.join(choices)} for the device {device.type}, got {name!r}")
    chosen: Kernels
    if name == "cpu":
        from lamina_kernels.attention import decode as cpu_decode

        chosen = cpu_decode
    else:
        chosen = _triton(device)
    logger.info("attention kernels for %s: %s", device, name)
    return chosen


def _triton(device: torch.device) -> Kernels:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "LAMINA_KERNELS=triton on a CPU needs TRITON_INTERPRET=1 in the environment, set from the start"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the kernels triton need the package triton (pip install triton): {error}") from error
    from lamina_kernels.gpu import decode as triton_decode

    return triton_decode
