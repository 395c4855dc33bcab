"""Packed weights in the cost model: bytes, seconds of few and of many tokens, and what has room beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning import BIG, EPYC, H100, SMALL, together

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import FEW_TOKENS, Load, dense_time, kv_projection_time
from lamina.simulator.costs.hardware import Efficiency
from lamina.simulator.costs.packing import FORMATS, Packing, packing
from lamina.simulator.costs.shapes import LayerGroup, ModelShape

TINY = ModelShape(
    name="tiny", hidden=64,
    groups=(
        LayerGroup(
            layers=3, kv_heads=2, projections=1000, kv_projections=200, mlp=5000, kv_elements=64, query_elements=64,
            output_elements=64, score_flops=256, experts=8, top_k=2, expert=700, vectors=10,
        ),
    ),
    embedding=6400, head=6400, tied=False, max_context=512, vectors=64,
)  # fmt: skip
"""18,000 parameters of matrices in its layers, 16,800 of experts, 94 of norms, and twice 6,400."""
CPU = replace(EPYC, flops=1e12, flops_8bit=4e12, bandwidth=1e11, efficiency=Efficiency())


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4", 4.5),  # 4, and a float16 scale for 32: 16 / 32
        ("q4_1", 5.0),  # a float16 minimum besides
        ("q5_0", 5.5),
        ("q5_1", 6.0),
        ("q4_k", 4.625),  # 4, a byte each of scale and minimum for 32 (0.5), two float16 for 256 (0.125)
        ("q5_k", 5.625),
        ("q6_k", 6.625),  # 6, a byte of scale for 16 (0.5), and 64 bytes in 256 x 16 (0.125)
        ("Q8_0", 8.5),
    ],
)
def test_bytes_of_a_weight(name: str, bits: float) -> None:
    """By hand: the codes' bits, and those of the scales and minima that each weight has its share of."""
    assert packing(name).nbytes * 8 == bits


def test_a_mix_is_given_by_its_mean_bytes() -> None:
    assert packing("0.61") == Packing("packed", 0.61)


def test_matrices_and_experts_are_packed_and_norms_are_not() -> None:
    """Stored: (18,000 + 16,800 + 2 x 6,400) weights of 0.5625 bytes, 94 of 2: 26,775 + 188 = 26,963 bytes. One token
    reads 18,000, 3 x 2 experts of 700 and the head's 6,400: 28,600 x 0.5625 = 16,087.5, and 188."""
    packed = TINY.with_weights("q4_0")
    assert packed.weight_bytes == pytest.approx(26_963)
    assert packed.weights_read(1) == pytest.approx(16_275.5)
    assert packed.kv_projection_bytes == pytest.approx(3 * 200 * 0.5625)
    assert packed.parameters == TINY.parameters
    assert replace(packed, tied=True).weight_bytes == pytest.approx(26_963 - 6_400 * 0.5625)  # one table for both


def test_int4_has_tables_of_int8() -> None:
    """34,800 x 0.5625 + 12,800 x 1.0625 + 188 = 33,363 bytes; a token reads 22,200 x 0.5625 + 6,400 x 1.0625 + 188 =
    19,475.5."""
    packed = TINY.with_weights("int4")
    assert packed.weight_bytes == pytest.approx(33_363)
    assert packed.weights_read(1) == pytest.approx(19_475.5)


def test_floats_are_chosen_too() -> None:
    assert TINY.with_weights("float32").weight_bytes == 2 * TINY.weight_bytes
    assert TINY.with_weights("int4").with_weights("bfloat16") == TINY
    assert TINY.with_weights("auto") is TINY
    assert BIG.with_weights("bfloat16").weight_bytes == BIG.weight_bytes == 137.5e9  # as published
    assert BIG.with_weights("float32").weight_bytes == 4 * BIG.parameters


