"""`lamina bench decode`: bytes by the model's shape, medians over rounds, and a run of a small model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import typer
from real_workers import write_tiny_model

from lamina.cli.bench import bench_app
from lamina.cli.main import Commands
from lamina.config import EngineConfig
from lamina.measure.bench.decode import Result, bench, dtypes, kept_as, record, row, step_bytes, table
from lamina.measure.hardware.decode_steps import Measured
from lamina.models.weight_memory import WeightMemory
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.packing import Packing
from lamina.system.machine import Machine

app = typer.Typer(cls=Commands)
app.add_typer(bench_app, name="bench")
BF16 = Machine("fast", 2, frozenset({"avx512_bf16"}), 1, 1)
PLAIN = Machine("slow", 2, frozenset(), 1, 1)


def test_a_step_reads_weights_once_and_each_sequences_kv():
    shape = model("smollm2-135m")
    one, four = (step_bytes(shape, Measured(batch, 100.0, 1, 1, 1, 9, 1), 2.0, 2.0) for batch in (1, 4))
    kv = 100 * 30 * 3 * 64 * 2 * 2
    assert four - one == pytest.approx(3 * kv)
    assert one - kv == pytest.approx(134_515_008 * 2)
    halved = step_bytes(shape, Measured(4, 100.0, 1, 1, 1, 9, 1), 4.0, 1.0, kept=0.5)
    assert halved == pytest.approx(134_515_008 * 4 + 4 * kv / 4)


def test_a_row_has_medians():
    runs = [(Measured(4, 100.0, s, 0, 0, 9, first=2.0 * s, p99=3 * s), 1e9 * s) for s in (0.01, 0.05, 0.02)]
    found = row(96, runs, 1e6)
    assert (found.batch, found.context, found.step_ms, found.p99_ms) == (4, 96, pytest.approx(20), pytest.approx(60))
    assert found.tokens_per_second == pytest.approx(200)
    assert found.bytes_per_second == pytest.approx(5e7)
    assert found.memory_bytes_per_second == pytest.approx(2e7)
    assert found.of_roofline == pytest.approx(2.5)
    assert found.roofline_ms == pytest.approx(50)
    assert found.prefill_tokens_per_second == pytest.approx(4 * 96 / 0.04)


def test_packed_weights_are_read_as_they_are_kept():
    """smollm2-135m: 134,479,872 weights of matrices and 35,136 of norms. Kept in 80,000,000 bytes, the norms are 70,272
    of them; a step reads all, since the head is the input table."""
    shape, memory = (
        model("smollm2-135m"),
        WeightMemory(134_515_008, 96_000_000, {"bfloat16": 269_030_016, "packed": 80_000_000}),
    )
    kept = kept_as(shape, memory, EngineConfig(device="cpu"))
    assert kept.packing == Packing("packed", (80_000_000 - 70_272) / 134_479_872)
    assert kept.weight_bytes == pytest.approx(80_000_000)
    assert step_bytes(kept, Measured(1, 0.0, 1, 1, 1, 9, 1), 2.0, 2.0) == pytest.approx(80_000_000)
    for other in ({"weights": "bfloat16"}, {"quantize": "int8"}, {"device": "cuda"}):
        assert kept_as(shape, memory, EngineConfig(**{"device": "cpu"} | other)) == shape


def test_drafts_give_several_tokens_for_weights_and_kv_read_once():
    """Two sequences, 3 tokens each in a step of 20 ms: 300 tokens/s, and the bytes of a step without drafts."""
    run = Measured(2, 100.0, 0.02, 0.02, 0.02, 9, 1.0, 0.02, tokens=3.0)
    found = row(96, [(run, 1e9)], 1e6)
    assert (found.tokens_per_second, found.tokens_per_step, found.step_ms) == (pytest.approx(300), 3, pytest.approx(20))
    shape = model("smollm2-135m")
    assert step_bytes(shape, run, 2.0, 2.0) == step_bytes(shape, Measured(2, 100.0, 1, 1, 1, 9, 1), 2.0, 2.0)
    shown = table(Result("m", {}, "bfloat16", "bfloat16", 9, 1, (found,)))
    assert shown.splitlines()[1].split()[-1] == "tok/step"
    assert "tok/step" not in table(
        Result("m", {}, "bfloat16", "bfloat16", 9, 1, (replace(found, tokens_per_step=1.0),))
    )


@pytest.mark.parametrize(
    ("config", "machine", "expected"),
    [
        ({"device": "cpu"}, BF16, ("bfloat16", "bfloat16")),
        ({"device": "cpu"}, PLAIN, ("float32", "float32")),
        ({"device": "cuda"}, PLAIN, ("bfloat16", "bfloat16")),
        ({"dtype": "float32", "kv_dtype": "int8"}, BF16, ("float32", "int8")),
    ],
)
def test_auto_means_what_the_engine_makes_of_it(config, machine, expected):
    assert dtypes(EngineConfig(**config), machine) == expected


def test_a_small_model_is_measured_here(tmp_path):
    told, rates = [], iter([1e9, 3e9, 2e9, 5e9, 4e9, 6e9])
    found = bench(
        str(write_tiny_model(tmp_path / "m")),
        {"threads": 1, "kv_memory": 1 << 22, "dtype": "float32"},
        [(1, 32), (2, 64), (2, 32)],
        steps=6,
        rounds=2,
        progress=lambda *words: told.append(words),
        read=lambda: next(rates),
    )
    assert [(each.batch, each.context) for each in found.rows] == [(1, 32), (2, 64), (2, 32)]
    assert [each.memory_bytes_per_second for each in found.rows] == [3e9, 3.5e9, 4e9]
    for each in found.rows:
        assert 0 < each.step_ms <= each.p99_ms
        assert each.prefill_tokens_per_second > 0
    assert found.rows[1].step_bytes > found.rows[2].step_bytes > found.rows[0].step_bytes
    assert ("measuring", 6, 6) in told
    lines = table(found).splitlines()
    assert len(lines) == 5
    assert found.weight_bytes == 0
    assert "float32" in lines[0]
    fields = json.loads(json.dumps(record(found)))
    assert (fields["schema"], fields["rows"][2]["batch"], fields["options"]["threads"]) == ("lamina.bench.decode", 2, 1)


def test_a_policy_reads_less(tmp_path):
    folder = str(write_tiny_model(tmp_path / "m"))
    options = {"threads": 1, "kv_memory": 1 << 22, "dtype": "float32"}
    spared, whole = (
        bench(folder, {**options, "policy": policy}, [(1, 200)], steps=4, rounds=1, read=lambda: 1e9).rows[0].step_bytes
        for policy in ("streaming(sink=32, recent=32)", "full")
    )
    assert spared < whole


@pytest.mark.parametrize("more", [{"quantize": "int8"}, {"speculate": "ngram", "num_speculative_tokens": 2}])
def test_packed_weights_and_drafts_are_measured_here(tmp_path, more):
    folder = str(write_tiny_model(tmp_path / "m"))
    options = {"threads": 1, "kv_memory": 1 << 22, "dtype": "float32", "device": "cpu"} | more
    found = bench(folder, options, [(2, 64)], steps=8, rounds=1, read=lambda: 1e9)
    assert found.rows[0].tokens_per_step >= 1
    assert (found.weight_bytes > 0) is ("quantize" in more)
    assert ("weights packed" in table(found)) is ("quantize" in more)
