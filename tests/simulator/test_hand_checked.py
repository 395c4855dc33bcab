"""Cells worked out by hand, one a quantity: what each should be stands in the docstring, and is not computed here.

Llama-3.1-8B: 32 layers; a layer's projections are 2 x 4096^2 + 2 x 4096 x 1024 = 41,943,040 parameters, its MLP
3 x 4096 x 14336 = 176,160,768; the head is 128256 x 4096 = 525,336,576; 65 norms of 4096 are 266,240.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from lamina.simulator.costs.cost_model import Load
from lamina.simulator.costs.hardware import Efficiency, load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, price

LLAMA, H100 = model("llama-3.1-8b"), load().device("h100")
ALONE = Colocated(model=LLAMA, device=H100)


def test_bytes_of_weights_that_a_step_reads() -> None:
    """(32 x 218,103,808 + 525,336,576 + 266,240) x 2 bytes; the input table is not read."""
    assert LLAMA.weights_read(16) == 15_009_849_344


def test_bytes_of_weights_of_eight_bits() -> None:
    """32 x 218,103,808 and the norms have 1 byte; the head keeps 2: 1,050,673,152. In memory the input table comes on
    top, with 2 as well."""
    fp8 = replace(LLAMA, element=1.0)
    assert fp8.weights_read(16) == 8_030_261_248
    assert fp8.weight_bytes == 9_080_934_400


def test_tokens_that_fit_beside_the_weights() -> None:
    """0.9 x 80 GB less 16,060,522,496 bytes of weights leave 55,939,477,504; a token takes 2 x 32 x 8 x 128 x 2 =
    131,072: 426,784 tokens, or 104 sequences of 4096."""
    assert ALONE.kv_tokens == 426_784
    assert ALONE.kv_tokens // 4096 == 104


def test_time_per_token_at_the_bare_roofline() -> None:
    """16 sequences of 2048 tokens: 15,009,849,344 bytes of weights and 4 x 16 x 4096 of activations over 3.35 TB/s are
    4.48063 ms; 16 x 2048 x 131,072 bytes of KV are 1.28208 ms."""
    assert ALONE.step(Load(16, 2048)).seconds == pytest.approx(5.76271e-3, rel=1e-5)


def test_dollars_per_million_tokens() -> None:
    """16 tokens in 5.76271 ms are 2776.47 a second, or 9.99529 million an hour, for $11.06."""
    dollars = price(ALONE) / 3600 / (16 / ALONE.step(Load(16, 2048)).seconds) * 1e6
    assert dollars == pytest.approx(1.10652, rel=1e-5)


def test_time_per_token_by_an_engine_s_efficiency() -> None:
    """Two H100, 64 sequences of 4096 tokens. Weights: 15,010,897,920 bytes / (2 x 3.35 TB/s x 0.95) = 2.35835 ms (their
    FLOPs, 2 x 7,504,658,432 x 64 / (2 x 989 T x 0.58), take 0.837 ms). Beside: 0.5 ms + 32 layers x 68 us + 64
    sequences x 38 us = 5.108 ms. 64 all-reduces of 524,288 bytes: 64 x (2 us + 1.16508 us) = 0.20257 ms. KV:
    34,359,738,368 bytes / (2 x 3.35 TB/s x 0.74) = 6.93016 ms."""
    reached = Efficiency(
        dense=((1.0, 0.95),),
        attention=((1.0, 0.74),),
        compute=0.58,
        step_overhead=5e-4,
        layer_overhead=6.8e-5,
        row_overhead=3.8e-5,
        collective_latency=2e-6,
    )
    system = replace(ALONE, device=replace(H100, efficiency=reached), tensor_parallel=2)
    assert system.step(Load(64, 4096)).seconds == pytest.approx(14.59908e-3, rel=1e-5)


def test_a_prompt_is_bound_by_the_flops_that_kernels_reach() -> None:
    """8192 tokens: 2 x 6,979,321,856 x 8192 FLOPs and one token's logits, 1,050,673,152, at 989 T x 0.5: 231.2524 ms.
    Their 8192 x 8193 / 2 pairs x 2 x 2 x 4096 x 32 layers = 17.59433 TFLOP: 35.5800 ms."""
    device = replace(H100, efficiency=Efficiency(compute=0.5))
    seconds = replace(ALONE, device=device).step(Load(0, 0, 8192, 8192 * 8193 / 2, 8192)).seconds
    assert seconds == pytest.approx(266.832e-3, rel=1e-4)


def test_experts_read_and_computed() -> None:
    """Qwen3-30B-A3B, 16 tokens: 128 (1 - (1 - 8/128)^16) = 82.4225 of 128 experts of 3 x 2048 x 768 parameters in 48
    layers are 37.3361 GB; 16 x 8 of them in FLOPs. Experts that reach half of the bandwidth take 22.2902 ms."""
    shape = model("qwen3-30b-a3b")
    assert shape.experts_read(16) == pytest.approx(37.3361e9, rel=1e-5)
    assert shape.expert_flops(16) == 2 * 16 * 8 * 48 * 4_718_592
    whole, half = (
        Colocated(model=shape, device=replace(H100, efficiency=Efficiency(experts=share))).step(Load(16, 1)).seconds
        for share in (1.0, 0.5)
    )
    assert half - whole == pytest.approx(22.2902e-3 / 2, rel=1e-4)
