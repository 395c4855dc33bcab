"""The HTTP side of a server as a process: `python -m lamina.server.processes.http_main`, started by the supervisor.

It receives where to listen and the state of the engine; it sends that it listens, and that it has connected to an
engine. It loads no torch.

received   ["http", settings, listening descriptor, secret]   ["loading", what]   ["ready", facts]
           ["dead", why]   ["drain", seconds]
sent       ["serving"]   ["connected"]   ["failed", kind, why]
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import uvicorn

from lamina.errors import LaminaError
from lamina.server.app import create_app
from lamina.server.frontend import Frontend
from lamina.server.http.protocol import LimitedProtocol
from lamina.server.metrics.metrics import ServerMetrics
from lamina.server.processes.child_protocol import SupervisorPipe, begin
from lamina.server.processes.engine_link import EngineLink
from lamina.server.settings import ServerSettings

if TYPE_CHECKING:
    from lamina.server.metrics.tracing import Tracer

logger = logging.getLogger("lamina")

KEEP_ALIVE = 75  # seconds for which an idle connection stays open, nginx's default
_CONNECTIONS = 2048  # the most, or twice `max_requests` where that is more; each takes up to MAX_HEAD
_OTHER_FILES = 64  # that the process may have open beside connections
_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE_BLOCK = 1 << 18  # bytes from which malloc gives a freed block back to the system
_NICE = 5  # the engine's threads compute in step, so a core taken from one stops all; work here is short
_REST = 0.5  # the least seconds for which /health says "draining"


def main() -> int:
    """The exit status: 0 once it has drained, or the supervisor is gone; 1 where it cannot serve."""
    os.nice(_NICE)
    with suppress(AttributeError):  # glibc's. By default it keeps blocks of up to 32 MB once one of them was freed
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
    supervisor, messages = begin("http")
    first = next(messages, None)
    if first is None:
        return 0
    _, fields, descriptor, secret = first
    try:
        settings = ServerSettings(**fields)
        metrics = ServerMetrics(settings.model)
        tracer = _tracer(settings)
        frontend = Frontend(metrics if tracer is None else tracer.observing(metrics))
        app = create_app(frontend, settings, metrics)
    except Exception as error:
        if not isinstance(error, LaminaError):
            logger.exception("the server cannot be put together")
        supervisor.send("failed", type(error).__name__, " ".join(str(error).split()))
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
        limit_concurrency=_connections(settings.max_requests),
    )
    server = _Server(config)
    link = EngineLink(frontend, bytes.fromhex(secret), lambda: supervisor.send("connected"))
    threading.Thread(
        target=_listen, args=(messages, link, frontend, server), name="lamina-supervisor", daemon=True
    ).start()
    threading.Thread(target=_say_when_serving, args=(server, supervisor), name="lamina-start", daemon=True).start()
    server.run(sockets=[socket.socket(fileno=descriptor)])
    if tracer is not None:
        tracer.close()
    sys.stderr.flush()
    os._exit(0)  # threads that wait for the engine or the supervisor would keep the process


class _Server(uvicorn.Server):
    """uvicorn's, without its signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _connections(requests: int) -> int:
    """How many connections may be open: as many as are wanted, unless the system allows fewer files."""
    wanted = max(_CONNECTIONS, 2 * requests)
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


def _listen(messages: Iterator[list[Any]], link: EngineLink, frontend: Frontend, server: uvicorn.Server) -> None:
    for word, *items in messages:
        if word == "loading":
            frontend.loading = items[0]
        elif word == "ready":
            link.ready(items[0])
        elif word == "dead":
            link.dead(items[0])
        elif word == "drain":
            threading.Thread(target=_drain, args=(frontend, server, items[0]), daemon=True).start()
    os._exit(0)  # the supervisor is gone


def _say_when_serving(server: uvicorn.Server, supervisor: SupervisorPipe) -> None:
    while not server.started:
        time.sleep(0.01)
    supervisor.send("serving")


def _drain(frontend: Frontend, server: uvicorn.Server, seconds: float) -> None:
    """Refuse new requests, give those under way so many seconds to end, then stop the server."""
    frontend.draining = True
    deadline = time.monotonic() + seconds
    time.sleep(min(_REST, seconds))
    while frontend.active and time.monotonic() < deadline:
        time.sleep(0.05)
    server.config.timeout_graceful_shutdown = 2
    server.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
