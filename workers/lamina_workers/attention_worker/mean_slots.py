"""The mean key and mean value of the tokens that compensated policies have freed, attended as one slot more.

Sums are kept in float32 for each part, layer and KV head; a fork begins with its parent's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lamina_kernels.paged.pages import Pages, gather
from lamina_kernels.partial import Partial
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.attention_worker.kv_parts import Absorbed

AT_ONCE = 256  # pages that are read at a time, so that little memory is taken


class _Sums(NamedTuple):
    """The sums of one part, which begins at position `lo`. tokens: int64 `[layers, heads]`; k, v: float32
    `[layers, heads, d]`. Forks share them, so they are never written."""

    lo: int
    tokens: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True)
class MeanReading:
    """Means, and the vectors of a batch that read them. vectors: int64 `[n]` of the flat q; cells: int64 `[n]`, the
    mean that each of them reads; log_tokens: float32 `[layers, cells]`; k, v: the means, float32 `[layers, cells, d]`.
    """

    vectors: torch.Tensor
    cells: torch.Tensor
    log_tokens: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def attend(self, spec: LayerSpec, q: torch.Tensor) -> Partial:
        """The partial of the means for `vectors`, of the flat q `[m, d_k]` of a layer; out in q's dtype."""
        layer = spec.kv_layer
        logits = (q[self.vectors].float() * self.k[layer, self.cells]).sum(-1) * spec.scale
        if spec.soft_cap is not None:
            logits = spec.soft_cap * torch.tanh(logits / spec.soft_cap)
        out = self.v[layer, self.cells].to(q.dtype)
        return Partial(out, logits + self.log_tokens[layer, self.cells])


class MeanSlots:
    """The sums of one worker's parts."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._sums: dict[int, _Sums] = {}

    def fork(self, handle: int, parent: int, length: int) -> None:
        """A part begins as the first `length` tokens of another, and with its sums, if it has any."""
        sums = self._sums.get(parent)
        if sums is not None and sums.lo < length:
            self._sums[handle] = sums

    def forget(self, handle: int) -> None:
        """A part is closed."""
        self._sums.pop(handle, None)

    def absorb(self, absorbed: Absorbed) -> None:
        """Add up pages that were freed. Nothing may have been written to them yet."""
        at = self._pages.layout
        cells = torch.from_numpy(absorbed.cells)
        old = self._sums.get(absorbed.handle)
        if old is None:
            shape = absorbed.cells.shape
            none = torch.zeros(shape, dtype=torch.int64)
            old = _Sums(absorbed.lo, none, torch.zeros(*shape, at.d_k), torch.zeros(*shape, at.d_v))
        tokens, k, v = old.tokens.clone(), old.k.clone(), old.v.clone()
        tokens[cells] += absorbed.pages.shape[1] * at.page_size
        flat = torch.from_numpy(absorbed.pages.astype(np.int64).reshape(-1))
        of_k, of_v = torch.empty(len(flat), at.d_k), torch.empty(len(flat), at.d_v)
        for first in range(0, len(flat), AT_ONCE):
            some = flat[first : first + AT_ONCE]
            page_k, page_v = gather(self._pages, some, len(some) * at.page_size)
            of_k[first : first + AT_ONCE] = page_k.float().view(len(some), at.page_size, -1).sum(1)
            of_v[first : first + AT_ONCE] = page_v.float().view(len(some), at.page_size, -1).sum(1)
        k[cells] += of_k.view(*absorbed.pages.shape, -1).sum(1)
        v[cells] += of_v.view(*absorbed.pages.shape, -1).sum(1)
        self._sums[absorbed.handle] = _Sums(absorbed.lo, tokens, k, v)

    def mean(self, handle: int, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean k `[d_k]` and v `[d_v]`, float32, of what a part's head has freed; zeros where that is nothing. As
        many tokens that are all equal to the mean are attended as the mean is."""
        sums = self._sums.get(handle)
        if sums is None:
            return torch.zeros(self._pages.layout.d_k), torch.zeros(self._pages.layout.d_v)
        tokens = sums.tokens[layer, head].clamp(min=1)
        return sums.k[layer, head] / tokens, sums.v[layer, head] / tokens

    def reading(self, cells: list[tuple[int, int, torch.Tensor]]) -> MeanReading | None:
        """Of parts' heads, by handle and number in the part, with the vectors that read the mean of each, int64; None
        where there are none."""
        if not cells:
            return None
        sums = [(self._sums[handle], head) for handle, head, _ in cells]
        tokens = torch.stack([of.tokens[:, head] for of, head in sums], 1)
        k = torch.stack([of.k[:, head] for of, head in sums], 1)
        v = torch.stack([of.v[:, head] for of, head in sums], 1)
        counts = tokens.float().clamp(min=1).unsqueeze(-1)
        vectors = [of_cell for *_, of_cell in cells]
        numbers = torch.repeat_interleave(torch.arange(len(cells)), torch.tensor([len(x) for x in vectors]))
        made = torch.cat(vectors), numbers, tokens.float().log(), k / counts, v / counts
        return MeanReading(*(x.to(self._pages.arena.device) for x in made))
