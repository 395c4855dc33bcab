"""A server for tests: a small real model, a frontend and uvicorn in a thread, on a free port of this machine."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from loop_watch import slow_callbacks
from unobserved import NoMetrics, Unobserved

from lamina import LLM
from lamina.config import EngineConfig
from lamina.server.app import create_app
from lamina.server.frontend import Frontend, Served, fingerprint
from lamina.server.settings import ServerSettings

MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, whose shape is checked."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert self.headers["content-type"] == "application/json"
        return error

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, the last of which must be [DONE]."""
        lines = [line[6:] for line in self.body.decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


class Rig:
    """A server at `port`, whose event loop runs on `thread`. `tickets`: how many requests the engine knows of."""

    def __init__(
        self, port: int, thread: threading.Thread, frontend: Frontend, llm: LLM | None, settings: ServerSettings
    ) -> None:
        self.port = port
        self.thread = thread
        self.frontend = frontend
        self.llm = llm
        self.settings = settings

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tickets(self) -> int:
        assert self.llm is not None
        return len(self.llm._runtime.engine._registry.requests)

    def ask(self, path: str, fields: Any = None, method: str | None = None, **headers: str) -> Reply:
        """One request: GET, or POST where there are fields (bytes are sent as they are)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            body = fields if fields is None or isinstance(fields, bytes) else json.dumps(fields).encode()
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            if body is not None:
                given = {"Content-Type": "application/json"} | given
            connection.request(method or ("GET" if body is None else "POST"), path, body, given)
            answer = connection.getresponse()
            lowered = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, lowered, answer.read())
        finally:
            connection.close()

    def chat(self, text: str = "Say hello.", **fields: Any) -> Reply:
        """A short chat."""
        return self.ask(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 4} | fields
        )

    def complete(self, prompt: Any = "The capital of France is", **fields: Any) -> Reply:
        """A short completion."""
        return self.ask("/v1/completions", {"prompt": prompt, "max_tokens": 4} | fields)

    def raw(self, data: bytes, wait: float = 30.0) -> bytes:
        """What comes back for bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            pieces = []
            while piece := connection.recv(1 << 16):
                pieces.append(piece)
            return b"".join(pieces)

    def open(self, path: str, fields: Mapping[str, Any]) -> socket.socket:
        """A connection on which a request was sent, and nothing read."""
        body = json.dumps(fields).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        return connection


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it comes true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def frontend_of(llm: LLM, engine: Any = None) -> Frontend:
    """A frontend that has loaded: to a model's own engine, or to another one beside its tokenizer."""
    frontend, runtime = Frontend(Unobserved()), llm._runtime
    mark = fingerprint(MODEL, EngineConfig())
    frontend.ready(Served(engine or runtime.engine, runtime.tokenizer, runtime.inputs, mark))
    return frontend


@contextmanager
def serving(
    llm: LLM | None, metrics: Any = None, frontend: Frontend | None = None, http: Any = "auto", **settings: Any
) -> Iterator[Rig]:
    """A server of a loaded model, or of one that is still loading. No callback of its event loop may take long."""
    frontend = frontend or (Frontend(Unobserved()) if llm is None else frontend_of(llm))
    given = ServerSettings(**({"model": MODEL} | settings))
    config = uvicorn.Config(
        create_app(frontend, given, metrics or NoMetrics()),
        http=http,
        loop="asyncio",  # which `loop_watch` can watch
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    slow_callbacks(thread)
    thread.start()
    try:
        assert until(lambda: server.started, 10)
        yield Rig(listener.getsockname()[1], thread, frontend, llm, given)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
    assert not (slow := slow_callbacks(thread)), slow
