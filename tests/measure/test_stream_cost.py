"""What streaming takes of a step: fitted to what it was measured to, and measured on a real server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lamina.measure.bench.stream_cost import fitted, with_streams
from lamina.measure.hardware.hardware_calibration import NAME, Calibration
from lamina.simulator.costs import hardware
from lamina.simulator.costs.cost_model import Load
from lamina.simulator.costs.efficiency import Efficiency
from lamina.simulator.costs.hardware import Device
from lamina.simulator.costs.models import model
from lamina.simulator.costs.systems import Colocated

MACHINE = Device(NAME, "cpu", flops=1e12, memory=16e9, bandwidth=5e10, price=0.0)
FOUND = Calibration((MACHINE,), (), "measured in a test", "smollm2-135m", (), (), (), 1, 1)


def test_what_each_stream_takes_is_found_from_steps_of_unlike_batches() -> None:
    each, said = fitted({1: [0.4e-3, 0.6e-3], 4: [2e-3], 16: [8e-3, 7e-3, 9e-3]}, {1: [0.012], 4: [0.013], 16: [0.02]})
    assert each == pytest.approx(0.5e-3)
    assert "1 streams 0.50, 4 streams 2.00, 16 streams 8.00" in said


def test_streams_that_take_nothing_are_no_gain() -> None:
    each, _ = fitted({1: [-0.1e-3], 4: [0.0], 16: [-0.2e-3]}, {1: [0.012], 4: [0.013], 16: [0.02]})
    assert each == 0.0


def test_it_is_added_to_each_sequence_of_a_step() -> None:
    shape = model("llama-3-8b")
    alone = Colocated(model=shape, device=MACHINE)
    streaming = Colocated(model=shape, device=replace(MACHINE, efficiency=Efficiency(stream_overhead=1e-3)))
    more = streaming.step(Load(8, 100)).seconds - alone.step(Load(8, 100)).seconds
    assert more == pytest.approx(8e-3)


@pytest.mark.real
def test_a_real_server_is_measured_and_the_file_says_so(tmp_path) -> None:
    found = with_streams(FOUND, "smollm2-135m", quick=True)
    (device,) = found.devices
    assert 0 <= device.efficiency.stream_overhead < 0.02
    (tmp_path / "machine.toml").write_text(found.dumps())
    assert "# A step that is streamed to clients here, ms more than in one process: 1 streams" in found.dumps()
    assert hardware.load(tmp_path / "machine.toml").device(NAME).efficiency == device.efficiency
