"""What can be wrong with a model's files, and at a holder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lamina_protocols.errors import LaminaError


class ModelFileError(LaminaError):
    """A model's file is missing, malformed, refused, or contradicts another."""


class DiskFullError(ModelFileError):
    """There was no room to write a model's files. Nothing half-written is left; the `OSError` is the cause."""


class UnsupportedModelError(LaminaError):
    """The model is well formed, but uses something that Lamina does not implement."""


class KernelsUnavailable(LaminaError):
    """The attention kernels that were asked for cannot run in this process."""


class DeviceError(LaminaError, ValueError):
    """A device's name is malformed, or there is no such device."""


class NotEnoughMemory(LaminaError):
    """A device has too little memory for weights or KV. The failed allocation is the cause."""


class RanksError(LaminaError, ValueError):
    """A model cannot be cut among that many model workers."""


class PolicyError(LaminaError):
    """A KV policy is unknown, its parameters contradict, or it does not fit the model."""


class KVError(LaminaError):
    """A holder was asked for something its parts do not allow; nothing has changed."""


class PoolExhausted(KVError):
    """A batch needs more pages than are free; nothing has changed."""


class TornParts(KVError):
    """Rows need KV that has not come in every layer, or that was let go; nothing has changed. `starts` has, for each
    row of the batch, where it can start at most; 0 where it must begin anew."""

    def __init__(self, starts: tuple[int, ...]) -> None:
        super().__init__(f"KV that the rows need is not there; they can start at {starts}")
        self.starts = starts


class HolderFault(LaminaError):
    """A holder could not go on with a batch. Nothing of the batch is recorded; it can run again."""


class RankLost(HolderFault):
    """A model worker that shares the model is gone or silent: its connection closed, or a deadline passed. No KV at
    attention workers is lost by that."""


class HolderLost(HolderFault):
    """A holder is gone, and its KV with it: its channel closed, its session ended, or a deadline passed. `holders` are
    the numbers of those that still answer, but are given up."""

    def __init__(self, why: str, holders: Iterable[int] = ()) -> None:
        super().__init__(why)
        self.holders = tuple(holders)


@contextmanager
def faults() -> Iterator[None]:
    """Any error in here, a failed allocation too, is raised as a HolderFault: it ends a batch, and no process."""
    try:
        yield
    except HolderFault:
        raise
    except Exception as error:
        raise HolderFault(f"{type(error).__name__}: {error}") from error
