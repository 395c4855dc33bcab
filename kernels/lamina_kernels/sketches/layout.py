"""Where sketches lie: an arena of them, under the numbers of their pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamina_kernels.paged import memory
from lamina_kernels.paged.pages import Order, PageLayout, Pages, check_arena, check_range

LEVELS = 15  # the largest code


@dataclass(frozen=True, slots=True)
class SketchLayout:
    """The shape of the sketches of such pages: codes, steps, lows, mean; then zeros up to a multiple of 64 bytes.

    codes: strips of 16 * unit tokens, each of lines of 64 bytes, in them for 16 tokens four bytes each. A byte has two
    codes. With unit 2, line i is of channels 4i to 4i + 3, the low halves of tokens 0 to 15 of the strip, the high
    halves of the others; with unit 1 the low halves are of channels 8i to 8i + 3, the high ones of the next four.
    steps, lows: bfloat16 `[padded]`, zeros behind d_k; mean: bfloat16 `[d_v]`.
    """

    pages: PageLayout

    def __post_init__(self) -> None:
        if self.pages.order is not Order.CHANNELS:
            raise ValueError(f"sketches are made of pages of {Order.CHANNELS}, got {self.pages.order}")
        if self.pages.latent:
            raise ValueError("sketches are not made of latents, got pages whose V is the front of K")

    @property
    def unit(self) -> int:
        """How many times 16 tokens a strip has."""
        return 2 if self.pages.page_size % 32 == 0 else 1

    @property
    def padded(self) -> int:
        """Channels of K, up to a multiple of 32."""
        return -(-self.pages.d_k // 32) * 32

    @property
    def steps_at(self) -> int:
        """Bytes of the codes, behind which the steps stand."""
        return self.pages.page_size * self.pages.d_k // 2

    @property
    def lows_at(self) -> int:
        return self.steps_at + 2 * self.padded

    @property
    def mean_at(self) -> int:
        return self.lows_at + 2 * self.padded

    @property
    def sketch_bytes(self) -> int:
        """Bytes of one sketch."""
        return -(-(self.mean_at + 2 * self.pages.d_v) // 64) * 64


@dataclass(frozen=True, slots=True)
class Sketches:
    """An arena of sketches, that of a page under the page's number. arena: uint8 `[n_pages, sketch_bytes]`."""

    layout: SketchLayout
    arena: torch.Tensor

    def __post_init__(self) -> None:
        check_arena(self.arena, self.layout.sketch_bytes)

    @classmethod
    def allocate(cls, page_layout: PageLayout, n_pages: int) -> Sketches:
        """An arena of zeros for as many pages. Its memory is taken only when touched."""
        if n_pages < 1:
            raise ValueError(f"n_pages must be at least 1, got {n_pages}")
        layout = SketchLayout(page_layout)
        return cls(layout, memory.allocate(n_pages * layout.sketch_bytes).view(n_pages, layout.sketch_bytes))

    @property
    def n_pages(self) -> int:
        return self.arena.shape[0]

    @property
    def steps(self) -> torch.Tensor:
        """A view of the steps, bfloat16 `[n_pages, d_k]`."""
        at = self.layout
        return self.arena[:, at.steps_at : at.steps_at + 2 * at.pages.d_k].view(torch.bfloat16)

    @property
    def lows(self) -> torch.Tensor:
        """A view of the lows, bfloat16 `[n_pages, d_k]`: what code 0 stands for."""
        at = self.layout
        return self.arena[:, at.lows_at : at.lows_at + 2 * at.pages.d_k].view(torch.bfloat16)

    @property
    def means(self) -> torch.Tensor:
        """A view of the means of V, bfloat16 `[n_pages, d_v]`."""
        at = self.layout
        return self.arena[:, at.mean_at : at.mean_at + 2 * at.pages.d_v].view(torch.bfloat16)


def check_sealed(pages: Pages, sketches: Sketches, page_ids: torch.Tensor) -> None:
    """Raise ValueError unless page_ids is int64 `[n]`, and all are pages of both."""
    if pages.layout != sketches.layout.pages or pages.n_pages != sketches.n_pages:
        raise ValueError(
            f"sketches of {sketches.n_pages} pages of {sketches.layout.pages} are not those of "
            f"{pages.n_pages} pages of {pages.layout}"
        )
    if page_ids.dtype != torch.int64 or page_ids.ndim != 1:
        raise ValueError(f"page_ids must be int64 [n], got {page_ids.dtype} {list(page_ids.shape)}")
    check_range("page_ids", page_ids, sketches.n_pages)
