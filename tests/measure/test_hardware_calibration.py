"""Calibration: its arithmetic on timings that were made from known numbers, its processes, and the file it writes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_rig import holder_config
from hypothesis import given
from hypothesis import strategies as st
from real_workers import write_tiny_model

from lamina.errors import EngineError, InvalidRequest
from lamina.measure.hardware import Calibration, calibrate, hardware_calibration, kernel_bench
from lamina.measure.hardware.busy import Beside, busy
from lamina.measure.hardware.child import Child
from lamina.measure.hardware.children import serve
from lamina.measure.hardware.decode_bench import Held, attention_alone
from lamina.measure.hardware.fitting import (
    DRIFT,
    Cell,
    Drift,
    Timings,
    bare,
    fit_attention,
    fit_device,
    fit_exchange,
    fit_links,
    kv_bytes,
    rate_of,
    solve,
)
from lamina.measure.hardware.hardware_calibration import FULL, NAME, QUICK, _Rounds, _Sources
from lamina.measure.hardware.reading import Bandwidth
from lamina.simulator.costs import hardware
from lamina.simulator.costs.cost_model import Load, attention_time, dense_time
from lamina.simulator.costs.hardware import Device, Efficiency, Link, at
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Offloaded
from lamina.simulator.planning.deployment import engine_keywords
from lamina.system.machine import this_machine
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.ports.port import LocalAttention

SHAPE = model("smollm2-135m")
TRUE = Device(
    "true",
    "cpu",
    flops=8e11,
    memory=24e9,
    bandwidth=45e9,
    price=0.0,
    efficiency=Efficiency(
        dense=tuple(zip(map(float, FULL.rows), (0.9, 0.85, 0.8, 0.8, 0.5, 0.5, 0.5, 0.6, 0.65), strict=True)),
        attention=((1e6, 0.6),),
        layer_overhead=50e-6,
        step_overhead=2e-3,
        row_overhead=40e-6,
        attention_row_overhead=2.5e-6,
    ),
)  # fmt: skip
CALL = 20e-6  # of TRUE's layer_overhead, what a call of attention costs by itself
SIZES = st.one_of(st.just(0.0), st.floats(1e-3, 10))
LINK = Link(
    "true", bandwidth=3e9, round_trip=250e-6, worker_time=150e-6, row_time=6e-6, query_first_time=190e-6,
    announce_time=300e-6, announce_row_time=4e-6,
)  # fmt: skip


def colocated(device: Device = TRUE) -> Colocated:
    return Colocated(model=SHAPE, device=device)


def offloaded(workers: int, device: Device = TRUE, link: Link = LINK) -> Offloaded:
    return Offloaded(
        model=SHAPE, model_device=device, attention_device=device, link=link, overlap=False, workers=workers
    )


def forward(rows: int) -> float:
    """What TRUE's dense layers take, without what the engine and a call of attention add."""
    parts = replace(TRUE.efficiency, step_overhead=0.0, row_overhead=0.0, layer_overhead=50e-6 - CALL)
    return dense_time(SHAPE, replace(TRUE, efficiency=parts), 1, Load(rows, 0.0))


def announced(workers: int, batch: int) -> float:
    """Seconds until `workers` have accepted a batch, beyond what that takes in the process."""
    return LINK.announce_time + workers * batch * LINK.announce_row_time


def first(workers: int, batch: int, context: int) -> float:
    """A step's seconds where q goes first."""
    return offloaded(workers).lane(Load(batch, context), query_first=True).alone


def timings(**changes: Any) -> Timings:
    """What a measurement without any noise finds of TRUE and LINK."""
    whole = Timings(
        bandwidth=TRUE.bandwidth,
        flops=TRUE.flops,
        linears={rows: forward(rows) - SHAPE.layers * (50e-6 - CALL) for rows in FULL.rows},
        forward={rows: forward(rows) for rows in FULL.rows},
        attention={
            cell: CALL + attention_time(SHAPE, TRUE, Load(*cell)) / SHAPE.layers for cell in FULL.attention
        },
        exchange={
            (workers, batch): offloaded(workers).step(Load(batch, 64)).seconds
            - colocated().step(Load(batch, 64)).seconds
            - announced(workers, batch)
            for batch, _ in FULL.exchange
            for workers in FULL.workers
        },
        announce={
            (workers, batch): announced(workers, batch) for batch, _ in FULL.exchange for workers in FULL.workers
        },
        query_first={
            (workers, *cell): first(workers, *cell) - offloaded(workers).step(Load(*cell)).seconds
            for cell in FULL.exchange
            for workers in FULL.workers
        },
        messages={
            "local": {0: 60e-6} | {size: 100e-6 + size / LINK.bandwidth for size in FULL.sizes},
            "grpc": {0: 360e-6} | {size: 500e-6 + size / 1e9 for size in FULL.sizes},
        },
        cells=[Cell(*cell, colocated().step(Load(*cell)).seconds) for cell in ((1, 84.0), (16, 84.0))],
    )  # fmt: skip
    return replace(whole, **changes)


