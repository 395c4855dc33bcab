"""The operations that the ranks of one model do together, as the decoder sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Collective(Protocol):
    """One rank's end of a group. All ranks call the same in the same order, with the same shapes.

    `seconds`: time spent here since the beginning. Raises RankLost where another rank is gone or silent; then the group
    is closed, which the others notice in turn.
    """

    rank: int
    ranks: int
    seconds: float

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of x, any contiguous shape, in place of x: the same bits on each rank."""
        ...

    def gather_columns(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        """All parts side by side, `[n, sum(widths)]`, on rank 0; None elsewhere. x: `[n, widths[rank]]`."""
        ...

    def close(self) -> None: ...


class Alone:
    """The group of one rank: nothing to do."""

    rank, ranks, seconds = 0, 1, 0.0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather_columns(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        return x

    def close(self) -> None:
        pass
