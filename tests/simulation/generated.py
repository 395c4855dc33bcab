"""The scenario of a seed, for the model that the simulated cluster runs."""

from __future__ import annotations

from checksum_model import KV_HEADS, LAYERS
from generator import Shape, drawn
from scenario import Mode, Scenario

SHAPE = Shape(LAYERS, KV_HEADS)


def of_seed(seed: int, mode: Mode | None = None) -> Scenario:
    """As `generator.drawn`."""
    return drawn(seed, SHAPE, mode)