def fitted(taken: Timings) -> Device:
    return fit_device(bare(NAME, "cpu", taken, 24e9), SHAPE, SHAPE.element, taken)


# The arithmetic.


def test_every_coefficient_comes_back_from_timings_without_noise():
    found = fitted(timings()).efficiency
    for name in ("layer_overhead", "step_overhead", "row_overhead", "attention_row_overhead"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE.efficiency, name), rel=1e-6), name
    assert found.dense == tuple((rows, pytest.approx(share)) for rows, share in TRUE.efficiency.dense)
    assert all(share == pytest.approx(0.6) for _, share in found.attention)


def test_a_link_is_what_the_exchange_costs_and_another_channel_as_much_more_as_its_messages():
    taken = timings()
    local, grpc = fit_links(SHAPE, taken, fitted(taken))
    assert (local.name, grpc.name) == ("local-channel", "grpc-loopback")
    for name in (
        *("bandwidth", "round_trip", "worker_time", "row_time", "query_first_time"),
        *("announce_time", "announce_row_time"),
    ):
        assert getattr(local, name) == pytest.approx(getattr(LINK, name)), name
    assert grpc.round_trip == pytest.approx(LINK.round_trip + 300e-6)
    assert grpc.query_first_time == pytest.approx(LINK.query_first_time + 150e-6, rel=0.05)
    assert grpc.announce_time == pytest.approx(LINK.announce_time + 300e-6)
    assert grpc.bandwidth == pytest.approx(1e9)
    assert fit_exchange(SHAPE, {}, 1e9) == (0.0, 0.0, 0.0)


def test_without_an_exchange_a_round_trip_is_that_of_a_small_message():
    taken = timings(exchange={}, query_first={}, announce={})
    local, grpc = fit_links(SHAPE, taken, fitted(taken))
    assert local.query_first_time == local.announce_time == grpc.announce_time == 0.0
    assert local.round_trip == pytest.approx(60e-6)
    assert grpc.round_trip == pytest.approx(300e-6, rel=0.3)


def test_an_engine_faster_than_its_parts_gets_no_negative_overhead():
    cells = [Cell(cell.batch, cell.context, cell.seconds * 0.5) for cell in timings().cells]
    found = fitted(timings(cells=cells)).efficiency
    assert found.step_overhead == found.row_overhead == 0.0


def test_a_device_without_attention_or_cells_has_the_defaults_there():
    found = fitted(timings(attention={}, cells=[])).efficiency
    assert found.attention == Efficiency().attention
    assert found.attention_row_overhead == found.step_overhead == 0.0
    assert found.layer_overhead == pytest.approx(50e-6 - CALL)


def test_attention_that_hardly_reads_still_gives_a_share():
    cells = {(1, 8): 30e-6, (4, 8): 36e-6}
    found = fit_attention(cells, {cell: kv_bytes(SHAPE, *cell, 2.0) for cell in cells}, 45e9)
    assert len(found.curve) == 1
    assert 1e-3 <= found.curve[0][1] <= 1.5
    assert found.call > 0


@given(
    st.lists(st.floats(1e-6, 1e-2), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 1 << 24)), min_size=6, max_size=12, unique_by=lambda x: x[0]),
)
def test_solving_finds_what_made_the_values(coefficients, cells):
    a, b, c = coefficients[0], coefficients[1] / 64, coefficients[2] / (1 << 24)
    terms = [(1.0, float(rows), float(size)) for rows, size in cells]
    values = [a + b * rows + c * size for _, rows, size in terms]
    found = solve(terms, values)
    for (_, rows, size), value in zip(terms, values, strict=True):
        assert found[0] + found[1] * rows + found[2] * size == pytest.approx(value, rel=1e-5)


@given(st.lists(st.tuples(SIZES, SIZES, st.floats(-1, 1, width=32)), min_size=1, max_size=8))
def test_no_coefficient_is_ever_below_zero(cells):
    found = solve([(x, y) for x, y, _ in cells], [value for _, _, value in cells])
    assert len(found) == 2
    assert all(value >= 0 for value in found)


