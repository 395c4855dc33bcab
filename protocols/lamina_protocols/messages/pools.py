"""The pools of a holder: layers that keep the same shape share an arena of pages. Importing this loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import STATES, BlockConfig, HolderConfig, LayerSpec

_RECORDS = 2  # of a sequence, in a pool of states: after its last batch, and before it
_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}


class Pool(NamedTuple):
    """`layers`: the numbers of its layers in the whole, ascending. `config`: these layers alone, whose `kv_layer` is a
    number within the pool, with the pool's share of the memory."""

    layers: tuple[int, ...]
    config: HolderConfig


@lru_cache(maxsize=256)
def pools(config: HolderConfig) -> tuple[Pool, ...]:
    """The pools of a holder, in the order in which their shapes come first. Where there are several, each gets the part
    of the memory that it would take for sequences of `sequence_tokens` tokens. Where an engine owns its blocks, layers
    of different block tables are in different pools.

    Raises ProtocolError for a layer that reads the KV of a layer of another shape, or of none."""
    members: dict[Hashable, list[int]] = {}
    tables = config.tables if isinstance(config, BlockConfig) else ()
    for number, spec in enumerate(config.layers):
        shape = pool_shape(spec)
        members.setdefault((shape, tables[number]) if tables else shape, []).append(number)
    numbers = list(members.values())
    layers = [_renumbered(config, of_pool) for of_pool in numbers]
    if isinstance(config, BlockConfig):
        return tuple(
            Pool(
                tuple(of_pool),
                dataclasses.replace(config, layers=specs, tables=tuple(config.tables[number] for number in of_pool)),
            )
            for of_pool, specs in zip(numbers, layers, strict=True)
        )
    if len(numbers) == 1:
        return (Pool(tuple(numbers[0]), dataclasses.replace(config, layers=layers[0])),)
    sums = list(accumulate((_sequence_bytes(config, specs) for specs in layers), initial=0))
    # Rounded at the borders between pools, so that nothing of the memory is left over.
    borders = [config.kv_memory * sum_ // sums[-1] for sum_ in sums]
    return tuple(
        Pool(tuple(of_pool), dataclasses.replace(config, layers=specs, kv_memory=end - begin))
        for of_pool, specs, (begin, end) in zip(numbers, layers, pairwise(borders), strict=True)
    )


def pool_shape(spec: LayerSpec) -> Hashable:
    """Equal for layers that share a pool, and for no others."""
    return spec.kind, spec.kv_heads, spec.heads, spec.d_k, spec.d_v, spec.index, spec.key_heads, spec.conv


def _renumbered(config: HolderConfig, members: list[int]) -> tuple[LayerSpec, ...]:
    within = {number: index for index, number in enumerate(members)}
    for number in members:
        source = config.layers[number].kv_layer
        if source not in within:
            raise ProtocolError(
                f"layer {number} reads the KV of layer {source}; allowed: a layer of the same shape and block table"
            )
    return tuple(
        dataclasses.replace(config.layers[number], kv_layer=within[config.layers[number].kv_layer])
        for number in members
    )


def _sequence_bytes(config: HolderConfig, layers: tuple[LayerSpec, ...]) -> int:
    """Bytes that a usual sequence takes in a pool of these layers. A dtype that KV is not kept in is refused where
    pages are laid out."""
    spec = layers[0]
    stored = len({layer.kv_layer for layer in layers})
    if spec.kind in STATES:
        inputs = max(spec.conv - 1, 0) * (2 * spec.d_k + spec.d_v)
        return stored * spec.kv_heads * _RECORDS * 4 * (spec.d_k * spec.d_v + inputs)
    numbers = spec.key_width + spec.own_v
    size = _NUMBER_BYTES.get(config.dtype, 1)
    scales = 8 if size == 1 else 0
    return stored * spec.kv_heads * config.sequence_tokens * (numbers * size + scales)
