"""How large a frame may be, and how much of a batch it carries, so that work is cut to it where it is planned.

An announcement has operations and rows, its answer what each row has read; a command to a model worker has the rows of
all holders. Numbers are counted with their longest form, nine bytes. What a layer's messages carry follows from the
tensors of `messages`, each in its longest dtype.
"""

from __future__ import annotations

from collections.abc import Iterable

from lamina_protocols.messages.layers import STATES, LayerSpec

MAX_HEADER = 1 << 19  # reading the worst that fits takes some 25 ms
MAX_PAYLOAD = 1 << 30

MAX_OPERATIONS = MAX_HEADER // 512
"""How many operations go in one announcement, beside as many that the plan of its rows may add."""

MAX_COMMANDED_TOKENS = MAX_HEADER // 32
"""How many tokens a command to a model worker may have: their ids, and what is scored of them, stand in its header."""

_HEADS = 1 << 12  # bytes that a payload has besides: padding, and rounding


def most_rows(layers: Iterable[LayerSpec]) -> int:
    """How many rows a batch has at most, those of all holders together: a row names the KV heads of its part."""
    return MAX_HEADER // (128 + 4 * max(spec.kv_heads for spec in layers))


def most_tokens(layers: Iterable[LayerSpec], itemsize: int, hidden: int) -> int:
    """How many tokens of all heads a layer's messages may have, and the contexts between two replicas. itemsize: bytes
    of a number of the model, of which `hidden` is the width."""
    return (MAX_PAYLOAD - _HEADS) // max(_token_bytes(spec, itemsize, hidden) for spec in layers)


def _token_bytes(spec: LayerSpec, itemsize: int, hidden: int) -> int:
    out = spec.heads * spec.d_v * itemsize
    if spec.kind in STATES:  # gates are float32, d_k + 1 a head at most
        question = 2 * spec.key_heads * spec.d_k * itemsize + out + 4 * spec.heads * (spec.d_k + 1)
    else:
        keys = spec.kv_heads * (spec.key_width + spec.own_v) * itemsize
        question = spec.heads * spec.query_width * itemsize + keys
    return max(question, out + 4 * spec.heads, out + hidden * itemsize)
