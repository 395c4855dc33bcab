"""Where sketches lie: an arena of them, under the numbers of their pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamina_kernels.paged import memory
from lamina_kernels.paged.pages import PageLayout, Pages, check_arena, check_range

LEVELS = 15  # the largest code


@dataclass(frozen=True, slots=True)
class SketchLayout:
    """The shape of the sketches of such pages, which have two pieces: what a scan reads, which is the keys' codes,
    steps and lows and the values' mean; and the values' codes, steps and lows. Each ends with zeros up to a multiple of
    64 bytes.

    A byte has two codes. Those of keys: strips of 16 * unit tokens, each of lines of 64 bytes, in them for 16 tokens
    four bytes each. With unit 2, line i is of channels 4i to 4i + 3, the low halves of tokens 0 to 15 of the strip, the
    high halves of the others; with unit 1 the low halves are of channels 8i to 8i + 3, the high ones of the next four.
    Those of values: lines by 16 channels, then by 8 tokens, in them for each channel four bytes, the low halves of the
    first four tokens, the high halves of the others.
    Of keys steps and lows are bfloat16 `[padded]`, zeros behind d_k; of values, and mean, bfloat16 `[d_v]`.
    """

    pages: PageLayout

    def __post_init__(self) -> None:
        if self.pages.page_size % 16:
            raise ValueError(f"sketches are made of pages of a multiple of 16 tokens, got {self.pages.page_size}")
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
    def scanned_bytes(self) -> int:
        """Bytes of what a scan reads of a page."""
        return -(-(self.mean_at + 2 * self.pages.d_v) // 64) * 64

    @property
    def value_steps_at(self) -> int:
        """Bytes of the values' codes, behind which the steps stand."""
        return self.pages.page_size * self.pages.d_v // 2

    @property
    def value_lows_at(self) -> int:
        return self.value_steps_at + 2 * self.pages.d_v

    @property
    def value_bytes(self) -> int:
        """Bytes of what is read besides of a page whose values are read in 4 bits."""
        return -(-(self.value_lows_at + 2 * self.pages.d_v) // 64) * 64

    @property
    def sketch_bytes(self) -> int:
        """Bytes of one sketch."""
        return self.scanned_bytes + self.value_bytes


@dataclass(frozen=True, slots=True)
class Sketches:
    """Arenas of sketches, that of a page under the page's number: `scanned`, uint8 `[n_pages, scanned_bytes]`, and
    `values`, uint8 `[n_pages, value_bytes]`. Apart, so that a scan goes through memory in one run."""

    layout: SketchLayout
    scanned: torch.Tensor
    values: torch.Tensor

    def __post_init__(self) -> None:
        check_arena(self.scanned, self.layout.scanned_bytes)
        check_arena(self.values, self.layout.value_bytes)
        if len(self.scanned) != len(self.values):
            raise ValueError(f"sketches of {len(self.scanned)} pages have values of {len(self.values)}")

    @classmethod
    def allocate(cls, page_layout: PageLayout, n_pages: int, device: torch.device | str = "cpu") -> Sketches:
        """Arenas of zeros for as many pages. On the CPU their memory is taken only when touched."""
        if n_pages < 1:
            raise ValueError(f"n_pages must be at least 1, got {n_pages}")
        layout = SketchLayout(page_layout)
        widths = layout.scanned_bytes, layout.value_bytes
        if torch.device(device).type == "cpu":
            return cls(layout, *(memory.allocate(n_pages * width).view(n_pages, width) for width in widths))
        return cls(layout, *(torch.zeros(n_pages, width, dtype=torch.uint8, device=device) for width in widths))

    @property
    def n_pages(self) -> int:
        return self.scanned.shape[0]

    @property
    def steps(self) -> torch.Tensor:
        """A view of the keys' steps, bfloat16 `[n_pages, d_k]`."""
        return _halves(self.scanned, self.layout.steps_at, self.layout.pages.d_k)

    @property
    def lows(self) -> torch.Tensor:
        """A view of the keys' lows, bfloat16 `[n_pages, d_k]`: what code 0 stands for."""
        return _halves(self.scanned, self.layout.lows_at, self.layout.pages.d_k)

    @property
    def means(self) -> torch.Tensor:
        """A view of the means of V, bfloat16 `[n_pages, d_v]`."""
        return _halves(self.scanned, self.layout.mean_at, self.layout.pages.d_v)

    @property
    def value_steps(self) -> torch.Tensor:
        """A view of the values' steps, bfloat16 `[n_pages, d_v]`."""
        return _halves(self.values, self.layout.value_steps_at, self.layout.pages.d_v)

    @property
    def value_lows(self) -> torch.Tensor:
        """A view of the values' lows, bfloat16 `[n_pages, d_v]`."""
        return _halves(self.values, self.layout.value_lows_at, self.layout.pages.d_v)


def _halves(arena: torch.Tensor, at: int, count: int) -> torch.Tensor:
    return arena[:, at : at + 2 * count].view(torch.bfloat16)


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