def test_a_coefficient_below_zero_is_left_out_and_the_others_fitted_anew():
    assert solve([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)], [3.0, 2.0, 1.0]) == (pytest.approx(18 / 11, rel=0.5), 0.0)
    assert solve([], []) == ()
    assert solve([(1.0, 2.0)], [0.0]) == (0.0, 0.0)


def test_the_rate_of_messages_is_that_of_their_bytes_alone():
    assert rate_of({0: 1e-4, 1000: 2e-4, 11000: 3e-4}) == pytest.approx(1e8)
    assert rate_of({0: 1e-4, 1000: 2e-4}) == pytest.approx(1e7)
    assert rate_of({0: 1e-4, 1000: 2e-4, 2000: 1e-4}) == pytest.approx(2e7)  # noise: faster than the smaller one
    with pytest.raises(EngineError, match="no message"):
        rate_of({0: 1e-4})


# What is measured when: against processes that answer from TRUE and LINK.


class Fake:
    """Answers as a measuring process would on a machine that is TRUE and LINK."""

    def __init__(self, rate: float = TRUE.bandwidth) -> None:
        self.rate, self.asked = rate, 0

    def ask(self, what: str, **arguments: Any) -> Any:
        self.asked += 1
        return getattr(self, what)(**arguments)

    def read(self) -> float:
        return self.rate

    def peak(self) -> float:
        return TRUE.flops

    def dense(self, rows: int, times: int) -> dict[str, list[float]]:
        taken = timings()
        return {"linears": [taken.linears[rows]] * times, "forward": [taken.forward[rows]] * times}

    def attention(self, batch: int, context: int, steps: int) -> list[float]:
        return [timings().attention[batch, context]] * steps

    def layers(
        self, batch: int, context: int, steps: int, count: int = 0, query_first: bool = False
    ) -> dict[str, list[float]]:
        before = 1e-3 + (announced(count, batch) if count else 0.0)
        system, taken = offloaded(count) if count else colocated(), announced(count, batch) if count else 0.0
        whole = first(count, batch, context) if query_first else system.step(Load(batch, context)).seconds
        return {"announce": [before] * steps, "run": [whole - taken] * steps}

    def messages(self, channel: str, sizes: list[int], times: int) -> dict[str, list[float]]:
        return {str(size): [seconds] * times for size, seconds in timings().messages[channel].items()}

    def step(self, batch: int, context: int, tokens: int, seed: int) -> dict[str, float]:
        return {"seconds": colocated().step(Load(batch, context + 20.0)).seconds, "context": context + 20.0}


def about() -> dict[str, Any]:
    return {
        "processor": "A processor\nof two lines",
        "threads": 2,
        "dtype": "bfloat16",
        "memory": 24 << 30,
        "rates": {"one way": 1.0, "another": 2.0},
    }


def test_a_plan_for_a_calibrated_machine_leaves_it_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(this_machine(), memory=64 << 30, memory_available=20 << 30)
    monkeypatch.setattr(kernel_bench, "this_machine", lambda: machine)
    loaded = SimpleNamespace(threads=2, dtype=torch.bfloat16)
    bench: Any = SimpleNamespace(_device=torch.device("cpu"), _loaded=loaded, _bandwidth=SimpleNamespace(rates={}))
    memory = kernel_bench.KernelBench.about(bench)["memory"]
    assert memory == 20 << 30
    keywords = engine_keywords(Colocated(model=SHAPE, device=replace(TRUE, memory=memory)), 4096)
    assert keywords["kv_memory"] + SHAPE.weight_bytes == pytest.approx(0.9 * memory, rel=1e-3)


def calibration(fake: Fake | None = None) -> Calibration:
    rounds = _Rounds(replace(FULL, rounds=2), used=lambda: 0.0)
    child: Any = fake or Fake()
    for number in range(2):
        rounds.measure(number, child, child, child)
    taken, sources = rounds.timings(), _Sources("smollm2-135m", "2024-02-29", FULL)
    device = sources.device(NAME, "cpu", SHAPE, about(), taken)
    links = sources.links(SHAPE, about(), taken, device)
    return Calibration(
        (device,), links, sources.said(about()), "smollm2-135m", tuple(taken.cells), tuple(rounds.drifts), ("raw",),
        2, 2,
    )  # fmt: skip


