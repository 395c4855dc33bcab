"""This machine as the system describes it: processor, cores, memory. Loads no torch."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

_KV_SHARE = 4  # of the available memory, one part in so many


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` counts the cores that this process may run on. `memory` and `memory_available` are in bytes, 0 where
    unknown; a container's limit counts as the machine's."""

    processor: str
    cores: int
    flags: frozenset[str]
    memory: int
    memory_available: int


def this_machine() -> Machine:
    processor, flags = parse_cpuinfo(_text_of("/proc/cpuinfo"))
    memory, available = parse_meminfo(_text_of("/proc/meminfo"))
    limit, used = (_number(_text_of(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
    if limit is not None and limit < memory:
        memory, available = limit, min(available, max(0, limit - (used or 0)))
    return Machine(
        processor=processor or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        flags=flags,
        memory=memory,
        memory_available=available,
    )


def kv_share(machine: Machine, holders: int) -> int:
    """Default KV memory in bytes for each of `holders` on one machine: together a quarter of what is available."""
    return max(1 << 28, (machine.memory_available or 4 << 30) // (_KV_SHARE * holders))


def native_dtype(machine: Machine) -> tuple[str, str]:
    """The dtype that "auto" means on this CPU, and why: bfloat16 where it has instructions for it, else float32."""
    # Names of /proc/cpuinfo: AVX512_BF16 and AMX on x86, FEAT_BF16 on ARM.
    for flag in ("amx_bf16", "avx512_bf16", "bf16"):
        if flag in machine.flags:
            return "bfloat16", f"the processor has {flag}"
    return "float32", "the processor has no bfloat16 instructions that the system reports"


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """The model name and the feature flags of the first processor in the text of /proc/cpuinfo; empty where absent."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""  # x86, ARM
    return fields.get("model name", ""), frozenset(flags.split())


def parse_meminfo(text: str) -> tuple[int, int]:
    """Total and available memory in bytes from the text of /proc/meminfo, whose unit is KiB; 0 where absent."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def in_bytes(name: str) -> int:
        words = fields.get(name, "").split()
        return int(words[0]) * 1024 if words and words[0].isdigit() else 0

    return in_bytes("MemTotal"), in_bytes("MemAvailable")


def _number(text: str) -> int | None:
    """The number in the text of a control group's file; None where there is none, or no limit."""
    return int(text) if text.strip().isdigit() else None


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""
