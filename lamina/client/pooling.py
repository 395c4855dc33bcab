"""From the sum of a prompt's hidden states to its embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from lamina.errors import InvalidRequest, cut
from lamina.messages.engine_request import EngineRequest

Pooling = Literal["last", "mean", "eos"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
"""Of which hidden states, behind the last norm, an embedding is made: that of the last token, the mean of all, or that
of the model's end-of-text token, which is appended where the input does not end with it."""


def check_pooling(value: object) -> Pooling:
    """Raises InvalidRequest unless it is one of `POOLINGS`."""
    for pooling in POOLINGS:
        if value == pooling:
            return pooling
    raise InvalidRequest(f"pooling is {cut(value)}; allowed are {', '.join(POOLINGS)}")


def check_dimensions(value: object) -> int | None:
    """Raises InvalidRequest unless it is None or an integer of 1 or more."""
    if value is None or (type(value) is int and value >= 1):
        return value
    raise InvalidRequest(f"dimensions is {cut(value)}; allowed is an integer of 1 or more, or None")


def embedding(
    request: EngineRequest, pooled: Sequence[float], dimensions: int | None = None, normalize: bool = True
) -> tuple[float, ...]:
    """The embedding of a request that has ended, from the sum of its hidden states: their mean, of that the first
    `dimensions`, and with `normalize` divided by its length. Raises InvalidRequest where it has fewer dimensions."""
    count = request.request.scored_to - (request.request.scored_from or 0)
    if dimensions is not None and dimensions > len(pooled):
        raise InvalidRequest(f"dimensions is {dimensions}; allowed with this model are 1 to {len(pooled)}")
    values = [value / count for value in pooled[:dimensions]]
    length = math.hypot(*values) if normalize else 1.0
    return tuple(value / length for value in values) if length else tuple(values)
