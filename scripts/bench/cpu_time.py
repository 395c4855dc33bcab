"""Processor time of processes and of the whole machine, and waiting until others leave the machine alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

SAMPLE = 0.3  # seconds over which the machine is watched
FIRST = -15  # the niceness of a session that goes before others
TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process of this host; 0 where it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the clock of a process, as clock_getcpuclockid numbers it
    except OSError:
        return 0.0


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[1]) == parent:
            found.append(int(folder.name))
    return found


def family_seconds(pid: int) -> float:
    """User and system time of a process and of those that it has started."""
    return sum(cpu_seconds(each) for each in (pid, *children(pid)))


def go_first(pid: int) -> None:
    """Let the session of a process, and those of the processes that it has started, go before all others.

    For root, where Linux schedules by sessions: in these autogroups plain niceness counts only among their own.
    """
    for each in (pid, *children(pid)):
        Path(f"/proc/{each}/autogroup").write_text(str(FIRST))


def busy_seconds() -> float:
    """How long the cores of this machine were not idle since it was started, summed over cores; what a host took away
    from them counts."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICK


def wait_until_quiet(cores: float, patience: float = 15.0) -> None:
    """Wait until no more than so many cores are busy, `patience` seconds at most."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        before, since = busy_seconds(), time.monotonic()
        time.sleep(SAMPLE)
        if busy_seconds() - before <= cores * (time.monotonic() - since):
            return
