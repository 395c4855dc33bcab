"""Which kernels a process uses."""

from __future__ import annotations

import pytest
import torch

from lamina_kernels import cpu_decode, reference
from lamina_kernels.select import kernels

CPU = torch.device("cpu")
choose = kernels.__wrapped__  # without the cache, which lasts as long as the process


def test_the_cpus_kernels_are_the_default(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("LAMINA_KERNELS", raising=False)
    with caplog.at_level("INFO", "lamina"):
        assert choose(CPU) is cpu_decode
    assert "attention kernels for cpu: cpu" in caplog.text


def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_KERNELS", "reference")
    assert choose(CPU) is reference


def test_unknown_kernels_and_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_KERNELS", "fast")
    with pytest.raises(ValueError, match="LAMINA_KERNELS must be reference or cpu, got 'fast'"):
        choose(CPU)
    with pytest.raises(ValueError, match="there are kernels for the device cpu, got meta"):
        choose(torch.device("meta"))


def test_the_choice_lasts() -> None:
    assert kernels(CPU) is kernels(CPU)
