"""This machine as the system describes it (`this_machine`): processor, cores, memory. Importing this loads no torch.

`on_all_cores` uses the cores. It calls one function on many things, in processes that are forked off this one and end
with the last thing.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")

_todo: tuple[Callable[[Any], Any], list[Any]]  # of a process of the pool

_GROUPS = "/sys/fs/cgroup"
_KV_SHARE = 4  # of the available memory, one part in so many


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` counts the cores that this process may use: those it may run on, or fewer where its control group has a
    quota of processor time. `memory` and `memory_available` are in bytes, 0 where unknown. A container's limits count
    as the machine's."""

    processor: str
    cores: int
    flags: frozenset[str]
    memory: int
    memory_available: int


def this_machine() -> Machine:
    processor, flags = parse_cpuinfo(_text_of("/proc/cpuinfo"))
    memory, available = parse_meminfo(_text_of("/proc/meminfo"))
    cores = _cores()
    for group in control_groups(_text_of("/proc/self/cgroup")):
        limit, used = (_number(_text_of(f"{group}/memory.{name}")) for name in ("max", "current"))
        if limit is not None and limit < memory:
            given_back = _files(_text_of(f"{group}/memory.stat"))
            memory, available = limit, min(available, max(0, limit - (used or 0) + given_back))
        cores = min(cores, quota_of(_text_of(f"{group}/cpu.max")) or cores)
    first = " ".join(_text_of(f"{_GROUPS}/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))  # version 1
    cores = min(cores, quota_of(first) or cores)
    return Machine(
        processor=processor or platform.processor() or platform.machine(),
        cores=cores,
        flags=flags,
        memory=memory,
        memory_available=available,
    )


def kv_share(machine: Machine, holders: int, weights: int = 0) -> int:
    """Default KV memory in bytes for each of `holders` on one machine: together a quarter of what is available, or half
    of what `weights` bytes leave of it, if that is less."""
    available = machine.memory_available or 4 << 30
    return max(1 << 28, min(available // _KV_SHARE, (available - weights) // 2) // holders)


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


def control_groups(text: str) -> list[str]:
    """The folders of this process's control group (version 2) and of those around it, whose limits hold too, from the
    text of /proc/self/cgroup. A container sees its own group as the root."""
    path = next((line[3:] for line in text.splitlines() if line.startswith("0::/")), "/")
    names = [name for name in path.split("/") if name not in ("", ".", "..")]
    return ["/".join([_GROUPS, *names[:depth]]) for depth in range(len(names) + 1)]


def _files(text: str) -> int:
    """Bytes of files that a control group keeps in memory as long as there is room, from the text of its memory.stat:
    after a model was read from its file, about as many as the file has."""
    fields = dict(line.split() for line in text.splitlines() if line.count(" ") == 1)
    return sum(_number(fields.get(f"{name}_file", "")) or 0 for name in ("active", "inactive"))


def quota_of(text: str) -> int | None:
    """How many cores the text of a control group's cpu.max allows, such as "200000 100000" for two: whole ones, at
    least one. None where there is no limit."""
    words = text.split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or not int(words[1]):
        return None
    return max(1, int(words[0]) // int(words[1]))


def _number(text: str) -> int | None:
    """The number in the text of a control group's file; None where there is none, or no limit."""
    return int(text) if text.strip().isdigit() else None


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""


def on_all_cores(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """As `map`: the results in order, each as soon as those before it are there. What the function changes in memory is
    lost. One after another where there is one core, or one thing; and on systems where a fork is not safe."""
    every = list(items)
    processes = min(len(every), _cores())
    if processes < 2 or not sys.platform.startswith("linux"):
        yield from map(function, every)
        return
    # A fork has function and items as they are, closures too; results alone are sent.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, _begin, (function, every))
    try:
        yield from pool.map(_do, range(len(every)), chunksize=max(1, len(every) // (16 * processes)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(function: Callable[[Any], Any], items: list[Any]) -> None:
    global _todo
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; this one's parent ends it
    _todo = function, items


def _do(number: int) -> Any:
    function, items = _todo
    return function(items[number])
