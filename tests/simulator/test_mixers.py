"""Layers of every kind in the cost model: exact numbers of published models, and what depends on context."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import (
    Load,
    attention_time,
    exchange_time,
    prefill_state_time,
    state_share,
    state_time,
)
from lamina.simulator.costs.hardware import load
from lamina.simulator.costs.model_configs import PRESETS, model
from lamina.simulator.costs.offloaded import UNBOUNDED
from lamina.simulator.costs.shapes import StateShape
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded
from lamina.simulator.event_loop.simulate import simulate
from lamina.simulator.traces.arrivals import Arrival, Trace

HARDWARE = load()
H100, H20, EPYC = (HARDWARE.device(name) for name in ("h100", "h20", "epyc-genoa"))
FHBN = HARDWARE.link("fhbn-400g")

# Published parameters, ours; bytes of KV a token in 16 bits; bytes of one sequence's states.
EXACT = {
    "llama-33b": (32.5e9, 32_528_943_616, 1_597_440, 0),
    "llama-65b": (65.2e9, 65_285_660_672, 2_621_440, 0),
    "llama-3-70b": (70.6e9, 70_553_706_496, 327_680, 0),
    "llama-2-7b": (6.74e9, 6_738_415_616, 32 * 2 * 32 * 128 * 2, 0),
    "llama-2-13b": (13.02e9, 13_015_864_320, 40 * 2 * 40 * 128 * 2, 0),
    "llama-2-70b": (68.98e9, 68_976_648_192, 80 * 2 * 8 * 128 * 2, 0),
    "llama-3-8b": (8.03e9, 8_030_261_248, 32 * 2 * 8 * 128 * 2, 0),
    "llama-3.1-8b": (8.03e9, 8_030_261_248, 32 * 2 * 8 * 128 * 2, 0),
    "llama-3.1-70b": (70.6e9, 70_553_706_496, 80 * 2 * 8 * 128 * 2, 0),
    "llama-3.1-405b": (406e9, 405_853_388_800, 126 * 2 * 8 * 128 * 2, 0),
    "llama-3.2-1b": (1.24e9, 1_235_814_400, 16 * 2 * 8 * 64 * 2, 0),
    "llama-3.2-3b": (3.21e9, 3_212_749_824, 28 * 2 * 8 * 128 * 2, 0),
    "mistral-7b": (7.24e9, 7_241_732_096, 32 * 2 * 8 * 128 * 2, 0),
    "mistral-7b-v0.3": (7.25e9, 7_248_023_552, 32 * 2 * 8 * 128 * 2, 0),
    "mixtral-8x7b": (46.7e9, 46_702_792_704, 32 * 2 * 8 * 128 * 2, 0),
    "mixtral-8x22b": (141e9, 140_620_634_112, 56 * 2 * 8 * 128 * 2, 0),
    "qwen2.5-7b": (7.62e9, 7_615_616_512, 28 * 2 * 4 * 128 * 2, 0),
    "qwen2.5-32b": (32.8e9, 32_763_876_352, 64 * 2 * 8 * 128 * 2, 0),
    "qwen2.5-72b": (72.7e9, 72_706_203_648, 80 * 2 * 8 * 128 * 2, 0),
    "qwen3-8b": (8.19e9, 8_190_735_360, 36 * 2 * 8 * 128 * 2, 0),
    "qwen3-32b": (32.8e9, 32_762_123_264, 64 * 2 * 8 * 128 * 2, 0),
    "qwen3-30b-a3b": (30.5e9, 30_532_122_624, 48 * 2 * 4 * 128 * 2, 0),
    "qwen3-235b-a22b": (235e9, 235_093_634_560, 94 * 2 * 4 * 128 * 2, 0),
    "gemma-2-9b": (9.24e9, 9_241_705_984, 42 * 2 * 8 * 256 * 2, 0),
    "gemma-2-27b": (27.2e9, 27_227_128_320, 46 * 2 * 16 * 128 * 2, 0),
    "smollm2-135m": (134.5e6, 134_515_008, 30 * 2 * 3 * 64 * 2, 0),
    "smollm2-360m": (362e6, 361_821_120, 32 * 2 * 5 * 64 * 2, 0),
    "smollm2-1.7b": (1.71e9, 1_711_376_384, 24 * 2 * 32 * 64 * 2, 0),
    "deepseek-v2-lite": (15.7e9, 15_706_484_224, 27 * 576 * 2, 0),
    "deepseek-v2": (236e9, 235_741_434_880, 60 * 576 * 2, 0),
    "deepseek-v3": (671e9, 671_026_404_352, 70_272, 0),
    "minimax-text-01": (456e9, 456_089_655_296, 10 * 2 * 8 * 128 * 2, 70 * 64 * 128 * 128 * 4),
    "qwen3-next-80b-a3b": (80e9, 79_674_391_296, 12 * 2 * 2 * 256 * 2, 36 * 32 * (128 * 128 + 3 * 384) * 4),
    "qwen3.5-27b": (27e9, 26_895_998_464, 16 * 2 * 4 * 256 * 2, 48 * 48 * (128 * 128 + 3 * 384) * 4),
    "qwen3.5-35b-a3b": (35e9, 34_660_610_688, 10 * 2 * 2 * 256 * 2, 30 * 32 * (128 * 128 + 3 * 384) * 4),
    "qwen3.5-397b-a17b": (397e9, 396_346_350_336, 15 * 2 * 2 * 256 * 2, 45 * 64 * (128 * 128 + 3 * 384) * 4),
    "nemotron-h-8b": (8.1e9, 8_100_852_736, 4 * 2 * 8 * 128 * 2, 24 * 128 * (128 * 64 + 3 * 320) * 4),
    "nemotron-3-nano-30b-a3b": (31.6e9, 31_577_937_344, 6 * 2 * 2 * 128 * 2, 23 * 64 * (128 * 64 + 3 * 320) * 4),
    "granite-4.0-h-micro": (3.2e9, 3_191_396_096, 4 * 2 * 8 * 64 * 2, 36 * 64 * (128 * 64 + 3 * 320) * 4),
    "granite-4.0-h-small": (32.2e9, 32_207_337_984, 4 * 2 * 8 * 128 * 2, 36 * 128 * (128 * 64 + 3 * 320) * 4),
    "falcon-h1-7b": (7.59e9, 7_585_513_568, 44 * 2 * 2 * 128 * 2, 44 * 24 * (256 * 128 + 3 * 640) * 4),
    "falcon-h1-34b": (33.6e9, 33_642_221_312, 72 * 2 * 4 * 128 * 2, 72 * 32 * (256 * 128 + 3 * 640) * 4),
    "kimi-linear-48b-a3b": (49.1e9, 49_122_675_072, 7 * 576 * 2, 20 * 32 * (128 * 128 + 3 * 384) * 4),
    "minicpm3-4b": (4.07e9, 4_073_875_968, 62 * 288 * 2, 0),
    "deepseek-v3.2": (672e9, 671_877_929_216, 61 * (576 + 128) * 2, 0),
    "glm-5": (744e9, 743_911_199_232, 78 * (576 + 128) * 2, 0),
    "minimax-m3": (428e9, 426_174_565_632, (60 * 2 * 4 * 128 + 57 * 128) * 2, 0),
}


@pytest.mark.parametrize("name", PRESETS)
def test_exact_numbers_of_published_models(name: str) -> None:
    published, parameters, kv, states = EXACT[name]
    shape = model(name)
    assert shape.parameters == parameters == pytest.approx(published, rel=0.02)
    assert (shape.kv_bytes_per_token(), shape.state_bytes) == (kv, states)
    assert shape.state_bytes_held == 2 * states


def test_all_reduces_follow_what_a_layer_has() -> None:
    assert model("llama-3-70b").all_reduces == 2 * 80
    assert model("nemotron-h-8b").all_reduces == 52  # a layer is a mixer or an MLP
    assert model("falcon-h1-7b").all_reduces == 2 * 44  # both mixers add to one sum


def test_a_state_is_read_and_written_once_a_token() -> None:
    shape = model("qwen3-next-80b-a3b")
    seconds = state_time(shape, H20, Load(20, 4096))
    assert seconds == pytest.approx(20 * 2 * shape.state_bytes / H20.bandwidth)
    assert state_time(shape, H20, Load(20, 4096), 0.25) == pytest.approx(seconds / 4)
    assert state_time(shape, H20, Load(0, 0, 8, 8, 8)) == state_time(model("llama-3-70b"), H20, Load(9, 9)) == 0


def test_a_state_in_decode_and_in_chunks() -> None:
    state = StateShape("gated_delta", 4, 16, 8, 2, 4)
    assert state.channels == 2 * 2 * 16 + 4 * 8
    assert state.flops == 7 * 4 * 16 * 8 + 2 * 4 * 96
    assert state.gate_bytes == 4 * 4 * 2
    assert StateShape("kda", 4, 16, 8, 4).gate_bytes == 4 * 4 * 17
    lightning = StateShape("lightning", 4, 16, 8, 4)
    assert (lightning.gate_bytes, lightning.nbytes) == (0, 4 * 4 * 16 * 8)
    assert lightning.prompt_flops == 4 * (2 * 64 * 16 + 2 * 64 * 8 + 4 * 16 * 8)
    assert state.prompt_flops > lightning.prompt_flops


def test_prompts_advance_states_in_chunks_and_write_them_once() -> None:
    shape = model("qwen3-next-80b-a3b")
    long, short = Load(0, 0, 4096, 4096**2 / 2, 4096, prompts=1), Load(0, 0, 64, 64, 64, prompts=64)
    assert prefill_state_time(shape, H100, 1, long) == pytest.approx(4096 * shape.state_prompt_flops / H100.flops)
    assert prefill_state_time(shape, H100, 2, short) == pytest.approx(64 * 2 * shape.state_bytes / H100.bandwidth / 2)
    # Less than the attention that it stands in for, from some length on.
    assert shape.state_prompt_flops < 36 * shape.prefill_flops(4096) / 12


def test_latents_bound_a_cpu_by_its_compute_and_learned_choices_read_a_part() -> None:
    latent, load = model("deepseek-v3"), Load(16, 8192)
    bytes_read, flops = latent.kv_bytes_read(8192), latent.attention_flops(8192)
    assert flops / bytes_read == pytest.approx(128 * 2 * (512 + 576) / 1152)  # 242 FLOPs a byte
    assert attention_time(latent, EPYC, load) == pytest.approx(16 * flops / EPYC.flops)
    assert flops / EPYC.flops > 5 * bytes_read / EPYC.bandwidth
    chosen = model("deepseek-v3.2")
    assert chosen.kv_bytes_read(65536) == 61 * 2 * (2048 * 576 + 65536 * 128)
    assert chosen.kv_bytes_read(1000) == 1000 * chosen.kv_bytes_per_token()
    assert chosen.attention_flops(65536) == 61 * (2048 * 2 * 128 * 1088 + 65536 * 2 * 64 * 128)
    blocks = model("minimax-m3")
    assert blocks.kv_bytes_read(1 << 20) == 2 * (3 * 1024 * (1 << 20) + 57 * (16 * 128 * 1024 + 128 * (1 << 20)))


def test_a_choice_and_the_attention_to_it_have_each_its_bound() -> None:
    shape, load = model("deepseek-v3.2"), Load(4, 100_000)
    (chosen, scored), (kept, flops) = shape.attention_work(100_000)
    bound = max(chosen / H20.bandwidth, scored / H20.flops) + max(kept / H20.bandwidth, flops / H20.flops)
    assert attention_time(shape, H20, load) == pytest.approx(4 * bound)


def test_what_crosses_for_a_state_does_not_depend_on_context() -> None:
    shape = model("qwen3-next-80b-a3b")
    a_token = 36 * ((2 * 16 * 128 + 32 * 128) * 2 + 32 * 2 * 4), 36 * 32 * 128 * 2
    assert (shape.state_bytes_sent(), shape.state_bytes_returned()) == a_token
    short, long = (exchange_time(shape, FHBN, 1e10, Load(8, context)) for context in (10, 100_000))
    assert short == long
    assert short.nbytes == 8 * shape.exchange_bytes()
    assert short.waiting == pytest.approx(48 * FHBN.round_trip)  # one round trip a mixer
    assert exchange_time(model("falcon-h1-7b"), FHBN, 1e10, Load(8, 10)).waiting == pytest.approx(88 * FHBN.round_trip)
    ended = exchange_time(shape, FHBN, 1e10, Load(0, 0, 100, 5050, 100, prompts=2))
    assert ended.nbytes == 100 * shape.kv_bytes_per_token() + 2 * shape.state_bytes
    assert ended.seconds == 0


def test_states_are_cut_by_heads_and_kv_by_ranges() -> None:
    shape, load = model("kimi-linear-48b-a3b"), Load(8, 32_768)
    one, four = (
        Offloaded(model=shape, model_device=H100, attention_device=H20, link=FHBN, attention_count=count,
                  shard="sequence").lane(load).attention
        for count in (1, 4)
    )  # fmt: skip
    assert four == pytest.approx(one / 4)
    assert state_share(shape, 3) == pytest.approx(11 / 32)
    assert state_share(shape, 3, 30) == pytest.approx(1 / 3)


def offloaded(name: str, **changes: object) -> Offloaded:
    """Lamina with that model."""
    whole = Offloaded(
        model=model(name), model_device=H100, model_count=8, attention_device=H20, attention_count=4, link=FHBN, lanes=2
    )
    return replace(whole, **changes)


def test_capacity_is_divided_as_the_engine_does_it() -> None:
    shape, room = model("qwen3-next-80b-a3b"), 4 * 96e9 * 0.9
    found = offloaded("qwen3-next-80b-a3b").capacity
    sequences = room / (4096 * 24_576 + 2 * 80_805_888)
    assert (found.sequences, found.tokens) == (int(sequences), int(sequences * 4096))
    assert offloaded("llama-3-70b").capacity.sequences == UNBOUNDED
    pure = replace(shape, groups=tuple(group for group in shape.groups if group.state))
    assert replace(offloaded("qwen3-next-80b-a3b"), model=pure).capacity.tokens == UNBOUNDED
    apart = Colocated(model=shape, device=H100, tensor_parallel=4)
    both = Disaggregated(prefill=apart, decode=apart, link=FHBN)
    assert both.capacity == apart.capacity
    assert both.transfer_bytes(100) == 100 * 24_576 + 80_805_888


HYBRIDS = sorted(name for name, shape in PRESETS.items() if shape.states)
KINDS = st.sampled_from(["lamina", "sequence", "whole"])


def system(name: str, kind: str) -> Colocated | Offloaded:
    if kind == "whole":
        return Colocated(model=model(name), device=H100, tensor_parallel=8)
    return offloaded(name, shard="sequence" if kind == "sequence" else "heads")


@settings(max_examples=150)
@given(st.sampled_from(sorted(PRESETS)), KINDS, st.integers(1, 500), st.floats(1, 2e5), st.floats(1, 8))
def test_more_context_is_never_cheaper(name: str, kind: str, batch: int, context: float, factor: float) -> None:
    short, long = (system(name, kind).step(Load(batch, each)) for each in (context, context * factor))
    assert long.seconds >= short.seconds * (1 - 1e-12)
    assert long.attention >= short.attention * (1 - 1e-12)


@given(st.sampled_from(HYBRIDS), st.integers(1, 500), st.floats(1, 1e6), st.floats(1, 1e6))
def test_states_do_not_know_the_context(name: str, batch: int, one: float, other: float) -> None:
    shape = model(name)
    assert state_time(shape, H20, Load(batch, one)) == state_time(shape, H20, Load(batch, other)) > 0


@given(st.sampled_from(sorted(PRESETS)), KINDS, st.floats(1, 8), st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_capacity_rises_with_memory_and_trades_tokens_for_sequences(
    name: str, kind: str, factor: float, tokens: int, more: int
) -> None:
    def found(scale: float, sequence_tokens: int) -> tuple[int, int]:
        made = system(name, kind)
        device = replace(H100, memory=1e12 * scale)
        larger: dict[str, Any] = {"device": device}
        if isinstance(made, Offloaded):
            larger = {"attention_device": device, "model_device": replace(H100, memory=1e12)}
        capacity = replace(made, sequence_tokens=sequence_tokens, **larger).capacity
        return capacity.tokens, capacity.sequences

    small, large = found(1, tokens), found(factor, tokens)
    assert small[0] <= large[0]
    assert small[1] <= large[1]
    longer = found(1, tokens + more)
    assert longer[0] >= small[0] - 1  # rounding
    assert longer[1] <= small[1]


def test_the_event_loop_has_as_many_sequences_as_states_or_pages_hold() -> None:
    trace = Trace("same", tuple(Arrival(0.0, 64, 32) for _ in range(64)))
    few = Colocated(model=model("qwen3-next-80b-a3b"), device=H100, tensor_parallel=4)
    by_states = replace(few, sequence_tokens=200, memory_share=0.5 + 1e-3)  # 160.3 GB, of which weights are 159.3
    sequences = by_states.capacity.sequences
    assert 0 < sequences < 16
    assert simulate(by_states, trace).peak_batch == sequences
    by_pages = replace(by_states, sequence_tokens=1 << 20)
    assert by_pages.capacity.sequences == 0
    with pytest.raises(InvalidRequest, match="no room for one sequence's states"):
        simulate(by_pages, trace)
    assert simulate(few, trace).peak_batch == 64
