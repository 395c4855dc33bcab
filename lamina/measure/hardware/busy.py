"""How much of this machine's cores others use: while this process and its children wait, or beside a tree of
processes. Read from /proc; where the system does not report it, nobody else is at work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_IDLE, _WAITING, _COUNTED = 3, 4, 8  # fields of /proc/stat's first line: idle, iowait; guests are counted in others
_PARENT, _USED = 1, slice(11, 15)  # fields of /proc/PID/stat behind the name; own and waited-for children's jiffies


def busy(
    seconds: float = 0.2, read: Callable[[], str] | None = None, sleep: Callable[[float], None] = time.sleep
) -> float:
    """The share of all cores that was used over that time, 0 to 1."""
    read = read or _stat
    before = _jiffies(read())
    sleep(seconds)
    after = _jiffies(read())
    total = after[1] - before[1]
    return min(1.0, max(0.0, (after[0] - before[0]) / total)) if total > 0 else 0.0


class Beside:
    """What others use beside the processes of these ids and all their descendants, from now on."""

    def __init__(self, *roots: int, proc: Path = Path("/proc")) -> None:
        self._roots, self._proc = roots, proc
        self._before = self._read()

    def share(self) -> float:
        """Of all cores, since the beginning, 0 to 1."""
        now = self._read()
        tree, used, total = (after - before for after, before in zip(now, self._before, strict=True))
        return min(1.0, max(0.0, (used - tree) / total)) if total > 0 else 0.0

    def _read(self) -> tuple[int, int, int]:
        """Jiffies: of the processes, of all that is used, of all there are."""
        used, total = _jiffies(_stat(self._proc))
        return _of_tree(self._roots, self._proc), used, total


def _of_tree(roots: tuple[int, ...], proc: Path) -> int:
    """Jiffies of processes and their descendants, those of ended ones included that somebody waited for."""
    parents: dict[int, int] = {}
    jiffies: dict[int, int] = {}
    with suppress(OSError):
        for name in os.listdir(proc):
            if not name.isdecimal():
                continue
            with suppress(OSError, ValueError, IndexError):  # it has ended
                fields = (proc / name / "stat").read_text(errors="replace").rpartition(")")[2].split()
                parents[int(name)] = int(fields[_PARENT])
                jiffies[int(name)] = sum(map(int, fields[_USED]))
    total = 0
    for number, used in jiffies.items():
        ancestor, visited = number, set[int]()
        while ancestor not in roots and ancestor in parents and ancestor not in visited:
            visited.add(ancestor)
            ancestor = parents[ancestor]
        total += used if ancestor in roots else 0
    return total


def _stat(proc: Path = Path("/proc")) -> str:
    try:
        return (proc / "stat").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return ""


def _jiffies(text: str) -> tuple[int, int]:
    """Used ones and all, of all cores together, since the system started."""
    fields = [int(word) for word in text.partition("\n")[0].split()[1 : _COUNTED + 1] if word.isdigit()]
    if len(fields) <= _WAITING:
        return 0, 0
    return sum(fields) - fields[_IDLE] - fields[_WAITING], sum(fields)
