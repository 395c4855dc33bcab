"""Whether a worker can keep layers as an engine describes them: each number is bounded before anything is made."""

from __future__ import annotations

from collections.abc import Sequence

from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import LATENT, STATES, LayerSpec
from lamina_protocols.messages.pools import pool_shape

_MAX_LAYERS, _MAX_HEADS, _MAX_WIDTH = 1 << 12, 1 << 10, 1 << 14  # a worker takes time and memory for each of them
_MAX_POOLS = 64  # shapes of layers: each has an arena and tables of its own
_MAX_CONV = 64  # wide
_MAX_CHOSEN = 1 << 16  # blocks of an index, and keys of a block


def check_layers(layers: Sequence[LayerSpec]) -> None:
    """Raise ProtocolError, which names what is wrong and what is allowed."""
    if not 0 < len(layers) <= _MAX_LAYERS:
        raise ProtocolError(f"{len(layers)} layers, allowed: 1 to {_MAX_LAYERS}")
    for spec in layers:
        _check_layer(spec)
    shapes = len({pool_shape(spec) for spec in layers})
    if shapes > _MAX_POOLS:
        raise ProtocolError(f"layers of {shapes} shapes, allowed: up to {_MAX_POOLS}, each with a pool of pages")


def _check_layer(spec: LayerSpec) -> None:
    """Raise ProtocolError for a layer of which a worker could not even reckon what it takes."""
    wide = 0 < spec.d_k <= _MAX_WIDTH and 0 < spec.d_v <= (spec.d_k if spec.kind == LATENT else _MAX_WIDTH)
    if not wide or not 0 < spec.kv_heads <= spec.heads <= _MAX_HEADS or spec.kv_layer >= _MAX_LAYERS:
        raise ProtocolError(
            f"layer {spec.kv_layer} of {spec.heads} heads, {spec.kv_heads} of K and V, {spec.d_k} and "
            f"{spec.d_v} wide; allowed: below {_MAX_LAYERS}, up to {_MAX_HEADS} heads, up to {_MAX_WIDTH} wide"
        )
    if spec.key_heads > spec.kv_heads or spec.conv > _MAX_CONV or len(spec.decays) not in (0, spec.kv_heads):
        raise ProtocolError(
            f"layer {spec.kv_layer} of {spec.key_heads} key heads, a convolution {spec.conv} wide and "
            f"{len(spec.decays)} decays; allowed: up to {spec.kv_heads} heads, up to {_MAX_CONV} wide, a decay a head"
        )
    state, attention = (spec.key_heads, spec.conv, len(spec.decays)), (spec.window, spec.soft_cap, spec.index)
    if any(part is not None for part in attention) if spec.kind in STATES else any(state):
        raise ProtocolError(
            f"layer {spec.kv_layer} of kind {spec.kind!r:.80} has what only another kind has; allowed: a window, a "
            "soft cap and an index of attention; key heads, a convolution and decays of a state"
        )
    if (index := spec.index) is None:
        return
    sizes = (index.width, _MAX_WIDTH), (index.heads, _MAX_HEADS), (index.block, _MAX_CHOSEN), (index.top, _MAX_CHOSEN)
    if not all(0 < size <= most for size, most in sizes) or index.local > index.top:
        raise ProtocolError(
            f"layer {spec.kv_layer} with {index}; allowed: up to {_MAX_WIDTH} wide, {_MAX_HEADS} heads, {_MAX_CHOSEN} "
            "blocks of as many keys"
        )
    if spec.window is not None:
        raise ProtocolError(
            f"layer {spec.kv_layer} has an index and a window of {spec.window}; allowed: attention that sees all keys"
        )
