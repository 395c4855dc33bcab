"""What a state layer keeps of a sequence. Loads no torch, so that a config can be checked without it.

A page is one record of one layer and head, float32: the state `[d_k, d_v]`, then the convolution's last inputs
`[conv - 1, 2 * d_k + d_v]`, the oldest first, of the channels of q, k and v of this head. Heads that share a key head
keep its inputs once each, so that every head can live somewhere else.

A page may have instead the inputs of tokens that may still be taken back, the latest of a sequence that has drafts.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("lightning", "gated_delta", "mamba2", "kda")
SIZES = range(16, 257, 16)  # that d_k and d_v may have
CONVS = range(2, 9)  # widths that a convolution may have
EPSILON = 1e-6  # of the l2 norm of q and k


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The shape of the states of a layer. conv: the width of the causal convolution, 0 where there is none."""

    kind: str
    d_k: int
    d_v: int
    conv: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("d_k", "d_v"):
            if getattr(self, name) not in SIZES:
                raise ValueError(f"{name} must be a multiple of 16 from 16 to {SIZES[-1]}, got {getattr(self, name)!r}")
        if self.conv not in (0, *CONVS):
            raise ValueError(f"conv must be 0 or from {CONVS[0]} to {CONVS[-1]}, got {self.conv!r}")

    @property
    def delta(self) -> bool:
        """Whether the delta rule writes the state: then q and k are l2-normalised too."""
        return self.kind in ("gated_delta", "kda")

    @property
    def gates(self) -> int:
        """Numbers a token and head: mamba2 (log decay, dt), gated_delta (log decay, beta), kda (log decays, beta)."""
        return {"lightning": 0, "kda": self.d_k + 1}.get(self.kind, 2)

    @property
    def channels(self) -> int:
        """Inputs of one head: its q, k and v."""
        return 2 * self.d_k + self.d_v

    @property
    def record(self) -> int:
        """Float32 numbers of a page."""
        return self.d_k * self.d_v + max(self.conv - 1, 0) * self.channels

    @property
    def slot(self) -> int:
        """Float32 numbers that are kept of a token's inputs of one head: q, k and v before the convolution, gates."""
        return self.channels + self.gates

    @property
    def slots(self) -> int:
        """Tokens whose inputs a page keeps: that of position p is in slot p modulo `slots`."""
        return self.record // self.slot

    @property
    def drafts(self) -> int:
        """The most drafts of a row: the inputs of two rows are kept at a time."""
        return max(0, self.slots // 2 - 1)

    @property
    def page_bytes(self) -> int:
        return 4 * self.record
