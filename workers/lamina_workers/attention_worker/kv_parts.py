"""What a holder keeps of a sequence, and what one accepted batch may write."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from lamina_workers.attention_worker.head_policies import Group, HeadPolicies, lowest_length, returns_to
from lamina_workers.attention_worker.page_pool import NO_PAGE, Int32

NEVER = 1 << 62


@dataclasses.dataclass(slots=True)
class Part:
    """What this holder keeps of one sequence: KV heads `heads`, positions [lo, held) of at most [lo, hi). There are
    pages up to `held`, and KV in every layer up to `stored`: they differ while a batch is under way, and after one that
    did not end with all its layers. `policies` say what is read of it and kept."""

    policies: HeadPolicies
    heads: tuple[int, ...]
    lo: int
    hi: int
    held: int
    stored: int
    table: Int32  # [layers, len(heads), capacity]
    freed: Int32  # [layers, len(heads)]: slots below this hold nothing, but for what stays
    absent: int | None = 0  # slots below `held`, of all layers and heads, without a page; None: not counted yet
    frees_from: int | None = None  # the lowest start of a row for which pages are freed; None: not known yet

    @property
    def groups(self) -> tuple[Group, ...]:
        """Its cells by policy, where anything is freed while it lives."""
        return self.policies.retention.groups(self.heads)

    def floor(self, size: int) -> int:
        """The lowest length to which it can return, where a page has `size` tokens: there all that any query sees is
        still held."""
        most = ((group, int(self.freed[group.cells].max())) for group in self.groups)
        return max((lowest_length(group.policy, self.lo, freed, size) for group, freed in most if freed), default=0)

    def next_free(self, size: int) -> int:
        """The lowest start of a row for which pages are freed, as far as some have been by now."""
        if self.frees_from is None:
            least = ((group, self.lo + (int(self.freed[group.cells].min()) + 1) * size) for group in self.groups)
            self.frees_from = min((returns_to(group.policy, position) for group, position in least), default=NEVER)
        return self.frees_from

    def pages(self, size: int) -> tuple[int, int]:
        """How many pages of `size` tokens it holds, and how many keeping everything would take."""
        slots = -(-(self.held - self.lo) // size)
        if self.absent is None:
            self.absent = int(np.count_nonzero(self.table[:, :, :slots] == NO_PAGE))
        kept = self.freed.size * slots
        return kept - self.absent, kept

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
