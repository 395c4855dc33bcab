"""Which layers share a pool, and what of the memory a pool gets."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import HolderConfig, Index, LayerSpec
from lamina_protocols.messages.pools import pools

FULL = LayerSpec(kv_layer=0, heads=4, kv_heads=2, d_k=32, d_v=32, scale=1.0)
NEAR = LayerSpec(kv_layer=0, heads=8, kv_heads=4, d_k=16, d_v=16, scale=1.0, window=7)
STATE = LayerSpec(kv_layer=0, heads=4, kv_heads=4, d_k=16, d_v=8, scale=1.0, kind="mamba2", key_heads=1, conv=4)


def config(*layers: LayerSpec, memory: int = 1 << 20, sources: dict[int, int] | None = None) -> HolderConfig:
    own = (dataclasses.replace(x, kv_layer=(sources or {}).get(n, n)) for n, x in enumerate(layers))
    return HolderConfig(tuple(own), 16, "float32", memory, 100)


def test_one_shape_is_one_pool_with_all_the_memory() -> None:
    whole = config(FULL, dataclasses.replace(FULL, window=9, soft_cap=3.0), FULL, sources={2: 0})
    (pool,) = pools(whole)
    assert pool.layers == (0, 1, 2)
    assert pool.config == whole


def test_layers_of_another_shape_have_a_pool_of_their_own() -> None:
    near, full = pools(config(NEAR, NEAR, FULL, NEAR, FULL, NEAR, sources={3: 1, 5: 5}))
    assert (near.layers, full.layers) == ((0, 1, 3, 5), (2, 4))
    assert [spec.kv_layer for spec in near.config.layers] == [0, 1, 1, 3]
    assert [spec.kv_layer for spec in full.config.layers] == [0, 1]
    # KV of three layers of 4 * 32 numbers a token, and of two of 2 * 64
    assert (near.config.kv_memory, full.config.kv_memory) == ((1 << 20) * 3 // 5, (1 << 20) - (1 << 20) * 3 // 5)


@pytest.mark.parametrize(
    "change",
    [
        *({"kind": "latent"}, {"heads": 8}, {"kv_heads": 4}, {"d_k": 16}, {"d_v": 64}, {"key_heads": 1}, {"conv": 2}),
        {"index": Index(16, 1, 16, 4)},
    ],
)
def test_whatever_changes_what_is_kept_makes_another_pool(change: dict[str, Any]) -> None:
    assert len(pools(config(FULL, dataclasses.replace(FULL, **change)))) == 2


def test_a_state_takes_two_records_a_sequence_whatever_its_length() -> None:
    full, state = pools(config(FULL, STATE, STATE, memory=10**9))
    of_full, of_states = 2 * 64 * 4 * 100, 2 * 4 * 2 * 4 * (16 * 8 + 3 * 40)
    assert full.config.kv_memory == 10**9 * of_full // (of_full + of_states)
    assert full.config.kv_memory + state.config.kv_memory == 10**9


def test_a_latent_has_no_values() -> None:
    full, latent = pools(config(FULL, dataclasses.replace(FULL, kind="latent")))
    assert full.config.kv_memory == pytest.approx(2 * latent.config.kv_memory, abs=2)


def test_index_keys_are_kept_too() -> None:
    full, indexed, other = pools(
        config(FULL, *(dataclasses.replace(FULL, index=Index(32, 1, 16, top)) for top in (4, 4, 5)), memory=64 * 800)
    )
    assert (full.layers, indexed.layers, other.layers) == ((0,), (1, 2), (3,))
    # 64 numbers a token and head, twice 96, and 96
    ends = [64 * 800 * end // 352 for end in (0, 64, 256, 352)]
    memory = [pool.config.kv_memory for pool in (full, indexed, other)]
    assert memory == [end - begin for begin, end in itertools.pairwise(ends)]


@given(st.lists(st.sampled_from([FULL, NEAR, STATE]), min_size=1, max_size=9), st.integers(0, 10**15))
def test_every_layer_is_in_one_pool_and_no_byte_is_lost(layers: list[LayerSpec], memory: int) -> None:
    whole = config(*layers, memory=memory)
    found = pools(whole)
    assert sorted(number for pool in found for number in pool.layers) == list(range(len(layers)))
    assert [pool.layers[0] for pool in found] == sorted(pool.layers[0] for pool in found)
    assert sum(pool.config.kv_memory for pool in found) == memory
    for pool in found:
        kept = [dataclasses.replace(spec, kv_layer=0) for spec in pool.config.layers]
        assert kept == [dataclasses.replace(whole.layers[number], kv_layer=0) for number in pool.layers]


@pytest.mark.parametrize("source", [1, 7])
def test_kv_of_a_layer_of_another_shape_cannot_be_read(source: int) -> None:
    with pytest.raises(ProtocolError, match=f"layer 0 reads the KV of layer {source}; allowed"):
        pools(config(FULL, NEAR, sources={0: source}))