def test_rounds_of_a_machine_give_that_machine():
    found = calibration()
    device, link = found.devices[0], found.links[0]
    for load in (Load(1, 64), Load(5, 300), Load(16, 7000), Load(8, 2048)):  # which nothing was fitted to
        assert colocated(device).step(load).seconds == pytest.approx(colocated().step(load).seconds)
        for workers in (1, 2, 3):
            predicted = offloaded(workers, device, link).step(load).seconds
            assert predicted == pytest.approx(offloaded(workers).step(load).seconds)
    assert found.remarks == ()
    assert [(cell.batch, cell.context) for cell in found.fitted] == [(1, 84.0), (16, 84.0)]


def test_progress_is_told_after_each_group_of_each_round():
    told: list[tuple[int, int | None]] = []
    rounds = _Rounds(FULL, lambda what, done, total: told.append((done, total)), used=lambda: 0.0)
    rounds.measure(0, *[Fake()] * 3)
    assert told == [(number, 3 + 4 * FULL.rounds) for number in (1, 2, 3, 4)]


def test_a_calibration_is_a_file_that_the_simulator_reads(tmp_path):
    found = calibration()
    path = tmp_path / "machine.toml"
    path.write_text(found.dumps())
    known = hardware.load(path)
    assert known.device(NAME) == found.devices[0]
    assert known.link("local-channel") == found.links[0]
    assert known.link("grpc-loopback") == found.links[1]
    assert known.device("h100") == hardware.load().device("h100")
    assert "h100" not in hardware.loads(found.dumps()).devices


def test_every_number_that_was_measured_says_when_where_and_how():
    found = calibration()
    device = found.devices[0]
    for entry, names in (
        (device, ("flops", "bandwidth", "memory")),
        (device.efficiency, ("dense", "attention", "layer_overhead", "attention_row_overhead", "step_overhead")),
        (found.links[0], ("bandwidth", "round_trip", "worker_time", "row_time", "query_first_time", "announce_time")),
    ):  # fmt: skip
        for name in names:
            assert "measured here, 2024-02-29, A processor" in entry.sources[name], name
    assert "1x64 and 16x64" in device.efficiency.sources["step_overhead"]
    assert device.sources["price"] == "as given"


def test_what_makes_figures_doubtful_is_said_in_the_file():
    steady, moved = Drift("attention", 40e9, 36e9), Drift("dense layers", 31e9, 60e9)
    assert steady.change < DRIFT < moved.change
    found = replace(calibration(), drifts=(steady, moved))
    assert len(found.remarks) == 2
    assert "most while dense layers was measured, from 31.0 to 60.0 GB/s" in found.remarks[0]
    assert "from 31.0 to 60.0 GB/s over all" in found.remarks[1]
    assert found.dumps().count("# Beware: ") == 2
    hardware.loads(found.dumps())
    busy_before = (Drift("attention", 40e9, 40e9, 0.04), Drift("decode", 40e9, 40e9, 0.5))
    found = replace(found, drifts=busy_before, rounds=2, wanted=5)
    assert set(found.remarks) == {
        "it was cut after 2 of 5 rounds",
        "other processes used up to 50% of the cores, before 1 of 2 groups of measurements",
    }
    assert "# Beware: it was cut after 2 of 5 rounds." in found.dumps()


def test_use_of_the_cores_is_read_between_two_looks():
    texts = iter(["cpu  100 0 50 800 50 0 0 0 7 7\ncpu0 1", "cpu  130 0 60 850 60 0 0 0 9 9\ncpu0 1"])
    assert busy(0.0, lambda: next(texts)) == pytest.approx(40 / 100)
    assert busy(0.0, lambda: "") == busy(0.0, lambda: "cpu  1 2 3 4 5 6 7 8") == 0.0
    assert 0 <= busy(0.01) <= 1


def test_what_others_use_beside_a_tree_of_processes(tmp_path):
    """Of 100 jiffies of two looks 60 are used: 25 by the tree of 7, its child 8 and 9 below that, 35 by others."""

    def look(total, own):
        (tmp_path / "stat").write_text(f"cpu  {total * 6 // 10} 0 0 {total * 4 // 10} 0 0 0 0 0 0\n")
        for number, parent, used in ((7, 1, own), (8, 7, 0), (9, 8, 0), (10, 1, 500)):
            (tmp_path / str(number)).mkdir(exist_ok=True)
            fields = ["S", str(parent), *"0" * 9, str(used), "0", "0", "0"]
            (tmp_path / str(number) / "stat").write_text(f"{number} (a (b) c) {' '.join(fields)}")

    look(100, 0)
    beside = Beside(7, proc=tmp_path)
    look(200, 25)
    assert beside.share() == pytest.approx(0.35)
    assert Beside(os.getpid()).share() >= 0
    assert Beside(7, proc=tmp_path / "none").share() == 0


