"""Where tensors lie inside a payload. Importing this loads no torch: code that only reads frames needs none."""

from __future__ import annotations

ALIGNMENT = 64  # of every tensor inside a payload: one cache line, the widest SIMD register


def padding(offset: int) -> int:
    """Bytes from `offset` to the next multiple of the alignment."""
    return -offset % ALIGNMENT
