"""Which kernels a process uses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lamina_kernels.attention import decode as cpu_decode
from lamina_kernels.select import CHOICES, Kernels, kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
choose = kernels.__wrapped__  # without the cache, which lasts as long as the process


def test_the_cpus_kernels_are_the_default(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("LAMINA_KERNELS", raising=False)
    with caplog.at_level("INFO", "lamina"):
        assert choose(CPU) is cpu_decode
    assert "attention kernels for cpu: cpu" in caplog.text


def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_KERNELS", "cpu")
    assert choose(CPU) is cpu_decode


def test_each_name_is_a_module_of_its_own_with_all_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    functions = [name for name in vars(Kernels) if not name.startswith("_")]
    modules = []
    for name in CHOICES["cpu"]:
        monkeypatch.setenv("LAMINA_KERNELS", name)
        modules.append(choose(CPU))
        assert [function for function in functions if not hasattr(modules[-1], function)] == []
    assert len({*map(id, modules)}) == len(modules)


def test_unknown_kernels_and_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_KERNELS", "fast")
    message = "LAMINA_KERNELS must be cpu or triton for the device cpu, got 'fast'"
    with pytest.raises(ValueError, match=message):
        choose(CPU)
    with pytest.raises(ValueError, match="there are kernels for the devices cpu and cuda, got meta"):
        choose(torch.device("meta"))


def test_what_computes_on_a_cpu_is_refused_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_KERNELS", "cpu")
    with pytest.raises(ValueError, match="LAMINA_KERNELS must be triton for the device cuda, got 'cpu'"):
        choose(CUDA)


@pytest.mark.parametrize("value", [None, "0", ""])
def test_triton_on_a_cpu_needs_its_interpreter(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(ValueError, match="needs TRITON_INTERPRET=1 in the environment"):
        choose(CPU)


def test_without_the_package_triton_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAMINA_KERNELS", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"need the package triton \(pip install triton\)"):
        choose(CUDA)


CHOICE = """
import sys
import torch
import lamina
from lamina_kernels.select import kernels

chosen = kernels(torch.device(sys.argv[1]))
print(chosen.__name__, "triton" in sys.modules)
"""


@pytest.mark.parametrize(
    ("device", "environment", "wanted"),
    [
        ("cpu", {}, "lamina_kernels.attention.decode False"),
        ("cpu", {"LAMINA_KERNELS": "triton", "TRITON_INTERPRET": "1"}, "lamina_kernels.gpu.decode True"),
        ("cuda", {}, "lamina_kernels.gpu.decode True"),
    ],
)
def test_triton_is_imported_only_where_it_is_chosen(device: str, environment: dict[str, str], wanted: str) -> None:
    if wanted.endswith("True"):
        pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if k not in ("LAMINA_KERNELS", "TRITON_INTERPRET")}
    run = [sys.executable, "-c", CHOICE, device]
    done = subprocess.run(run, env=clean | environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == wanted


def test_the_choice_lasts() -> None:
    assert kernels(CPU) is kernels(CPU)
