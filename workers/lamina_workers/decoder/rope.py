"""Rotary position embeddings: frequencies of every supported scaling, and cos and sin of a batch's positions.

For `dynamic` and `longrope`, each token has the length that its frequencies are made for. The formulas are those of
transformers' `modeling_rope_utils`, in the same float32 arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lamina_workers.model_config.rope_config import RopeConfig, scaled_attention


def head_order(rope: RopeConfig, dim: int) -> torch.Tensor | None:
    """Where each of a head's `dim` numbers is to be taken from, so that i is turned against i + dim / 2: int64 `[dim]`;
    None where they stand so already. Neither products of queries and keys nor norms over a head depend on the order."""
    turned = rope.turned or dim
    if turned == dim and not rope.interleaved:
        return None
    first, second = torch.arange(turned).view(-1, 2).T if rope.interleaved else torch.arange(turned).view(2, -1)
    still = torch.arange(turned, dim).view(2, -1)
    return torch.cat((first, still[0], second, still[1]))


def inverse_frequencies(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Float32 `[dim / 2]`: radians per position. For `dynamic` and `longrope`, those of lengths up to `positions` and
    `original`."""
    if rope.kind == "longrope":
        return (torch.tensor(rope.short_factor) * _powers(rope.theta, dim)).reciprocal()
    base = _powers(rope.theta, dim).reciprocal()
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, dim)
    return base


def frequencies_by_length(rope: RopeConfig, dim: int, lengths: torch.Tensor) -> torch.Tensor:
    """Float32 `[T, dim / 2]`, for int64 `lengths` `[T]`.

    LongRoPE (arXiv 2402.13753): beyond `original` positions other divisors hold. Dynamic NTK:
    theta' = theta * (factor * n / positions - (factor - 1)) ^ (dim / (dim - 2)), n = max(length, positions).
    """
    if rope.kind == "longrope":
        factors = torch.tensor((rope.short_factor, rope.long_factor), device=lengths.device)
        divisors = factors[(lengths > rope.original).long()]
        return (divisors * rope.theta ** _exponents(dim, lengths.device)).reciprocal()
    ratio = rope.factor * lengths.clamp(min=rope.positions) / rope.positions - (rope.factor - 1)
    theta = rope.theta * ratio ** (dim / (dim - 2))  # [T]
    return (theta.unsqueeze(-1) ** _exponents(dim, lengths.device)).reciprocal()


def attention_scale(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1, except for yarn (arXiv 2309.00071, section 3.4) and longrope."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original)) if rope.factor > 1 else 1.0
    if rope.mscale and rope.mscale_all_dim:
        return scaled_attention(rope.factor, rope.mscale) / scaled_attention(rope.factor, rope.mscale_all_dim)
    return scaled_attention(rope.factor, 1.0)


class Rotary:
    """cos and sin for the tokens of a batch. Computed, not looked up: a table would grow with the context."""

    def __init__(self, rope: RopeConfig, dim: int, device: torch.device | str = "cpu") -> None:
        self._rope = rope
        self._turned = rope.turned or dim
        self._still = (dim - self._turned) // 2  # pairs, in the order of `head_order`
        self._scale = attention_scale(rope)
        self._frequencies = inverse_frequencies(rope, self._turned).to(device)

    def __call__(self, positions: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 `[T, dim / 2]` each, for int64 positions `[T]`.

        `lengths`, int64 `[T]`, is needed where RoPE is `by_length`: the length whose frequencies a token gets. With
        the larger of prompt length and position + 1 a token's rotation does not depend on how its prompt was cut into
        chunks.
        """
        frequencies = self._frequencies
        if self._rope.by_length:
            if lengths is None:
                raise ValueError(f"{self._rope.kind} RoPE needs rope_lengths for each token, got None")
            frequencies = frequencies_by_length(self._rope, self._turned, lengths)
        angles = positions.unsqueeze(-1).float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._scale != 1.0:
            cos, sin = cos * self._scale, sin * self._scale
        if self._still:
            cos, sin = F.pad(cos, (0, self._still), value=1.0), F.pad(sin, (0, self._still))
        return cos, sin


class LayerRotations:
    """The cos and sin of a batch in each layer, given its rope; None in a layer without one and behind the last layer.
    Layers of one rope share them."""

    def __init__(self, of_layers: Sequence[RopeConfig | None], dim: int, device: torch.device) -> None:
        self._of_layers = of_layers
        self._rotaries = {rope: Rotary(rope, dim, device) for rope in of_layers if rope is not None}

    def __call__(
        self, positions: torch.Tensor, lengths: torch.Tensor | None
    ) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """As `Rotary` says, by layer."""
        rotations = {rope: rotary(positions, lengths) for rope, rotary in self._rotaries.items()}
        return [*(None if rope is None else rotations[rope] for rope in self._of_layers), None]


def _exponents(dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


def _powers(theta: float, dim: int) -> torch.Tensor:
    powers: torch.Tensor = theta ** _exponents(dim)
    return powers


def _llama3(rope: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / base
    longest = rope.original / rope.low_freq_factor
    shortest = rope.original / rope.high_freq_factor
    smooth = (rope.original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = (1 - smooth) * base / rope.factor + smooth * base
    scaled = torch.where(wavelength > longest, base / rope.factor, base)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), blend, scaled)


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
