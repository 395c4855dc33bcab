"""How much of this machine's cores others use, while this process and its children wait. Read from /proc/stat."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

_IDLE, _WAITING, _COUNTED = 3, 4, 8  # fields of /proc/stat's first line: idle, iowait; guests are counted in others


def busy(
    seconds: float = 0.2, read: Callable[[], str] | None = None, sleep: Callable[[float], None] = time.sleep
) -> float:
    """The share of all cores that was used over that time, 0 to 1; 0 where the system does not report it."""
    read = read or _stat
    before = _jiffies(read())
    sleep(seconds)
    after = _jiffies(read())
    total = after[1] - before[1]
    return min(1.0, max(0.0, (after[0] - before[0]) / total)) if total > 0 else 0.0


def _stat() -> str:
    try:
        return Path("/proc/stat").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return ""


def _jiffies(text: str) -> tuple[int, int]:
    """Used ones and all, of all cores together, since the system started."""
    fields = [int(word) for word in text.partition("\n")[0].split()[1 : _COUNTED + 1] if word.isdigit()]
    if len(fields) <= _WAITING:
        return 0, 0
    return sum(fields) - fields[_IDLE] - fields[_WAITING], sum(fields)
