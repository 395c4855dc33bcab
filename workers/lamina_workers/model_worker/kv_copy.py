"""How KV goes from the parts of one holder to those of another: what is asked for, and where the answers go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from lamina_protocols.messages.messages import Fetched, FetchedPages


class Move(NamedTuple):
    """Positions [lo, hi) of part `source` at holder `origin` are to be copied to part `target` at holder `to`. Both are
    in the pool number `pool`.

    Of the `source_heads` that the one has, those from place `source_first` on, `heads` of them, come to the places from
    `target_first` on of the `target_heads` that the other has. `paged`: a page begins at `lo` in both parts. With
    `xor` several moves may have the same target heads: their pages are XORed, zeros where one has none.
    """

    origin: int
    source: int
    to: int
    target: int
    lo: int
    hi: int
    heads: int
    source_heads: int
    source_first: int
    target_heads: int
    target_first: int
    paged: bool
    pool: int = 0
    xor: bool = False


class Copy:
    """Several moves in one pool: the ranges to ask for, and the vectors or pages that their targets store. Each range
    of a part is asked for once, for all of its heads. `heads`: how many a source has, by holder and part; `paged`:
    whether whole pages can be taken. `circular`: a holder is both origin and target."""

    def __init__(self, moves: Sequence[Move]) -> None:
        self.sources = list(dict.fromkeys((move.origin, move.source, move.lo, move.hi) for move in moves))
        self.heads = {(move.origin, move.source): move.source_heads for move in moves}
        self.paged = all(move.paged for move in moves)
        self.xor = any(move.xor for move in moves)
        self.circular = not {move.origin for move in moves}.isdisjoint(move.to for move in moves)
        source_numbers = {source: index for index, source in enumerate(self.sources)}
        self._targets: dict[tuple[int, int], list[tuple[int, Move]]] = {}  # answers, by holder and part
        for move in moves:
            source_number = source_numbers[move.origin, move.source, move.lo, move.hi]
            self._targets.setdefault((move.to, move.target), []).append((source_number, move))

    def pages(self, arrived: Sequence[FetchedPages], layers: int) -> Iterator[tuple[int, torch.Tensor]]:
        """For each target holder the pages of its rows, as `FreshPages` has them; `arrived` answers `sources`, in
        order, each with all pages of so many layers."""
        rows: dict[int, list[torch.Tensor]] = {}
        for (number, _), pieces in self._targets.items():
            parts = [(arrived[source_number].pages, move) for source_number, move in pieces]
            parts = [(pages.view(layers, -1, pages.shape[-1]), move) for pages, move in parts]
            rows.setdefault(number, []).append(_put_together(parts))
        for number, row_pages in rows.items():
            joined = row_pages[0] if len(row_pages) == 1 else torch.cat(row_pages, dim=1)
            yield number, joined.flatten(0, -2)

    def filled(self, arrived: Sequence[Fetched]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """For each target holder k and v of its rows, as `Fresh` has them; `arrived` answers `sources`, in order."""
        rows: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for (number, _), pieces in self._targets.items():
            k, v = (
                _put_together([(_by_token(getattr(arrived[source], side), move), move) for source, move in pieces])
                for side in ("k", "v")
            )
            rows.setdefault(number, []).append((k.flatten(0, 1), v.flatten(0, 1)))
        for number, several in rows.items():
            if len(several) == 1:
                yield number, *several[0]
            else:
                yield number, torch.cat([k for k, _ in several]), torch.cat([v for _, v in several])


def _put_together(pieces: Sequence[tuple[torch.Tensor, Move]]) -> torch.Tensor:
    """Of parts, each `[n, source heads * count, size]`, what the target heads get: `[n, target heads * count, size]`.
    With `xor` several pieces may have the same target heads: then it is the XOR of their bytes."""
    first, move = pieces[0]
    if len(pieces) == 1 and move.heads == move.source_heads == move.target_heads:
        return first
    n, count, size = len(first), first.shape[1] // move.source_heads, first.shape[2]
    joined = (first.new_zeros if move.xor else first.new_empty)(n, move.target_heads, count, size)
    for part, move in pieces:
        chosen_heads = part.view(n, move.source_heads, count, size).narrow(1, move.source_first, move.heads)
        target = joined.narrow(1, move.target_first, move.heads)
        if move.xor:
            target.bitwise_xor_(chosen_heads)
        else:
            target.copy_(chosen_heads)
    return joined.flatten(1, 2)


def _by_token(vectors: torch.Tensor, move: Move) -> torch.Tensor:
    """`[tokens * source heads, d]` as `[tokens, source heads, d]`."""
    return vectors.view(move.hi - move.lo, move.source_heads, vectors.shape[-1])
