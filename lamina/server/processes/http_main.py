"""The HTTP side of a server as a process: `python -m lamina.server.processes.http_main`, started by the supervisor.

Hears where to listen and how the engine is; says when it listens and when it has reached an engine. Loads no torch.

heard   ["http", settings, listening descriptor, secret]   ["loading", what]   ["ready", facts]
        ["dead", why]   ["drain", seconds]
said    ["serving"]   ["connected"]   ["failed", kind, why]
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from lamina.errors import LaminaError
from lamina.server.app import create_app
from lamina.server.frontend import Frontend
from lamina.server.http.protocol import LimitedProtocol
from lamina.server.metrics.metrics import ServerMetrics
from lamina.server.processes.child_protocol import Mouth, begin
from lamina.server.processes.engine_link import EngineLink
from lamina.server.settings import ServerSettings

if TYPE_CHECKING:
    from lamina.server.metrics.tracing import Tracer

logger = logging.getLogger("lamina")

KEEP_ALIVE = 75  # seconds that an idle connection stays, as nginx has it
_NICE = 5  # to take a core from one of the engine's threads, which compute in step, stops all; work here is short
_REST = 0.5  # seconds that /health says "draining" at least


def main() -> int:
    """The exit status: 0 once it has drained, or the supervisor is gone; 1 where it cannot serve."""
    os.nice(_NICE)
    mouth, lines = begin("http")
    first = next(lines, None)
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
        mouth.say("failed", type(error).__name__, " ".join(str(error).split()))
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
    )
    server = _Server(config)
    link = EngineLink(frontend, bytes.fromhex(secret), lambda: mouth.say("connected"))
    threading.Thread(
        target=_listen, args=(lines, link, frontend, server), name="lamina-supervisor", daemon=True
    ).start()
    threading.Thread(target=_say_when_serving, args=(server, mouth), name="lamina-start", daemon=True).start()
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


def _tracer(settings: ServerSettings) -> Tracer | None:
    """Where traces go, if anywhere: OpenTelemetry is imported only then. Raises InvalidRequest where it is missing."""
    if settings.otlp_traces_endpoint is None:
        return None
    from lamina.server.metrics.tracing import Tracer

    return Tracer.from_endpoint(settings.otlp_traces_endpoint, settings.model)


def _listen(lines: Iterator[list[Any]], link: EngineLink, frontend: Frontend, server: uvicorn.Server) -> None:
    for word, *items in lines:
        if word == "loading":
            frontend.loading = items[0]
        elif word == "ready":
            link.ready(items[0])
        elif word == "dead":
            link.dead(items[0])
        elif word == "drain":
            threading.Thread(target=_drain, args=(frontend, server, items[0]), daemon=True).start()
    os._exit(0)  # the supervisor is gone


def _say_when_serving(server: uvicorn.Server, mouth: Mouth) -> None:
    while not server.started:
        time.sleep(0.01)
    mouth.say("serving")


def _drain(frontend: Frontend, server: uvicorn.Server, seconds: float) -> None:
    """Take nothing more, let what is under way end for so many seconds, then leave."""
    frontend.draining = True
    deadline = time.monotonic() + seconds
    time.sleep(min(_REST, seconds))
    while frontend.active and time.monotonic() < deadline:
        time.sleep(0.05)
    server.config.timeout_graceful_shutdown = 2
    server.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
