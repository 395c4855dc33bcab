"""What can be wrong with a model's files, and at a holder."""

from __future__ import annotations

from lamina_protocols.errors import LaminaError


class ModelFileError(LaminaError):
    """A model's file is missing, malformed, refused, or contradicts another."""


class DiskFullError(ModelFileError):
    """There was no room to write a model's files. Nothing half-written is left; the `OSError` is the cause."""


class UnsupportedModelError(LaminaError):
    """The model is well formed, but uses something that Lamina does not implement."""


class KernelsUnavailable(LaminaError):
    """The attention kernels that were asked for cannot run in this process."""


class PolicyError(LaminaError):
    """A KV policy is unknown, its parameters contradict, or it does not fit the model."""


class KVError(LaminaError):
    """A holder was asked for something its parts do not allow; nothing has changed."""


class PoolExhausted(KVError):
    """A batch needs more pages than are free; nothing has changed."""


class HolderFault(LaminaError):
    """A holder could not go on with a batch. Nothing of the batch is recorded; it can run again."""


class HolderLost(HolderFault):
    """A holder is gone, and its KV with it: its channel closed, its session ended, or a deadline passed."""
