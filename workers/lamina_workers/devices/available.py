"""Devices by name: whether torch finds the one that a name means, and what memory is left there."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lamina_workers.devices.names import check_names
from lamina_workers.errors import DeviceError, NotEnoughMemory


def gpu_count() -> int:
    """How many GPUs torch finds here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def find(what: str, name: str, prefer_gpu: bool = True) -> torch.device:
    """The device of that name. "auto" is the first GPU, where one is preferred and there is one, else the CPU; "cuda"
    is the first GPU. Raises DeviceError for a malformed name, and for a GPU that torch does not find."""
    return find_each(what, name, 1, prefer_gpu)[0]


def find_each(what: str, names: str | Sequence[str], count: int, prefer_gpu: bool = True) -> tuple[torch.device, ...]:
    """A device for each of `count` workers, as `find` does for one.

    "cuda" is a GPU each, "cuda:0" to "cuda:<count - 1>"; so is "auto" where GPUs are preferred and there are enough.
    A sequence names the device of each. Raises DeviceError where there are fewer GPUs than workers, or one GPU is
    named for several.
    """
    names, gpus = check_names(what, names), gpu_count()
    if isinstance(names, tuple):
        if len(names) != count:
            raise DeviceError(f"{what} names {len(names)} devices for {count} workers; allowed is one for each")
        devices = [find(what, name, prefer_gpu) for name in names]
        twice = [str(device) for device in devices if device.type == "cuda" and devices.count(device) > 1]
        if twice:
            raise DeviceError(f"{what} names {twice[0]} more than once; allowed is one worker a GPU")
        return tuple(devices)
    if names == "auto":
        names = "cuda" if prefer_gpu and gpus >= max(1, count) else "cpu"
    if names == "cpu":
        return (torch.device("cpu"),) * count
    if names == "cuda":
        if gpus < count:
            raise DeviceError(f"{what} is 'cuda' for {count} worker{'s' * (count > 1)}, a GPU each; {_there(gpus)}")
        return tuple(torch.device("cuda", index) for index in range(count))
    device = torch.device(names)
    if device.index >= gpus:
        raise DeviceError(f"{what} is {names!r}; {_there(gpus)}")
    if count > 1:
        raise DeviceError(f"{what} is {names!r} for {count} workers; allowed are cpu, cuda, or a name for each worker")
    return (device,)


def _there(gpus: int) -> str:
    """What torch finds, and what is therefore allowed."""
    if not gpus:
        return "torch finds no GPU here; allowed are cpu and auto"
    last = "" if gpus == 1 else f" to cuda:{gpus - 1}"
    return f"torch finds {gpus} GPU{'s' if gpus > 1 else ''} here; allowed are auto, cpu, cuda and cuda:0{last}"


def memory_available(device: torch.device) -> int | None:
    """Bytes that can still be taken there; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return None
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


@contextmanager
def room_for(what: str, wanted: int | Callable[[], int], device: torch.device) -> Iterator[None]:
    """For code that takes `wanted` bytes, or as many as that says, for `what`: raises NotEnoughMemory, which names all
    three, where it fails for want of memory."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not _lacks_memory(error):
            raise
        free_bytes = memory_available(device)
        count = wanted if isinstance(wanted, int) else wanted()
        free_text = "an unknown number of" if free_bytes is None else str(free_bytes)
        raise NotEnoughMemory(
            f"not enough memory on {device} for {what}: {count} bytes wanted, {free_text} bytes are there"
        ) from error


def _lacks_memory(error: BaseException) -> bool:
    """Whether a GPU or the host lacked memory; torch has no error type for the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return any(words in str(error).lower() for words in ("not enough memory", "can't allocate memory", "out of memory"))
