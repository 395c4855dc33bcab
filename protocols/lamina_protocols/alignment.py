"""Where tensors lie inside a payload. Apart from them, so that who only reads frames loads no torch."""

from __future__ import annotations

ALIGNMENT = 64  # of every tensor inside a payload: one cache line, the widest SIMD register


def padding(offset: int) -> int:
    """Bytes from `offset` to the next multiple of the alignment."""
    return -offset % ALIGNMENT