def test_few_tokens_read_packed_bytes_and_multiply_in_8_bits() -> None:
    """llama-3-70b in Q4_0, one token: 69.5 G weights of 0.5625 bytes over 100 GB/s are 391 ms, and the FLOPs at 4 T/s
    are 35 ms. With 32 tokens FLOPs bind: 32 x 139 G / 4 T/s = 1.11 s."""
    packed = BIG.with_weights("q4_0")
    assert dense_time(packed, CPU, 1, Load(1, 0)) == pytest.approx(0.391, rel=0.01)
    assert dense_time(packed, CPU, 1, Load(1, 0)) == pytest.approx(packed.weights_read(1) / 1e11, rel=1e-3)
    assert dense_time(packed, CPU, 1, Load(32, 0)) == pytest.approx(32 * 139e9 / 4e12, rel=0.01)


def test_a_cpu_multiplies_many_tokens_in_8_bits_unless_it_unpacks() -> None:
    """512 tokens: 512 x 139 G FLOPs at 4 T/s are 17.8 s."""
    assert dense_time(BIG.with_weights("q4_0"), CPU, 1, Load(512, 0)) == pytest.approx(512 * 139e9 / 4e12, rel=0.01)


def test_many_tokens_are_multiplied_in_16_bits_after_the_weights_are_unpacked() -> None:
    """33 tokens: 33 x 139 G FLOPs at 1 T/s are 4.59 s, and 69.5 G weights unpacked at 100 G/s 0.695 s. A prompt of 512
    tokens of which one needs logits unpacks the layers alone, without the head's 1.05 G."""
    packed, unpacking = BIG.with_weights("q4_0"), replace(CPU, unpack=1e11)
    assert dense_time(packed, unpacking, 1, Load(FEW_TOKENS + 1, 0)) == pytest.approx(4.59 + 0.695, rel=0.01)
    assert dense_time(packed, unpacking, 1, Load(32, 0)) == dense_time(packed, CPU, 1, Load(32, 0))
    prompt = Load(1, 0, 512)
    products = packed.dense_flops(513, 1) / 1e12
    assert dense_time(packed, unpacking, 1, prompt) - products == pytest.approx(packed.matrices / 1e11)
    assert packed.matrices / 1e11 == pytest.approx(0.684, rel=0.01)
    assert dense_time(BIG, unpacking, 1, prompt) == dense_time(BIG, CPU, 1, prompt)  # nothing is packed


def test_a_gpu_multiplies_in_16_bits_and_reads_packed_bytes() -> None:
    packed = BIG.with_weights("int8")
    assert dense_time(packed, H100, 1, Load(1, 0)) == pytest.approx(packed.weights_read(1) / H100.bandwidth, rel=1e-3)
    assert dense_time(packed, H100, 1, Load(1024, 0)) == pytest.approx(BIG.dense_flops(1024) / H100.flops, rel=1e-3)


@pytest.mark.parametrize("name", [*FORMATS, "float32", "0.4"])
@pytest.mark.parametrize("tokens", [1, 32, 33, 4096])
def test_projections_take_no_longer_than_the_whole(name: str, tokens: int) -> None:
    shape, load = SMALL.with_weights(name), Load(tokens, 0)
    assert 0 <= kv_projection_time(shape, CPU, 1, load) < dense_time(shape, CPU, 1, load)


def test_packed_weights_leave_room() -> None:
    """llama-3-70b in Q4_0 is 39.7 GB: one H100 (72 GB of 80) holds it, and (72 - 39.69) / 327,680 = 98,600 tokens."""
    alone = together(1)
    with pytest.raises(InvalidRequest, match=r"137\.5 GB"):
        _ = alone.capacity
    packed = replace(alone, model=BIG.with_weights("q4_0"))
    assert packed.capacity.tokens == pytest.approx(98_600, rel=0.001)


def test_an_expert_is_unpacked_where_it_has_many_tokens() -> None:
    """Of 8 experts each token uses 2: 120 tokens are 30 for each, 160 are 40. All 3 x 8 x 700 are used by then, and
    none needs logits."""
    packed = TINY.with_weights("q4_0")
    assert packed.unpacked(120, 0, FEW_TOKENS) == 18_000
    assert packed.unpacked(160, 0, FEW_TOKENS) == pytest.approx(18_000 + 16_800)
    assert packed.unpacked(160, 33, FEW_TOKENS) == pytest.approx(18_000 + 16_800 + 6_400)
    assert packed.unpacked(32, 32, FEW_TOKENS) == TINY.unpacked(160, 160, FEW_TOKENS) == 0
