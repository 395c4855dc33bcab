"""The catalogue of devices and links: published numbers, their sources, users' files, and what may be wrong in one."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import InvalidRequest
from lamina.simulator.costs.hardware import KINDS, ROOFLINE, Device, Efficiency, Link, at, dumps, load, loads
from lamina.simulator.costs.model_configs import model
from lamina.system.toml_models import MAX_BYTES

DEVICE = """
[[device]]
name = "mine"
kind = "gpu"
flops = 1e14
memory = 24_000_000_000
bandwidth = 1e12
price = 0
"""
DENSE = model("llama-3-70b")
LINK = '[[link]]\nname = "wire"\nbandwidth = 1e9\nround_trip = 1e-4\n'


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # the Lamina paper's table 1: FLOPs, memory, bandwidth, interconnect, network, price, power
        ("h100", (989e12, 80e9, 3.35e12, 450e9, 50e9, 11.06, 700)),
        ("h20", (148e12, 96e9, 4.0e12, 450e9, 50e9, 4.63, 400)),
        ("tpu-v6e", (918e12, 32e9, 1.64e12, 448e9, 25e9, 2.70, 0)),
    ],
)
def test_the_paper_s_devices(name: str, expected: tuple[float, ...]) -> None:
    d = load().device(name)
    assert (d.flops, d.memory, d.bandwidth, d.interconnect, d.network, d.price, d.power) == expected


def test_every_number_of_the_catalogue_has_a_source() -> None:
    catalogue = load()
    for entry in (*catalogue.devices.values(), *catalogue.links.values(), *catalogue.engines.values()):
        for item in fields(entry):
            value = getattr(entry, item.name)
            if item.name not in ("name", "kind", "efficiency", "sources") and value != item.default:
                assert len(entry.sources.get(item.name, "")) > 10, (entry, item.name)
    assert all(re.search(r"\(20\d\d\)", device.sources["price"]) for device in catalogue.devices.values())


def test_devices_of_the_catalogue_are_bare_rooflines() -> None:
    catalogue = load()
    assert {device.efficiency for device in catalogue.devices.values()} == {ROOFLINE}
    assert {device.kind for device in catalogue.devices.values()} == set(KINDS)
    assert catalogue.efficiency("typical", DENSE) == catalogue.engines["vllm"]
    assert catalogue.efficiency("typical", model("deepseek-v3")) == catalogue.engines["trtllm"]
    assert catalogue.efficiency("Roofline", DENSE) == ROOFLINE
    assert load() is catalogue  # read once


def test_hosts_have_the_bandwidth_of_their_memory_channels() -> None:
    bandwidths = {name: load().device(name).bandwidth / 1e9 for name in ("epyc-genoa", "epyc-milan")}
    assert bandwidths == {"epyc-genoa": pytest.approx(460.8), "epyc-milan": pytest.approx(204.8)}


def test_the_paper_s_links() -> None:
    fhbn, nccl = load().link("fhbn-400g"), load().link("NCCL-400G")
    assert (fhbn.round_trip, fhbn.bandwidth, nccl.round_trip, nccl.bandwidth) == (33.0e-6, 45.7e9, 66.6e-6, 35.5e9)


def test_unknown_names_list_what_is_known() -> None:
    with pytest.raises(InvalidRequest, match="unknown device 'h1000'; known are h100, h200, h20"):
        load().device("h1000")
    with pytest.raises(InvalidRequest, match="unknown link 'string'; known are fhbn-400g"):
        load().link("string")
    with pytest.raises(InvalidRequest, match="known are none"):
        loads(LINK).device("h100")


def test_a_curve_is_straight_over_the_logarithm_and_flat_outside() -> None:
    curve = ((1.0, 0.2), (100.0, 0.6), (1000.0, 0.5))
    assert [at(curve, x) for x in (0, 0.5, 1, 100, 1000, 1e9)] == [0.2, 0.2, 0.2, 0.6, 0.5, 0.5]
    assert at(curve, 10) == pytest.approx(0.4)
    assert at(((4.0, 0.7),), 1e6) == 0.7


def test_a_user_s_file_adds_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(DEVICE + LINK + DEVICE.replace("mine", "H100"))
    catalogue = load(file)
    assert catalogue.device("mine") == Device("mine", "gpu", 1e14, 24e9, 1e12, 0)
    assert catalogue.link("wire") == Link("wire", 1e9, 1e-4)
    assert (catalogue.device("h100").price, load().device("h100").price) == (0, 11.06)
    assert catalogue.device("h20") is load().device("h20")
    assert len(catalogue.devices) == len(load().devices) + 1


def test_a_user_s_engine_has_its_efficiency_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[[engine]]\nname = "Ours"\ncompute = 0.5\nexperts = 0.25\n')
    catalogue = load(file)
    assert catalogue.efficiency("ours", DENSE) == Efficiency(compute=0.5, experts=0.25)
    assert catalogue.said_of("OURS", DENSE) == "devices without measurements reach what ours of the hardware file says"
    assert "what vllm reached of H100 and H200" in catalogue.said_of("typical", DENSE)
    assert "what trtllm reached of H100 and H200" in catalogue.said_of("typical", model("qwen3-30b-a3b"))
    assert "this project's own engine was not measured" in catalogue.said_of("typical", DENSE)
    assert "an upper bound" in catalogue.said_of("roofline", DENSE)
    with pytest.raises(InvalidRequest, match="'best'; allowed are roofline, typical, vllm, sglang, trtllm, ours"):
        catalogue.efficiency("best", DENSE)
    file.write_text('[[engine]]\nname = "typical"\n')
    with pytest.raises(
        InvalidRequest, match="engine 'typical' has a name that is taken; allowed are others than roofline, typical"
    ):
        load(file)
    file.write_text('[[engine]]\nname = "vLLM"\ncompute = 0.5\n')
    assert (
        load(file).said_of("typical", DENSE) == "devices without measurements reach what vllm of the hardware file says"
    )


def test_the_catalogue_can_be_written() -> None:
    catalogue = load()
    written = dumps(catalogue.devices.values(), catalogue.links.values(), catalogue.engines)
    assert loads(written) == catalogue


shares = st.floats(1e-6, 1.5)
curves = st.dictionaries(st.floats(1e-6, 1e18), shares, min_size=1, max_size=5).map(lambda d: tuple(sorted(d.items())))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
times = st.floats(0, 60)
efficiencies = st.builds(
    Efficiency,
    dense=curves,
    attention=curves,
    collective=shares,
    collective_latency=times,
    row_overhead=times,
    compute_8bit=st.floats(0, 1.5),
    first_token_overhead=times,
    sources=st.dictionaries(st.sampled_from(["dense", "collective"]), texts),
)
devices = st.builds(
    Device,
    name=st.just("a device"),
    kind=st.sampled_from(KINDS),
    flops=st.integers(1, 10**18) | st.floats(1, 1e18),
    memory=st.floats(1, 1e16),
    bandwidth=st.floats(1, 1e16),
    price=st.floats(0, 1e6),
    power=st.floats(0, 1e6),
    efficiency=st.just(ROOFLINE) | efficiencies,
    sources=st.dictionaries(st.sampled_from(["flops", "price"]), texts),
)


@given(devices, st.just({}) | efficiencies.map(lambda efficiency: {"ours": efficiency}))
def test_what_is_written_is_read_back(device: Device, engines: dict[str, Efficiency]) -> None:
    again = loads(dumps([device], engines=engines))
    assert again.device("a device") == replace(device, flops=float(device.flops))
    assert again.engines == engines
    assert hash(again.device("a device")) == hash(again.device("A DEVICE"))


@given(curves, st.floats(0, 1e20))
def test_a_curve_stays_between_its_points(curve: tuple[tuple[float, float], ...], x: float) -> None:
    ys = [y for _, y in curve]
    assert min(ys) - 1e-9 <= at(curve, x) <= max(ys) + 1e-9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("a = " + "[" * 5000, "it is not TOML"),
        (DEVICE + "bandwidth = 1", "it is not TOML"),  # a key given twice
        (DEVICE.replace("mine", ""), "the name of a device is ''"),
        ("[[device]]\nkind = 'gpu'", r"device\[0\] has no name; it is needed"),
        (LINK.replace("wire", "a\\nb"), "the name of a link is"),
        (DEVICE + DEVICE.replace("mine", "Mine"), "device 'Mine' is there twice"),
        (LINK + LINK, "link 'wire' is there twice"),
        (DEVICE.replace("1e12", "0x" + "f" * 5000), "it holds what cannot be shown"),
        (DEVICE + "efficiency.dense = []", "allowed are 1 to 256 points"),
        (DEVICE + "efficiency.dense = [[1, 0]]", "efficiency.dense: y is 0"),
        (DEVICE + "efficiency.dense = [[0, 1]]", "efficiency.dense: x is 0"),
        (DEVICE + "efficiency.attention = [[2, 1], [2, 1]]", "efficiency.attention has x = 2 after 2"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=f"bad.toml: .*{message}"):
        load(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    large, latin = tmp_path / "large.toml", tmp_path / "latin.toml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    latin.write_bytes(b"# \xe9\n")
    for path, message in (
        (tmp_path / "none.toml", "there is no such file"),
        (tmp_path, "it is no file"),
        (large, f"it has more than {MAX_BYTES} bytes"),
        (latin, "it is not UTF-8"),
        ("nul\0.toml", "there is no such file|it cannot be read"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            load(path)
