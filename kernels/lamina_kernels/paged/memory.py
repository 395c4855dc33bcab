"""Memory for what is streamed: taken when touched, in huge pages where the system has them."""

from __future__ import annotations

import mmap

import torch


def allocate(n_bytes: int) -> torch.Tensor:
    """Zeros, uint8 `[n_bytes]`, aligned to a page. A prefetch past a page's end is lost, so pages should be large."""
    if n_bytes < 1:
        raise ValueError(f"n_bytes must be at least 1, got {n_bytes}")
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets none
        memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = mmap.mmap(-1, n_bytes)
    return torch.frombuffer(memory, dtype=torch.uint8)
