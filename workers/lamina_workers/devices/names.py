"""How names of devices are written. Importing this file imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lamina_workers.errors import DeviceError

ALLOWED = "auto, cpu, cuda and cuda:N"
MAX_GPUS = 64

_NAME = re.compile(r"auto|cpu|cuda(?::(\d{1,2}))?")


def check_name(what: str, name: object) -> None:
    """Raise DeviceError unless `name` is written as a device is; `available.find` says whether there is one. The error
    calls it `what`."""
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or int(match[1] or 0) >= MAX_GPUS:
        raise DeviceError(f"{what} is {name!r:.80}; allowed are {ALLOWED}, N from 0 to {MAX_GPUS - 1}")


def check_names(what: str, names: str | Sequence[str]) -> str | tuple[str, ...]:
    """The names, frozen, each checked: one for all workers, or one for each. Raises DeviceError."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        check_name(what, names)
        return str(names)
    for name in names:
        check_name(what, name)
    if not names:
        raise DeviceError(f"{what} names no device; allowed are {ALLOWED}, or one of these for each worker")
    return tuple(names)
