"""`lamina serve A B` with real processes: models take turns at one attention worker, and a router hears of their KV."""

from __future__ import annotations

import socket
import threading
from typing import Any

import msgpack
import pytest
from evaluate.fault_injection.server import Server, serving, until

zmq = pytest.importorskip("zmq")

pytestmark = [pytest.mark.data, pytest.mark.real, pytest.mark.timeout(600)]

PROMPT = "The quick brown fox jumps over the lazy dog, and then it looks for another dog to jump over: " * 2


class Listener:
    """A subscriber of one port: the types of all events."""

    def __init__(self, port: int) -> None:
        self.types: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(port,))
        self._thread.start()

    def _listen(self, port: int) -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
            subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@here@")
            subscriber.connect(f"tcp://127.0.0.1:{port}")
            while not self._over.is_set():
                if subscriber.poll(100):
                    _, events, _ = msgpack.unpackb(subscriber.recv_multipart()[2])
                    self.types += [event["type"] for event in events]

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def text(server: Server, model: str) -> str:
    status, answer = server.post("/v1/completions", model=model, prompt=PROMPT, max_tokens=8, temperature=0)
    assert status == 200, (answer, server.log)
    assert answer["model"] == model
    return str(answer["choices"][0]["text"])


def states(server: Server) -> dict[str, Any]:
    return {card["id"]: card["state"] for card in server.get("/v1/models")[1]["data"]}


def test_models_take_turns_and_say_what_they_keep() -> None:
    port = free_port()
    arguments = (
        "two=smollm2-135m", "--attention-workers", "1", "--local-share", "0", "--threads", "1", "--kv-memory", "64MiB",
        "--weights", "float32", "--idle-unload", "3", "--kv-events", f"tcp://127.0.0.1:{port}",
        "--kv-events-name", "here",
    )  # fmt: skip
    listener = Listener(port)
    try:
        with serving(*arguments, model="one=smollm2-135m") as server:
            first = text(server, "one")
            assert first == text(server, "two")  # the same model, at the same worker, once the other has left it
            assert states(server) == {"one": "unloaded", "two": "loaded"}
            assert first == text(server, "one")
            until(lambda: set(states(server).values()) == {"unloaded"}, server)
            assert server.get("/health")[0] == 200
            assert len(server.attention_workers) == 1
            until(lambda: listener.types[-1:] == ["AllBlocksCleared"], listener.types)
            assert "BlockStored" in listener.types
            assert server.end() == 0
    finally:
        listener.close()
