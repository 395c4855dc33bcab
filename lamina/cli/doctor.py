"""What this machine has, what Lamina will use of it, and why: findings, to print or to send as JSON.

The choices come from the functions that load a model use. No model is loaded.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lamina.cli.terminal import show_bytes
from lamina.models.cache import cache_folder
from lamina.system.machine import Machine, native_dtype, this_machine

PACKAGES = ("torch", "numpy", "numba", "tokenizers", "transformers")
_KERNELS = {
    "cpu": "loops compiled by numba",
    "reference": "plain torch, slow, as LAMINA_KERNELS says",
    "triton": "Triton's interpreter, slow, as LAMINA_KERNELS says",
}
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `shown` is `value` for people, where that differs."""

    section: str
    name: str
    value: str | int | bool | None
    shown: str = ""


def examine(tls_dir: Path | None = None) -> Iterator[Finding]:
    """`tls_dir`: a folder of certificates, to be looked at too."""
    machine = this_machine()
    yield from _hardware(machine)
    yield from _versions()
    yield from _choices(machine)
    yield from _storage()
    if tls_dir is not None:
        yield from _certificates(tls_dir)


def as_json(findings: list[Finding]) -> dict[str, dict[str, str | int | bool | None]]:
    report: dict[str, dict[str, str | int | bool | None]] = {}
    for finding in findings:
        report.setdefault(finding.section, {})[finding.name] = finding.value
    return report


def _hardware(machine: Machine) -> Iterator[Finding]:
    yield Finding("machine", "processor", machine.processor)
    yield Finding("machine", "cores", machine.cores)
    for flag in FLAGS:
        present = flag in machine.flags
        yield Finding("machine", flag, present, "yes" if present else "no")
    yield Finding("machine", "memory_bytes", machine.memory, show_bytes(machine.memory))
    yield Finding("machine", "memory_available_bytes", machine.memory_available, show_bytes(machine.memory_available))
    gpus = _gpus()
    yield Finding("machine", "gpus", ", ".join(gpus) or None, ", ".join(gpus) or "none that torch can use")


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name} ({show_bytes(device.total_memory)})" for device in devices]


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", platform.python_version())
    for package in ("lamina", *PACKAGES):
        try:
            yield Finding("versions", package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding("versions", package, None, "not installed")


def _choices(machine: Machine) -> Iterator[Finding]:
    import torch

    from lamina_kernels.select import CHOICES
    from lamina_workers.attention_worker.page_layout import attention_kernels
    from lamina_workers.errors import KernelsUnavailable

    dtype, reason = native_dtype(machine)
    if torch.cuda.is_available():
        yield Finding("choices", "device", "cuda", "cuda: torch finds a GPU")
        dtype, reason = "bfloat16", "the device is a GPU"
    else:
        yield Finding("choices", "device", "cpu", "cpu: torch finds no GPU")
    yield Finding("choices", "dtype", dtype, f"{dtype}: {reason}")
    try:
        attention_kernels()
        name = os.environ.get("LAMINA_KERNELS", CHOICES["cpu"][0])
        yield Finding("choices", "attention_kernels", name, f"{name}: {_KERNELS[name]}")
    except KernelsUnavailable as error:
        yield Finding("choices", "attention_kernels", f"none: {error}")


def _storage() -> Iterator[Finding]:
    folder = cache_folder()
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(_existing(folder)).free
    yield Finding("storage", "cache", str(folder))
    yield Finding("storage", "cache_bytes", size, show_bytes(size))
    yield Finding("storage", "free_bytes", free, show_bytes(free))


def _certificates(folder: Path) -> Iterator[Finding]:
    from lamina_workers.process.credentials import certificate_end

    for name in ("ca.pem", "cert.pem"):
        try:
            end = certificate_end((folder / name).read_bytes())
        except (OSError, ValueError) as error:
            yield Finding("certificates", name, None, f"none: {error}")
            continue
        days = (end - datetime.datetime.now(datetime.timezone.utc)).days
        left = f"in {days} days" if days >= 0 else "expired"
        yield Finding("certificates", name, days, f"{left}: good until {end:%Y-%m-%d %H:%M} UTC")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
