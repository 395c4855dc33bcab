"""What crosses the connection between callers and an engine: commands one way, events the other.

A message is a msgpack array: its number, then its fields, see `lamina_protocols.frames.fields`. Several messages are an
array of these. Times are seconds since the request was submitted, as the clocks differ.

`RequestOutputs`, of which there is one for each token, has no number and is packed by hand: it begins with text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgpack

from lamina.completions import FinishReason
from lamina.kv.prefix_nodes import BlocksCleared, BlocksRemoved, BlocksStored
from lamina.kv.request import Request
from lamina.messages.engine_request import Received
from lamina.messages.request_codec import PackedOutput, decode_request, encode_params, encode_request
from lamina.messages.snapshot import Snapshot
from lamina.sampling_params import SamplingParams
from lamina.system.progress import Progressed
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames.fields import Field, field_of, shown

_BATCH = 1 << 20  # bytes of commands that are packed together


def _named(pack: Callable[[Any], dict[str, Any]], build: Callable[[dict[str, Any]], object]) -> Field:
    """A field that crosses as a dict: what only one side knows fails by its name."""

    def unpack(value: Any) -> Any:
        if not isinstance(value, dict):
            raise ProtocolError(f"expected fields by name, got {shown(value)}")
        try:
            return build(value)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"fields {shown(value)} are refused: {error!r}") from error

    return Field(pack, unpack)


def _as_it_is(cls: Any) -> Field:
    """A NamedTuple that is made for each token or block: msgpack packs it, and only the number of its fields is
    checked."""
    make, names = cls._make, cls._fields

    def unpack(values: Any) -> Any:
        try:
            return make(values)
        except TypeError as error:
            raise ProtocolError(f"{cls.__name__} has the fields {', '.join(names)}, got {shown(values)}") from error

    return Field(lambda values: values, unpack)


def _unpack_seed(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ProtocolError(f"expected a seed from 0 to 2^64 - 1, got {shown(value)}")
    return value


# Commands.


@dataclass(frozen=True, slots=True)
class Submit:
    """Begin a request; with `received`, of each sample, go on with one that another engine began."""

    request: Annotated[Request, _named(encode_request, decode_request)]
    params: Annotated[SamplingParams, _named(encode_params, lambda fields: SamplingParams(**fields))]
    seed: Annotated[int, Field(int, _unpack_seed)]
    received: tuple[Received, ...] | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request, or one sample of it."""

    id: str
    sample: int | None
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """Answer with a `SnapshotTaken` of this number."""

    number: int


@dataclass(frozen=True, slots=True)
class FollowPrefixes:
    """Send `PrefixChanged` from now on, first for all that the prefix cache has."""


@dataclass(frozen=True, slots=True)
class CloseEngine:
    """Stop the engine."""


Command: TypeAlias = Submit | Abort | TakeSnapshot | FollowPrefixes | CloseEngine


# Events.


class RequestOutputs(NamedTuple):
    """The outputs of one batch for a request, and what was counted for the request so far. `spared` is a `KvSavings`,
    or empty where no policy saved any."""

    id: str
    outputs: Sequence[PackedOutput]
    scheduled: float | None
    cached_tokens: int
    preemptions: int
    spared: tuple[float, ...]
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """So many tokens of the prompt are computed."""

    id: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """The answer to `TakeSnapshot`; its times are of the engine's clock."""

    number: int
    snapshot: Annotated[Snapshot, _named(Snapshot.as_dict, Snapshot.from_dict)]


@dataclass(frozen=True, slots=True)
class PrefixChanged:
    """Something happened in the prefix cache."""

    event: (
        Annotated[BlocksStored, _as_it_is(BlocksStored)]
        | Annotated[BlocksRemoved, _as_it_is(BlocksRemoved)]
        | BlocksCleared
    )


@dataclass(frozen=True, slots=True)
class Logged:
    """A line for the log of the engine's caller."""

    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Halted:
    """Nothing can be computed at present, or it can again."""

    halted: bool


@dataclass(frozen=True, slots=True)
class Stopped:
    """The engine has stopped for good."""

    why: str


_NumberedEvent: TypeAlias = Prefilled | Progressed | SnapshotTaken | PrefixChanged | Logged | Halted | Stopped
Event: TypeAlias = RequestOutputs | _NumberedEvent

_COMMAND = field_of(Command)
_OUTPUTS = _as_it_is(RequestOutputs)
_EVENT = field_of(_NumberedEvent)


def pack_commands(commands: Iterable[Command]) -> Iterator[bytes]:
    """The commands in order, several together: at most 1 MiB, or one command that is larger."""
    batch: list[bytes] = []
    size = 0
    for command in commands:
        packed: bytes = msgpack.packb(_COMMAND.pack(command))
        if batch and size + len(packed) > _BATCH:
            yield _joined(batch)
            batch, size = [], 0
        batch.append(packed)
        size += len(packed)
    if batch:
        yield _joined(batch)


def _joined(items: list[bytes]) -> bytes:
    header: bytes = msgpack.Packer().pack_array_header(len(items))
    return b"".join((header, *items))


def unpack_commands(packed: bytes | memoryview) -> tuple[Command, ...]:
    """The commands of `pack_commands`. Raises ProtocolError for anything malformed."""
    return tuple(_COMMAND.unpack(message) for message in unpack(packed))


def pack_events(events: Iterable[Event]) -> bytes:
    packed: bytes = msgpack.packb([event if type(event) is RequestOutputs else _EVENT.pack(event) for event in events])
    return packed


def unpack_events(packed: bytes | memoryview) -> tuple[Event, ...]:
    """The events of `pack_events`. Raises ProtocolError for anything malformed."""
    return tuple([(_OUTPUTS if _is_outputs(message) else _EVENT).unpack(message) for message in unpack(packed)])


def _is_outputs(message: Any) -> bool:
    return type(message) is tuple and len(message) > 0 and type(message[0]) is str


def unpack(packed: bytes | memoryview) -> tuple[Any, ...]:
    """A msgpack array, with tuples for all arrays in it. Raises ProtocolError."""
    try:
        value = msgpack.unpackb(packed, use_list=False, strict_map_key=False)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"messages are malformed: {error}") from error
    if not isinstance(value, tuple):
        raise ProtocolError(f"messages are a {type(value).__name__}, expected a sequence")
    return value
