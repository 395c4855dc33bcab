"""Rotary position embeddings: frequencies of every supported scaling, and cos and sin of a batch's positions.

For `dynamic`, each token has the length that its frequencies are made for. The formulas are those of transformers'
`modeling_rope_utils`, in the same float32 arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One RoPE. `theta` is the base; `positions` the length that the config calls max_position_embeddings.

    `original` is the length of pre-training (yarn, llama3; elsewhere equal to `positions`). Each scaling reads
    the fields that its formula names and ignores the others.
    """

    kind: str
    theta: float
    positions: int
    original: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def context(self) -> int:
        """Positions that this RoPE is made for. llama3 configs already count the factor in, the others don't."""
        if self.kind in ("default", "llama3"):
            return self.positions
        return int((self.original if self.kind == "yarn" else self.positions) * self.factor)


def inverse_frequencies(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Float32 `[dim / 2]`: radians per position. For `dynamic`, those of lengths up to `rope.positions`."""
    base = _powers(rope.theta, dim).reciprocal()
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, dim)
    return base


def dynamic_frequencies(rope: RopeConfig, dim: int, lengths: torch.Tensor) -> torch.Tensor:
    """Dynamic NTK: float32 `[T, dim / 2]`, for int64 `lengths` `[T]`.

    theta' = theta * (factor * n / positions - (factor - 1)) ^ (dim / (dim - 2)), n = max(length, positions).
    """
    ratio = rope.factor * lengths.clamp(min=rope.positions) / rope.positions - (rope.factor - 1)
    theta = rope.theta * ratio ** (dim / (dim - 2))  # [T]
    return (theta.unsqueeze(-1) ** _exponents(dim, lengths.device)).reciprocal()


def attention_scale(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1, except for yarn (arXiv 2309.00071, section 3.4)."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


class Rotary:
    """cos and sin for the tokens of a batch. Computed, not looked up: a table would grow with the context."""

    def __init__(self, rope: RopeConfig, dim: int, device: torch.device | str = "cpu") -> None:
        self._rope = rope
        self._dim = dim
        self._scale = attention_scale(rope)
        self._frequencies = inverse_frequencies(rope, dim).to(device)

    def __call__(self, positions: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 `[T, dim / 2]` each, for int64 positions `[T]`.

        `lengths`, int64 `[T]`, is needed by `dynamic`: the length whose frequencies a token gets. With the larger of
        prompt length and position + 1 a token's rotation does not depend on how its prompt was cut into chunks.
        """
        frequencies = self._frequencies
        if self._rope.kind == "dynamic":
            if lengths is None:
                raise ValueError("dynamic RoPE needs rope_lengths for each token, got None")
            frequencies = dynamic_frequencies(self._rope, self._dim, lengths)
        angles = positions.unsqueeze(-1).float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self._scale == 1.0 else (cos * self._scale, sin * self._scale)


def _exponents(dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


def _powers(theta: float, dim: int) -> torch.Tensor:
    powers: torch.Tensor = theta ** _exponents(dim)
    return powers


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(rope: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / base
    longest = rope.original / rope.low_freq_factor
    shortest = rope.original / rope.high_freq_factor
    smooth = (rope.original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * base / rope.factor + smooth * base
    scaled = torch.where(wavelength > longest, base / rope.factor, base)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, scaled)


def _yarn(rope: RopeConfig, dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over dimensions from extrapolation to interpolation."""

    def dimension(rotations: float) -> float:
        return dim * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = _powers(rope.theta, dim)
    return ramp / (rope.factor * powers) + (1 - ramp) / powers
