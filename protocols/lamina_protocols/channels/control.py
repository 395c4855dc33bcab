"""The messages of the unary calls: handshake, heartbeat, goodbye, status.

Each is a msgpack array of its fields. An error that refuses a handshake names the field and both values.
"""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeAlias, TypeVar

import msgpack

from lamina_protocols.channels.channels import SECRET_SIZE
from lamina_protocols.channels.versions import (
    PREVIOUS,
    PREVIOUS_RELEASE,
    PROTOCOL_VERSION,
    check_features,
    check_neighbours,
)
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames.fields import Record, Since, shown, unpack_array
from lamina_protocols.messages.layers import LayerSpec

MAX_CONTROL = 1 << 20  # bytes; a Hello of 1,000 layers takes 40 kB
DATA_CHANNELS = ("grpc", "tcp")
FAREWELL = (0, 0)  # the epoch and batch of a Fault that ends the session; no batch has them
CORRUPT = (0, 1)  # the same, where a frame of the engine's came with changed bits

M = TypeVar("M")


def _check_port(value: int) -> None:
    if not 0 < value < 1 << 16:
        raise ProtocolError(f"port {value}, allowed: 1 to 65535")


def _check_secret(value: bytes) -> None:
    if len(value) != SECRET_SIZE:
        raise ProtocolError(f"a secret of {len(value)} bytes, it has {SECRET_SIZE}")


Port: TypeAlias = Annotated[int, _check_port]
Secret: TypeAlias = Annotated[bytes, _check_secret]
Features: TypeAlias = Annotated[tuple[str, ...], check_features, Since(8)]


@functools.cache
def package_version() -> str:
    return importlib.metadata.version("lamina")


@dataclass(frozen=True, slots=True)
class Hello:
    """An engine asks for a channel to a seat: its identity, what it will send, and the channels that it supports.

    `session` names the channel; the engine chooses it at random. `engine` is the engine's id, in hexadecimal. `seat` is
    the number of one of its seats; each has an attention worker of its own with `share` (part, of) of the memory. The
    seat's KV is kept for `linger` seconds without a channel. `model` is the fingerprint of the model's config.
    `compute_dtype` is the dtype of queries and outputs, `kv_dtype` that of stored KV. `local_channel` allows a Unix
    socket. `sequence_tokens` and `sketches` are those of a `HolderConfig`. `features` are those of `versions` that the
    engine has. `blocks` and `tables` are those of a `BlockConfig`; no blocks: the worker owns its pages.
    """

    protocol: int
    version: str
    session: str
    model: str
    compute_dtype: str
    kv_dtype: str
    page_size: int
    layers: tuple[LayerSpec, ...]
    local_channel: bool
    data_channel: str
    engine: str
    seat: int
    share: tuple[int, ...]
    linger: float
    sequence_tokens: int = 4096
    sketches: bool = False
    features: Features = ()
    blocks: Annotated[int, Since(8)] = 0
    tables: Annotated[tuple[int, ...], Since(8)] = ()


@dataclass(frozen=True, slots=True)
class LocalOffer:
    """A Unix socket of the worker's host, and the secret to send there first."""

    path: str
    secret: Secret = field(repr=False)


@dataclass(frozen=True, slots=True)
class TcpOffer:
    """A port of the address that was called, and the secret to send there first."""

    port: Port
    secret: Secret = field(repr=False)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The session has begun. `kv_memory` of the seat is in bytes. `lease` is in seconds: a channel without a sign of
    life is kept that long. `resumed`: the seat existed already, with its KV. `page_layout` describes how its pages are
    laid out, in all pools; pages can be copied unchanged between holders with the same layout. `features` are those
    that both sides have."""

    name: str
    kv_memory: int
    threads: int
    lease: float
    max_frame: int
    local: LocalOffer | None
    tcp: TcpOffer | None
    resumed: bool
    page_layout: str
    features: Features = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The engine of this session is alive."""

    session: str


@dataclass(frozen=True, slots=True)
class Alive:
    """The worker is alive. `state`: "serving", "draining", or "ended" where it has no such session any more."""

    state: str


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The engine ends this session. If it is the seat's last channel, the seat's KV is freed at once, not after
    `linger`."""

    engine: str
    seat: int
    session: str


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """Asks for a `WorkerStatus`."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker is, what it holds, and what it has done since it started. Times in seconds, sizes in bytes.

    `session`: an engine, whose id begins with `engine`, has `seats` here. Of these, `lingering` have no channel; the
    first of them is freed after `linger_left` seconds more. `channel` names the kinds of the `channels`. `parts` counts
    parts; `heads` are the KV heads and [lo, hi) the positions that any part holds. `queries` counts query vectors
    attended, `stored` K vectors stored, `busy` the seconds spent on messages.
    """

    name: str
    version: str
    model: str
    session: bool
    session_age: float
    engine: str
    seats: int
    channels: int
    lingering: int
    linger_left: float
    draining: bool
    channel: str
    kv_memory: int
    parts: int
    heads: tuple[int, ...]
    lo: int
    hi: int
    free_pages: int
    total_pages: int
    batches: int
    queries: int
    stored: int
    bytes_in: int
    bytes_out: int
    busy: float
    uptime: float


_RECORDS: dict[type, Record] = {
    cls: Record.of(cls) for cls in (Hello, Welcome, Heartbeat, Alive, Goodbye, StatusRequest, WorkerStatus)
}


def pack(message: Any) -> bytes:
    data: bytes = msgpack.packb(_RECORDS[type(message)].pack(message))
    if len(data) > MAX_CONTROL:
        raise ProtocolError(f"{type(message).__name__} of {len(data)} bytes, allowed: {MAX_CONTROL}")
    return data


def unpack(cls: type[M], data: bytes) -> M:
    """A control message of the type `cls`. Raises ProtocolError for anything else.

    A Hello begins with the version of its protocol, which is checked first. Fields that a newer version has at its end
    are not read.
    """
    if len(data) > MAX_CONTROL:
        raise ProtocolError(f"{cls.__name__} of {len(data)} bytes, allowed: {MAX_CONTROL}")
    values = unpack_array(data)
    record = _RECORDS[cls]
    if cls is Hello and values:
        check_neighbours(values[0], PROTOCOL_VERSION)
        values = values[: len(record.fields)] if values[0] > PROTOCOL_VERSION else values
    message: M = record.unpack(values)
    return message


def as_previous(hello: Hello) -> Hello:
    """The same, as a worker of the previous version understands it."""
    return replace(hello, protocol=PREVIOUS, version=PREVIOUS_RELEASE, features=())


def check(what: str, theirs: object, ours: object) -> None:
    """Raise ProtocolError naming both values where they differ."""
    if theirs != ours:
        raise ProtocolError(f"{what}: the engine has {shown(theirs)}, this worker {shown(ours)}")
