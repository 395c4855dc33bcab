"""What a holder keeps of a sequence, and what one accepted batch may write."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from lamina_workers.attention_worker.page_pool import Int32


@dataclasses.dataclass(slots=True)
class Part:
    """What this holder keeps of one sequence: KV heads `heads`, positions [lo, held) of at most [lo, hi). There are
    pages up to `held`, and KV in every layer up to `stored`: they differ while a batch is under way, and after one that
    did not end with all its layers."""

    heads: tuple[int, ...]
    lo: int
    hi: int
    held: int
    stored: int
    table: Int32  # [layers, len(heads), capacity]
    freed: Int32  # [layers, len(heads)]: slots below this, but for sinks, hold nothing that a later query sees

    @property
    def nbytes(self) -> int:
        """Of its tables."""
        return self.table.nbytes + self.freed.nbytes


@dataclasses.dataclass(frozen=True, slots=True)
class Absorbed:
    """Pages that a part, which begins at position `lo`, has freed and for which a mean stands from now on: they must be
    read before anything is written. cells: bool `[layers, heads]`; pages: int32 `[cells, slots]`, in their order."""

    handle: int
    lo: int
    cells: npt.NDArray[np.bool_]
    pages: Int32


@dataclasses.dataclass(frozen=True, slots=True)
class Reservation:
    """What one accepted batch may write: pages to copy before the first write, and each part's floor."""

    copies_from: Int32  # [n] pages whose content the first writer must keep
    copies_to: Int32  # [n] pages that take it
    floors: tuple[int, ...]  # per row
    absorbed: tuple[Absorbed, ...] = ()
