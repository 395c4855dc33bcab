"""The HTTP side of a server as a process: `python -m lamina.server.processes.http_main`, started by the supervisor.

It receives where to listen and the state of each model's engine; it sends that it listens, that it has connected to an
engine, and which models it wants loaded or unloaded. It loads no torch.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from lamina.client.remote import SWITCH_INTERVAL
from lamina.errors import LaminaError
from lamina.server.app import create_app
from lamina.server.frontend import Frontend, Observer
from lamina.server.http.protocol import LimitedProtocol
from lamina.server.machines import Machines
from lamina.server.metrics.metrics import ServerMetrics
from lamina.server.models import Models
from lamina.server.processes.child_protocol import (
    TO_HTTP,
    Connected,
    DecideMachine,
    DrainRequests,
    EngineDead,
    EngineLoading,
    EnginePossible,
    EngineReady,
    EngineUnloaded,
    Failed,
    Load,
    MachinesChanged,
    Serving,
    StartHttp,
    SupervisorPipe,
    ToHttp,
    Unload,
    begin,
)
from lamina.server.processes.engine_link import EngineLink
from lamina.server.processes.kv_events import KvEventPublisher
from lamina.server.request_log import CostObserver
from lamina.server.settings import ServerSettings

if TYPE_CHECKING:
    from lamina.server.metrics.tracing import Tracer

logger = logging.getLogger("lamina")

KEEP_ALIVE = 75  # seconds for which an idle connection stays open, nginx's default
_OTHER_FILES = 64  # that the process may have open beside connections
_LISTENERS = 16  # connections that are taken in one turn of the event loop
_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE_BLOCK = 1 << 18  # bytes from which malloc gives a freed block back to the system
_NICE = 5  # the engine's threads compute in step, so a core taken from one stops all; work here is short
_REST = 0.5  # the least seconds for which /health says "draining"


def main() -> int:
    """The exit status: 0 once it has drained, or the supervisor is gone; 1 where it cannot serve."""
    os.nice(_NICE)
    sys.setswitchinterval(SWITCH_INTERVAL)  # the event loop gives the interpreter back at each read and write
    with suppress(AttributeError):  # glibc's. By default it keeps blocks of up to 32 MB once one of them was freed
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
    supervisor, messages = begin("http", TO_HTTP)
    first = next(messages, None)
    if not isinstance(first, StartHttp):
        return 0
    try:
        settings = ServerSettings(**first.settings)
        metrics = ServerMetrics(*settings.models)
        tracer = _tracer(settings)
        models = _models(settings, metrics, tracer, supervisor)
        machines = Machines(settings, partial(_decide, supervisor) if settings.joining else None)
        app = create_app(models, settings, metrics, machines)
        events = _publisher(settings)
    except Exception as error:
        if not isinstance(error, LaminaError):
            logger.exception("the server cannot be put together")
        supervisor.send(Failed(type(error).__name__, " ".join(str(error).split())))
        return 1
    config = uvicorn.Config(
        app if tracer is None else tracer.middleware(app),
        http=LimitedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        limit_concurrency=_connections(settings.connections),
        proxy_headers=False,  # nothing that a client could write is trusted
    )
    server = _Server(config, models, supervisor)
    links = {
        model.name: EngineLink(
            model.frontend,
            bytes.fromhex(first.secret),
            partial(_connected, supervisor, model.name),
            None if events is None else events.sink(model.name),
        )
        for model in models
    }
    threading.Thread(
        target=_listen, args=(messages, links, models, machines, server), name="lamina-supervisor", daemon=True
    ).start()
    server.run(sockets=_listeners(socket.socket(fileno=first.descriptor)))
    if tracer is not None:
        tracer.close()
    if events is not None:
        events.close()
    sys.stderr.flush()
    os._exit(0)  # threads that wait for the engine or the supervisor would keep the process


def _listeners(listener: socket.socket) -> list[socket.socket]:
    """A listening socket several times: uvloop takes one connection of each in a turn, however many wait. A client that
    came behind 60 others waited for 60 turns, in which those sent and read megabytes: 0.2 s."""
    return [listener, *(listener.dup() for _ in range(_LISTENERS - 1))]


def _connected(supervisor: SupervisorPipe, model: str) -> None:
    """A model's engine is there. What exists by now is never collected: a look at all of it stops every thread for
    0.1 s, now and then."""
    gc.freeze()
    supervisor.send(Connected(model))


def _decide(supervisor: SupervisorPipe, id: str, accept: bool) -> None:
    supervisor.send(DecideMachine(id, accept))


class _Loader:
    """Has the supervisor load and unload models."""

    def __init__(self, supervisor: SupervisorPipe) -> None:
        self._supervisor = supervisor

    def load(self, name: str) -> None:
        self._supervisor.send(Load(name))

    def unload(self, name: str) -> None:
        self._supervisor.send(Unload(name))


def _models(
    settings: ServerSettings, metrics: ServerMetrics, tracer: Tracer | None, supervisor: SupervisorPipe
) -> Models:
    """The models of the settings, all but the first unloaded."""
    frontends = {}
    for name in settings.models:
        observer: Observer = CostObserver(metrics.of(name))
        frontends[name] = Frontend(observer if tracer is None else tracer.of(name).observing(observer))
        if name != settings.model:
            frontends[name].unloaded()
    loader = _Loader(supervisor) if settings.on_demand else None
    return Models(frontends, loader, settings.max_loaded, settings.idle_unload)


class _Server(uvicorn.Server):
    """uvicorn's, without its signal handlers. Its event loop looks after the models."""

    def __init__(self, config: uvicorn.Config, models: Models, supervisor: SupervisorPipe) -> None:
        super().__init__(config)
        self._models = models
        self._supervisor = supervisor

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._models.begin()
        if self.started:
            self._supervisor.send(Serving())

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _connections(wanted: int) -> int:
    """How many connections may be open: as many as are wanted, unless the system allows fewer files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + _OTHER_FILES:  # systemd's default is 1,024
        soft = min(wanted + _OTHER_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(wanted, soft - _OTHER_FILES))


def _tracer(settings: ServerSettings) -> Tracer | None:
    """The tracer, where traces are wanted: OpenTelemetry is imported only then. Raises InvalidRequest without it."""
    if settings.otlp_traces_endpoint is None:
        return None
    from lamina.server.metrics.tracing import Tracer

    return Tracer.from_endpoint(settings.otlp_traces_endpoint, settings.model)


def _publisher(settings: ServerSettings) -> KvEventPublisher | None:
    """The publisher of the prefix caches' events, where they are wanted. Raises InvalidRequest."""
    if settings.kv_events is None:
        return None
    name = settings.kv_events_name or platform.node()
    return KvEventPublisher(settings.kv_events, settings.kv_events_replay, settings.models, name)


def _listen(
    messages: Iterator[ToHttp],
    links: Mapping[str, EngineLink],
    models: Models,
    machines: Machines,
    server: uvicorn.Server,
) -> None:
    for message in messages:
        match message:
            case DrainRequests(seconds):
                threading.Thread(target=_drain, args=(models, server, seconds), daemon=True).start()
            case MachinesChanged(rows):
                machines.update(rows)
            case EngineLoading(model, progress):
                links[model].begins(progress)
            case EngineReady(model, facts):
                links[model].ready(facts)
            case EnginePossible(model, tokens):
                links[model].possible(tokens)
            case EngineDead(model, why):
                links[model].dead(why)
            case EngineUnloaded(model, why):
                links[model].unloaded(why)
    os._exit(0)  # the supervisor is gone


def _drain(models: Models, server: uvicorn.Server, seconds: float) -> None:
    """Refuse new requests, give those under way so many seconds to end, then stop the server."""
    models.drain()
    deadline = time.monotonic() + seconds
    time.sleep(min(_REST, seconds))
    while models.active and time.monotonic() < deadline:
        time.sleep(0.05)
    server.config.timeout_graceful_shutdown = 2
    server.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
