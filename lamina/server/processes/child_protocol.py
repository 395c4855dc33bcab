"""The messages between a server's children and their supervisor.

Each message is a dataclass. On a pipe it is a line: a JSON array of a word, by which the receiver knows the dataclass,
and of its fields in order, see `lamina_protocols.frames.fields`. A child receives on stdin, and sends on what was its
stdout; anything else printed there goes to stderr instead.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeAlias, TypeVar

from lamina.deploy.relayed_attention import Drained, Grow, Lost, Retire
from lamina.deploy.worker_events import WorkerAddress
from lamina.system.logs import configure
from lamina.system.progress import Progressed
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.frames.fields import Field, Record, as_it_is
from lamina_workers.process.exit import die_with_parent


def _pack_workers(workers: tuple[WorkerAddress, ...]) -> list[Any]:
    credentials = [worker.credentials or Credentials() for worker in workers]
    return [
        [worker.name, worker.address, known_by.token, worker.capacity, known_by.ca.decode(), worker.at]
        for worker, known_by in zip(workers, credentials, strict=True)
    ]


def _unpack_workers(items: Any) -> tuple[WorkerAddress, ...]:
    return tuple(
        WorkerAddress(name, address, Credentials(ca=ca.encode(), token=token), capacity, place)
        for name, address, token, capacity, ca, place in items
    )


Object: TypeAlias = Annotated[dict[str, Any], as_it_is(dict, "dict")]

# To an engine.


@dataclass(frozen=True, slots=True)
class Prepare:
    """Perhaps the first message: import what every model needs."""

    needs_workers: bool


@dataclass(frozen=True, slots=True)
class StartEngine:
    """The model to load, with the keywords of its `EngineConfig`, and where to listen. With `waits`, `Workers` follow;
    with `needs_workers` there is at least one."""

    model: str
    config: Object
    socket: str
    secret: str
    waits: bool
    needs_workers: bool


@dataclass(frozen=True, slots=True)
class Workers:
    """The attention workers that are there now."""

    workers: Annotated[tuple[WorkerAddress, ...], Field(_pack_workers, _unpack_workers)]


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """A worker is to go; `Drained` is the answer."""

    name: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End in order."""


# From an engine; its wishes are those of `lamina.deploy.relayed_attention`.


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine serves; the facts are what the HTTP process needs to know of its model."""

    facts: Object


@dataclass(frozen=True, slots=True)
class Failed:
    """The child cannot start: the name of an error's type, and its text."""

    kind: str
    why: str


@dataclass(frozen=True, slots=True)
class Possible:
    """The longest sequence that there is room for, in tokens, has changed."""

    tokens: int


# To the HTTP process.


@dataclass(frozen=True, slots=True)
class StartHttp:
    """The first message: the fields of `ServerSettings`, the listening descriptor, and the secret of all engines."""

    settings: Object
    descriptor: int
    secret: str


@dataclass(frozen=True, slots=True)
class EngineLoading:
    """A model is being loaded; `progress` is for people."""

    model: str
    progress: str


@dataclass(frozen=True, slots=True)
class EngineReady:
    """A model's engine serves."""

    model: str
    facts: Object


@dataclass(frozen=True, slots=True)
class EnginePossible:
    """`Possible` of a model's engine."""

    model: str
    tokens: int


@dataclass(frozen=True, slots=True)
class EngineDead:
    """A model's engine has ended, and is started again."""

    model: str
    why: str


@dataclass(frozen=True, slots=True)
class EngineUnloaded:
    """A model is not loaded: as was wanted, or for a reason."""

    model: str
    why: str


@dataclass(frozen=True, slots=True)
class MachinesChanged:
    """The machines that join, for `lamina.server.machines`."""

    machines: Annotated[list[dict[str, Any]], as_it_is(list, "list")]


@dataclass(frozen=True, slots=True)
class DrainRequests:
    """Let requests under way end within so many seconds, and end."""

    seconds: float


# From the HTTP process.


@dataclass(frozen=True, slots=True)
class Serving:
    """It listens."""


@dataclass(frozen=True, slots=True)
class Connected:
    """It reaches the engine of a model."""

    model: str


@dataclass(frozen=True, slots=True)
class Load:
    """A model is wanted."""

    model: str


@dataclass(frozen=True, slots=True)
class Unload:
    """A model is not needed."""

    model: str


@dataclass(frozen=True, slots=True)
class DecideMachine:
    """The operator's decision about a machine."""

    id: str
    accept: bool


ToEngine: TypeAlias = Prepare | StartEngine | Workers | DrainWorker | Stop
FromEngine: TypeAlias = Progressed | Ready | Failed | Possible | Lost | Grow | Retire | Drained
ToHttp: TypeAlias = (
    StartHttp
    | EngineLoading
    | EngineReady
    | EnginePossible
    | EngineDead
    | EngineUnloaded
    | MachinesChanged
    | DrainRequests
)
FromHttp: TypeAlias = Serving | Connected | Load | Unload | DecideMachine | Failed
FromChild: TypeAlias = FromEngine | FromHttp

M = TypeVar("M")


class Lines(Generic[M]):
    """Messages of one direction as lines, by the words in front of them."""

    def __init__(self, **messages: type[M]) -> None:
        self._records = {word: Record.of(kind) for word, kind in messages.items()}
        self._words = {kind: word for word, kind in messages.items()}

    def line(self, message: M) -> str:
        word = self._words[type(message)]
        return json.dumps([word, *self._records[word].pack(message)])

    def parse(self, text: str) -> M | None:
        """The message of a line; None where the line is no message. Raises ProtocolError for wrong fields."""
        try:
            items = json.loads(text)
        except ValueError:
            return None
        if type(items) is not list or not items or type(items[0]) is not str or items[0] not in self._records:
            return None
        message: M = self._records[items[0]].unpack(tuple(items[1:]))
        return message


TO_ENGINE: Lines[ToEngine] = Lines(prepare=Prepare, engine=StartEngine, workers=Workers, drain=DrainWorker, stop=Stop)
TO_HTTP: Lines[ToHttp] = Lines(
    http=StartHttp,
    loading=EngineLoading,
    ready=EngineReady,
    possible=EnginePossible,
    dead=EngineDead,
    unloaded=EngineUnloaded,
    machines=MachinesChanged,
    drain=DrainRequests,
)
FROM_CHILD: Lines[FromChild] = Lines(
    progress=Progressed,
    ready=Ready,
    failed=Failed,
    possible=Possible,
    lost=Lost,
    grow=Grow,
    retire=Retire,
    drained=Drained,
    serving=Serving,
    connected=Connected,
    load=Load,
    unload=Unload,
    machine=DecideMachine,
)


class SupervisorPipe:
    """Sends a child's messages to its supervisor. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, message: FromChild) -> None:
        with self._lock:
            try:
                self._out.write(FROM_CHILD.line(message) + "\n")
                self._out.flush()
            except (OSError, ValueError):  # the supervisor is gone, and this process is about to end
                pass


def begin(name: str, lines: Lines[M]) -> tuple[SupervisorPipe, Iterator[M]]:
    """Make this process a child of the supervisor: it ends with it, leaves signals to it, and logs to stderr in its
    `name`. Returns the pipe to the supervisor, and the messages from it until it is gone, which are `lines`."""
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # where all processes get a signal, only the supervisor handles it
    configure(name)
    return SupervisorPipe(), (message for text in sys.stdin if (message := lines.parse(text)) is not None)
