"""The exception tree. Every error that Lamina raises on purpose is a `LaminaError`.

LaminaError
├── InvalidRequest            a bad argument; a ValueError too
│   └── ContextTooLong        a prompt and its output do not fit into the context or the KV memory
├── ModelFileError            a model's file is missing, malformed, refused, or contradicts another
│   └── DiskFullError         there was no room to write a model's files
├── UnsupportedModelError     the model is well formed, but Lamina does not implement it
├── PolicyError               a KV policy is unknown, contradicts itself, or is for another model
├── KernelsUnavailable        the attention kernels that LAMINA_KERNELS names cannot run here
├── DeviceError               a device's name is wrong, or there is no such device; a ValueError too
├── NotEnoughMemory           a device has too little memory for weights or KV
├── RanksError                a model cannot be cut among that many model workers; a ValueError too
├── EngineError               the engine stopped, or could not go on with this request
│   └── WorkersUnavailable    an engine cannot start: no attention worker can be reached
├── JournalError              a journal is damaged, in use, or of another engine
├── HolderFault               a holder could not go on with a batch (the engine runs it again)
│   ├── HolderLost            a holder is gone (the engine rebuilds its KV elsewhere)
│   └── RankLost              a model worker that shares the model is gone or silent (it is started again)
├── KVError                   a holder got an operation that its parts do not allow
│   └── PoolExhausted         a batch needs more pages than are free (the scheduler makes room)
├── WorkerUnreachable         no attention worker answers at an address; it may do so later
├── WorkerRefused             a worker refuses: another version, model or dtype, a wrong token, draining
│   └── WorkerBusy            it has a session with another engine
├── ServerError               an attention worker cannot serve with its settings, or not at that address
├── CredentialsError          certificates or a token are missing, unreadable or wrong
├── JoinFailed                this machine cannot join a server: none is there, it refuses, or the codes differ
├── JoinRefused               a server does not want this machine, and says why
├── NoDiscovery               multicast DNS cannot be used here
├── ChannelClosed             the other side of a channel is gone
├── AddressError              an address is not HOST:PORT
└── ProtocolError             a frame or message is malformed, too large, or out of order
    └── CorruptFrame          its bits have changed on the way

`Interrupted`, Ctrl-C during `generate`, is a KeyboardInterrupt and stands beside `Completion`.
"""

from __future__ import annotations

import reprlib
from itertools import islice
from typing import Any

from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_workers.errors import (
    DeviceError,
    DiskFullError,
    KernelsUnavailable,
    ModelFileError,
    NotEnoughMemory,
    PolicyError,
    RanksError,
    UnsupportedModelError,
)

__all__ = [
    "ContextTooLong",
    "DeviceError",
    "DiskFullError",
    "EngineError",
    "InvalidRequest",
    "JournalError",
    "KernelsUnavailable",
    "LaminaError",
    "ModelFileError",
    "NotEnoughMemory",
    "PolicyError",
    "ProtocolError",
    "RanksError",
    "UnsupportedModelError",
    "WorkersUnavailable",
    "cut",
]


class InvalidRequest(LaminaError, ValueError):
    """A request cannot be served as given. The message names the argument, the value and what is allowed."""


class ContextTooLong(InvalidRequest):
    """A prompt and its output make more tokens than a sequence can have. The message is worded as OpenAI's."""

    def __init__(self, limit: int, prompt: int, max_tokens: int, why: str = "") -> None:
        limited = f"This model's maximum context length is {limit} tokens{f' ({why})' if why else ''}"
        parts = f"({prompt} in the prompt, {max_tokens} for the completion)"
        super().__init__(f"{limited}. However, you requested {prompt + max_tokens} tokens {parts}. Ask for less")


class EngineError(LaminaError):
    """The engine stopped, or could not go on with this request. The first error is its `__cause__`."""


class WorkersUnavailable(EngineError):
    """An engine cannot start now: no attention worker can be reached."""


class JournalError(LaminaError):
    """A journal cannot be used: it is damaged, of another engine, in use, or its folder cannot be written to."""


class _Short(reprlib.Repr):
    """`repr` of the beginning of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)  # it would sort all of them

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"  # else an error in Python


_SHORT = _Short()


def cut(value: object) -> str:
    """A value as code, for an error message: 80 characters at most, and no more is made of a value of megabytes."""
    return _SHORT.repr(value)[:80]
