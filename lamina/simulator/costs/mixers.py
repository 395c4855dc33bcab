"""What layers beside plain attention keep, move and compute: recurrent states, and learned choices of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.errors import InvalidRequest
from lamina.simulator.costs.tables import whole

STATE_RECORDS = 2
"""States that a holder keeps of a sequence: the one at its end, and the one before its last batch, from which that can
be computed again."""
CHUNK = 64
"""Tokens that a prompt's states are advanced by at a time: what flash-linear-attention takes."""
_FLOAT32 = 4
_MOST = 1 << 20
_UPDATES = {"lightning": 5, "mamba2": 5, "gated_delta": 7, "kda": 7}
"""FLOPs of one number of a state and one token: its decay, the outer product of k and v, the product with q, and for
delta rules the product with k besides."""


@dataclass(frozen=True, slots=True)
class StateShape:
    """The recurrent states of one layer: `heads` of `d_k` x `d_v` float32 numbers, and the last inputs of a causal
    convolution of width `conv` (0: none). `key_heads` q and k serve all heads. `kind` is one of lightning (arXiv
    2401.04658), mamba2 (2405.21060), gated_delta (2412.06464) and kda (2510.26692).

    Raises InvalidRequest for another kind, or a size out of its bounds.
    """

    kind: str
    heads: int
    d_k: int
    d_v: int
    key_heads: int
    conv: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _UPDATES:
            raise InvalidRequest(f"kind of a state is {self.kind!r:.80}; allowed are {', '.join(_UPDATES)}")
        for name in ("heads", "d_k", "d_v", "key_heads"):
            whole(f"{name} of a state", getattr(self, name), 1, _MOST)
        whole("conv of a state", self.conv, 0, 64)
        if self.heads % self.key_heads:
            raise InvalidRequest(f"a state has {self.key_heads} key heads; they must divide its heads, {self.heads}")

    @property
    def nbytes(self) -> int:
        """Of one layer and sequence. A key head's inputs are kept with each of its heads, since holders have heads."""
        inputs = max(0, self.conv - 1) * (2 * self.d_k + self.d_v)
        return _FLOAT32 * self.heads * (self.d_k * self.d_v + inputs)

    @property
    def channels(self) -> int:
        """q, k and v of one token: what the convolution is over, and what a holder is sent beside the gates."""
        return 2 * self.key_heads * self.d_k + self.heads * self.d_v

    @property
    def gate_bytes(self) -> int:
        """Float32 gates of one token: decays and strengths of writing."""
        gates = {"lightning": 0, "kda": self.d_k + 1}.get(self.kind, 2)
        return _FLOAT32 * self.heads * gates

    @property
    def outputs(self) -> int:
        """Numbers that come back of one token."""
        return self.heads * self.d_v

    @property
    def flops(self) -> int:
        """Of one token in decode."""
        return _UPDATES[self.kind] * self.heads * self.d_k * self.d_v + 2 * self.conv * self.channels

    @property
    def prompt_flops(self) -> int:
        """Of one token of a prompt, in chunks: products within the chunk, the state's with q and of k with v; for delta
        rules the products of keys, a triangular solve, and the products that it yields."""
        state, scores = self.heads * self.d_k * self.d_v, 2 * CHUNK * self.key_heads * self.d_k
        values, keys = 2 * CHUNK * self.heads * self.d_v, 2 * CHUNK * self.heads * self.d_k
        total = scores + values + 4 * state + 2 * self.conv * self.channels
        if self.kind in ("gated_delta", "kda"):
            total += scores + self.heads * CHUNK * CHUNK // 3 + keys + values + 2 * state
        return total


@dataclass(frozen=True, slots=True)
class ChoiceShape:
    """A learned choice of the `tokens` that one layer attends to. Keys of its own, `key_elements` numbers a token, are
    all read, and scored by `query_elements` numbers at `score_flops` FLOPs a key. Where all are 0 the choice of an
    earlier layer is used."""

    tokens: int
    key_elements: int = 0
    query_elements: int = 0
    score_flops: int = 0

    def __post_init__(self) -> None:
        whole("tokens of a choice", self.tokens, 1, 1 << 30)
