"""The HTTP side of a server as a process: `python -m lamina.server.http_main`, started by the supervisor.

Hears where to listen and how the engine is; says when it listens and when it has reached an engine. Loads no torch.

heard   ["http", settings, listening descriptor, secret]   ["loading", what]   ["ready", facts]
        ["dead", why]   ["drain", seconds]
said    ["serving"]   ["connected"]
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from lamina.errors import LaminaError
from lamina.intake import Intake
from lamina.remote_engine import RemoteEngine
from lamina.server.app import create_app
from lamina.server.frontend import Frontend, Served
from lamina.server.lines import Mouth, hear, log_to_stderr
from lamina.server.link import SocketWire, wait_for
from lamina.server.metrics import ServerMetrics
from lamina.server.protocol import LimitedProtocol
from lamina.server.settings import ServerSettings
from lamina.tokenizer import Tokenizer, read_json
from lamina_workers.parent import die_with_parent

if TYPE_CHECKING:
    from lamina.server.tracing import Tracer

logger = logging.getLogger("lamina")

KEEP_ALIVE = 75  # seconds that an idle connection stays, as nginx has it
_REACH = 10.0  # seconds in which a ready engine must be reached
_NICE = 5  # to take a core from one of the engine's threads, which compute in step, stops all; work here is short
_REST = 0.5  # seconds that /health says "draining" at least


def main() -> int:
    """The exit status: 0 once it has drained, or the supervisor is gone."""
    die_with_parent()
    os.nice(_NICE)
    log_to_stderr("http")
    mouth = Mouth()
    lines = hear()
    first = next(lines, None)
    if first is None:
        return 0
    _, fields, descriptor, secret = first
    settings = ServerSettings(**fields)
    metrics = ServerMetrics(settings.model)
    tracer = _tracer(settings)
    frontend = Frontend(metrics if tracer is None else tracer.observing(metrics))
    app = create_app(frontend, settings, metrics)
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
    server = uvicorn.Server(config)
    link = _Link(frontend, bytes.fromhex(secret), mouth)
    threading.Thread(
        target=_listen, args=(lines, link, frontend, server), name="lamina-supervisor", daemon=True
    ).start()
    threading.Thread(target=_say_when_serving, args=(server, mouth), name="lamina-start", daemon=True).start()
    server.run(sockets=[socket.socket(fileno=descriptor)])
    if tracer is not None:
        tracer.close()
    sys.stderr.flush()
    os._exit(0)  # threads that wait for the engine or the supervisor would keep the process


def _tracer(settings: ServerSettings) -> Tracer | None:
    """Where traces go, if anywhere: OpenTelemetry is imported only then. Raises InvalidRequest where it is missing."""
    if settings.otlp_traces_endpoint is None:
        return None
    from lamina.server.tracing import Tracer

    return Tracer.from_endpoint(settings.otlp_traces_endpoint, settings.model)


def _listen(lines: Iterator[list[Any]], link: _Link, frontend: Frontend, server: uvicorn.Server) -> None:
    for word, *items in lines:
        if word == "loading":
            frontend.loading = items[0]
        elif word == "ready":
            link.connect(items[0])
        elif word == "dead":
            link.cut(items[0])
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


class _Link:
    """From what the supervisor says of the engine to what the frontend has. For the supervisor's thread."""

    def __init__(self, frontend: Frontend, secret: bytes, mouth: Mouth) -> None:
        self._frontend = frontend
        self._mouth = mouth
        self._secret = secret
        self._wire: SocketWire | None = None

    def connect(self, facts: Mapping[str, Any]) -> None:
        """Reach an engine that is ready. Where that fails, it is as good as dead until the next one."""
        name = secrets.token_hex(8)
        self._close()
        try:
            wire = self._wire = wait_for(facts["socket"], self._secret, name, _REACH)
            folder = Path(facts["folder"])
            tokenizer = Tokenizer(folder)
            intake = Intake(
                tokenizer,
                facts["context"],
                facts["possible"],
                facts["vocab_size"],
                read_json(folder / "generation_config.json"),
                prefix=f"{name[:6]}-",
            )
        except LaminaError as error:
            logger.error("%s", error)
            self._frontend.lost(str(error))
            return
        self._frontend.ready(Served(RemoteEngine(wire, time.monotonic), tokenizer, intake))
        self._mouth.say("connected")

    def cut(self, why: str) -> None:
        """The engine is gone."""
        self._frontend.lost(why)
        self._close()

    def _close(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None


if __name__ == "__main__":
    sys.exit(main())
