"""Inventories: what a file says is there, and what is refused with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.errors import InvalidRequest
from lamina.simulator.costs import hardware
from lamina.simulator.costs.cost_model import FULL, KvPolicy
from lamina.simulator.costs.hardware import ROOFLINE
from lamina.simulator.planning import inventory

WHOLE = """
systems = ["chunked", "lamina"]
links = ["fhbn-400g", "my-link"]
[[have]]
device = "H100"
count = 4
price = 9.5
[[have]]
device = "my-gpu"
count = 2
[[policy]]
name = "auto"
read = 0.31
source = "measured"
[[policy]]
name = "streaming(sink=64, recent=1024)"
read = 0.5
held = 0.5
window = 1088
[[device]]
name = "my-gpu"
kind = "gpu"
flops = 1e14
memory = 2.4e10
bandwidth = 1e12
price = 0.5
[device.efficiency]
dense = [[1, 0.5], [256, 0.8]]
[[link]]
name = "my-link"
bandwidth = 1e9
round_trip = 1e-4
"""
HAVE = '[[have]]\ndevice = "h100"\ncount = 1\n'


def written(folder: Path, text: str) -> Path:
    file = folder / "inventory.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_of_devices_alone_has_one_of_each_and_their_links(tmp_path: Path) -> None:
    devices = WHOLE[WHOLE.index("[[device]]") :]
    found = inventory.read(written(tmp_path, devices))
    assert [(have.device.name, have.count) for have in found.have] == [("my-gpu", 1)]
    assert [link.name for link in found.links] == ["my-link"]
    with pytest.raises(InvalidRequest, match=r"says a table \[\[have\]\]"):
        inventory.read(written(tmp_path, devices.replace('kind = "gpu"', "count = 4")))


def test_what_no_engine_deploys_is_left_out_unless_nothing_is_left(tmp_path: Path) -> None:
    found = inventory.deployable(inventory.default(hardware.load()))
    assert {*inventory.SYSTEMS} - {*found.systems} == {"disaggregated"}
    alone = inventory.read(written(tmp_path, f'systems = ["disaggregated"]\nlinks = ["nvlink"]\n{HAVE}'))
    with pytest.raises(InvalidRequest, match="--any plans with them"):
        inventory.deployable(alone)


def test_a_file_says_what_there_is(tmp_path: Path) -> None:
    found = inventory.read(written(tmp_path, WHOLE))
    assert [(have.device.name, have.count, have.device.price) for have in found.have] == [
        ("h100", 4, 9.5),
        ("my-gpu", 2, 0.5),
    ]
    assert [link.name for link in found.links] == ["fhbn-400g", "my-link"]
    assert found.systems == ("chunked", "lamina")
    assert found.policies == (KvPolicy("auto", 0.31, 1.0), KvPolicy("streaming(sink=64, recent=1024)", 0.5, 0.5, 1088))
    assert found.count(found.have[1].device) == 2
    assert found.count(hardware.load().device("h20")) == 0


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    found = inventory.read(written(tmp_path, HAVE))
    assert (found.systems, found.policies, found.links) == (inventory.SYSTEMS, (FULL,), ())
    assert found.have[0].device == hardware.load().device("h100")


def test_only_devices_that_nobody_measured_become_typical(tmp_path: Path) -> None:
    typical = hardware.load().engines["vllm"]
    found = inventory.with_efficiency(inventory.read(written(tmp_path, WHOLE)), typical)
    assert found.have[0].device.efficiency == typical
    assert found.have[1].device.efficiency.dense == ((1.0, 0.5), (256.0, 0.8))
    assert inventory.default(hardware.load()).have[0].device.efficiency == ROOFLINE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no [[have]]"),
        ('[[have]]\ndevice = "h1000"\ncount = 1\n', "unknown device 'h1000'; known are h100"),
        (HAVE + HAVE, "'h100' twice"),
        ('links = ["carrier-pigeon"]\n' + HAVE, "unknown link 'carrier-pigeon'; known are fhbn-400g"),
        ('links = ["nvlink", "NVLINK"]\n' + HAVE, "twice"),
        ('systems = ["magic"]\n' + HAVE, "'magic'; allowed are colocated, chunked"),
        ('systems = ["chunked", "chunked"]\n' + HAVE, "systems has 'chunked' twice"),
        ('systems = ["lamina", "disaggregated"]\n' + HAVE, "links is empty, and systems are lamina, disaggregated"),
        (HAVE + '[[policy]]\nname = "x"\n[[policy]]\nname = "x"\n', "'x' twice"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(tmp_path: Path, text: str, said: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(InvalidRequest) as caught:
        inventory.read(file)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(file))