def test_a_price_or_a_model_that_cannot_be_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    folder = str(write_tiny_model(tmp_path / "m"))
    with pytest.raises(InvalidRequest, match="price is -1"):
        calibrate(folder, price=-1.0)
    monkeypatch.setattr(hardware_calibration, "from_folder", lambda _: replace(SHAPE, groups=()))
    with pytest.raises(InvalidRequest, match="layers of the model is 0"):
        calibrate(folder)


# The processes.


def test_what_goes_wrong_in_a_measurement_is_its_answer():
    def refuse() -> None:
        raise EngineError("not today")

    out = io.StringIO()
    lines = [
        json.dumps([what, arguments]) for what, arguments in (("add", {"a": 1}), ("refuse", {}), ("add", {"a": 2}))
    ]
    closed: list[bool] = []
    serve(lambda: {"add": lambda a: a + 1, "refuse": refuse, "close": lambda: closed.append(True)}, lines, out)
    assert closed == [True]
    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    assert answers == [{"result": None}, {"result": 2}, {"error": "EngineError: not today"}, {"result": 3}]


def test_what_cannot_be_made_is_the_first_answer():
    def make() -> dict[str, Any]:
        raise InvalidRequest("no such model")

    out = io.StringIO()
    serve(make, ["never read"], out)
    assert json.loads(out.getvalue()) == {"error": "InvalidRequest: no such model"}


def test_a_process_that_ends_is_an_error_with_its_words():
    with pytest.raises(EngineError, match=r"measures nothing ended with status 1: [\s\S]*KeyError"):
        Child("nothing", {})


def test_a_process_reads_memory_and_ends_when_it_is_closed():
    with Child("reading", {"size": 1 << 22}) as child:
        assert child.ask("read") > 1e6
    child.close()
    with pytest.raises((EngineError, ValueError)):
        child.ask("read")


def test_importing_loads_no_torch():
    code = "import sys, lamina.measure.hardware, lamina.measure.hardware.decode_steps; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0


# What is measured.


def test_every_way_of_reading_gives_a_rate():
    bandwidth = Bandwidth(1 << 20, torch.device("cpu"), 1, variants=((1, 0, 1), (4, 1024, 2)), rounds=3)
    assert len(bandwidth.rates) == 2
    assert bandwidth.rates[bandwidth.best] == max(bandwidth.rates.values())
    assert bandwidth() > 0


@pytest.mark.parametrize("remote", [False, True])
def test_sequences_at_holders_grow_by_a_token_a_step(decoder, remote):
    config = holder_config(decoder)
    heads = {1: (0, 1), 2: (2,)} if remote else {0: (0, 1, 2)}
    workers = {number: AttentionWorker(config) for number in heads}
    ports = {number: LocalAttention(worker) for number, worker in workers.items()}
    held = Held(config, ports, heads, dtype=torch.float32, threads=1)
    with torch.inference_mode():
        held.fill(3, 40)
        for first in (False, remote):
            taken = held.step(attention_alone(config.layers, 3, torch.float32), first)
            assert min(taken) > 0
    for number, worker in workers.items():
        ports[number].settle()
        assert [part.held for part in worker.store.parts().values()] == [42, 42, 42]
        assert {part.heads for part in worker.store.parts().values()} == {heads[number]}
    held.fill(1, 5)
    assert all([part.held for part in worker.store.parts().values()] == [5] for worker in workers.values())
    held.drop()
    for worker in workers.values():
        worker.store.check_integrity()
        assert worker.store.free_pages == worker.store.n_pages


@pytest.mark.soak
def test_a_quick_calibration_measures_everything(tmp_path):
    folder = write_tiny_model(tmp_path / "m")
    told = []
    kept = []
    found = calibrate(
        str(folder), lambda what, done, total: told.append((done, total)), quick=True, date="2024-02-29", price=1.5,
        keep=kept.append,
    )  # fmt: skip
    assert [each.rounds for each in kept] == [*range(1, QUICK.rounds)]
    path = tmp_path / "machine.toml"
    path.write_text(found.dumps())
    known = hardware.load(path)
    device = known.device(NAME)
    assert device == found.devices[0]
    assert device.price == 1.5
    assert device.flops > 1e8
    assert device.bandwidth > 1e8
    assert at(device.efficiency.dense, 1) > 0
    assert [link.name for link in found.links] == ["local-channel", "grpc-loopback"]
    assert all(link.bandwidth > 1e6 and link.round_trip > 0 for link in found.links)
    assert told[-1] == (3 + 4 * QUICK.rounds,) * 2
