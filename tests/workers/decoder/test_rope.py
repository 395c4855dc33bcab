"""Rotary frequencies. That every scaling equals transformers' is tested through the decoder, in test_model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina_workers.decoder.rope import Rotary, inverse_frequencies
from lamina_workers.model_config.rope_config import ROPE_TYPES, RopeConfig


def config(kind: str, **fields: float) -> RopeConfig:
    defaults = {"theta": 1e4, "positions": 64, "original": 64, "factor": 4.0}
    factors = {"short_factor": (1.0,) * 8, "long_factor": (2.0,) * 8} if kind == "longrope" else {}
    return RopeConfig(kind, **{**defaults, **factors, **fields})  # type: ignore[arg-type]


@given(
    kind=st.sampled_from(["default", "dynamic", "linear", "llama3", "yarn"]),
    pairs=st.integers(2, 64),
    theta=st.floats(2, 1e7),
    original=st.integers(8, 4096),
    factor=st.floats(1, 64),
)
def test_scaling_slows_rotation_by_the_factor_at_most(
    kind: str, pairs: int, theta: float, original: int, factor: float
) -> None:
    plain = inverse_frequencies(config("default", theta=theta), 2 * pairs)
    scaled = inverse_frequencies(config(kind, theta=theta, original=original, factor=factor), 2 * pairs)
    assert bool((scaled <= plain * (1 + 1e-5)).all())
    assert bool((scaled >= plain / factor * (1 - 1e-5)).all())


def test_llama3_and_yarn_keep_short_wavelengths_and_stretch_long_ones() -> None:
    plain = inverse_frequencies(config("default"), 128)
    for kind in ("llama3", "yarn"):
        scaled = inverse_frequencies(config(kind), 128)
        torch.testing.assert_close(scaled[0], plain[0])
        torch.testing.assert_close(scaled[-1], plain[-1] / 4)


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_cos_and_sin_are_those_of_the_angle(kind: str) -> None:
    rotary = Rotary(config(kind, attention_factor=1.5), 16)
    positions = torch.tensor([0, 1, 63, 1000])
    cos, sin = rotary(positions, positions + 1)
    assert cos.shape == sin.shape == (4, 8)
    assert cos.dtype == sin.dtype == torch.float32
    radius = 1.5 if kind in ("yarn", "longrope") else 1.0
    torch.testing.assert_close(cos**2 + sin**2, torch.full((4, 8), radius**2))
    torch.testing.assert_close(cos[0], torch.full((8,), radius))


def test_dynamic_depends_on_the_length_beyond_what_it_was_trained_for() -> None:
    rotary = Rotary(config("dynamic"), 16)
    positions = torch.full((4,), 30)
    cos, sin = rotary(positions, torch.tensor([31, 64, 65, 640]))
    assert torch.equal(cos[0], cos[1])
    assert not torch.equal(cos[1], cos[2])
    plain_cos, plain_sin = Rotary(config("default"), 16)(positions[:1], None)
    torch.testing.assert_close(cos[:1], plain_cos)
    # The slowest pair turns 1 / (factor * n / positions - (factor - 1)) as fast: the exponent is made for that.
    torch.testing.assert_close(sin[3, -1].asin() * (4 * 640 / 64 - 3), plain_sin[0, -1].asin())


def test_dynamic_without_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="rope_lengths"):
        Rotary(config("dynamic"), 16)(torch.tensor([1]), None)


@pytest.mark.parametrize(
    ("kind", "context"), [("default", 64), ("llama3", 64), ("linear", 256), ("dynamic", 256), ("yarn", 128)]
)
def test_context_counts_the_factor_where_the_config_does_not(kind: str, context: int) -> None:
    assert config(kind, original=32).context == context
