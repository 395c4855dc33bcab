"""Clients that try to stop the HTTP process, over raw sockets and in bounded loads. Each docstring says what went wrong
before there was a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop
from http_process import HttpProcess, answers, head, http_process

from lamina.server.processes.http_main import _listeners

COMPLETIONS = "/v1/completions"
MOST = 64.0  # megabytes that an attack may cost
PATIENCE = 4.0  # seconds for which another client may wait on a busy machine; most of these attacks cost it 5 to 10


@pytest.fixture(scope="module")
def server() -> Iterator[HttpProcess]:
    with http_process() as process:
        yield process


@pytest.mark.fault("F23")
def test_connect_is_refused(server: HttpProcess) -> None:
    """The parser called it an upgrade, so its head was parsed again until RecursionError: 2.5 s and 240 MB for 40 kB,
    and a log of 8,000 times what was sent."""
    logged = len(server.log)
    with server.growth() as growth, server.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"CONNECT a:1 HTTP/1.1\r\n" + b"a:b\r\n" * 5000 + b"\r\n")
        assert answers(connection).startswith(b"HTTP/1.1 405")
        assert server.serves()
        assert growth() < MOST
    assert len(server.log) < logged + 10_000


@pytest.mark.parametrize("method", ["CONNECT", "PUT", "PATCH", "TRACE", "PROPFIND", "PURGE"])
def test_a_method_that_is_not_served_is_refused_at_its_first_line(server: HttpProcess, method: str) -> None:
    """The rest of the head and a whole body were read first."""
    with server.connect(f"{method} /v1/models HTTP/1.1\r\n".encode()) as connection:
        said = answers(connection, 10)
    assert said.startswith(b"HTTP/1.1 405")
    assert b"allow: GET, HEAD, POST" in said
    assert f"the method is {method}; allowed are GET, HEAD, POST".encode() in said


def test_many_upgrades_in_one_piece(server: HttpProcess) -> None:
    """Each one was parsed by a call inside the call for the one before it, until RecursionError."""
    with server.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /version HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" * 3000)
        assert 1 <= answers(connection).count(b"HTTP/1.1 200") <= 18
    assert server.serves()
    assert "RecursionError" not in server.log


@pytest.mark.fault("F23")
def test_many_requests_in_one_piece(server: HttpProcess) -> None:
    """Each connection could queue as many requests as fit into what is read at once, 4 kB of memory each."""
    with server.growth() as growth:
        connections = [server.connect() for _ in range(8)]
        for connection in connections:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET /version HTTP/1.1\r\n\r\n" * 9000)
        assert server.serves()
        for connection in connections:
            with connection:
                assert 1 <= answers(connection).count(b"HTTP/1.1 200") <= 18
        assert growth() < 16


def test_many_headers(server: HttpProcess) -> None:
    """A head of 64 KiB could have 16,000 headers, and took 2 MB for as long as its request."""
    with server.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /version HTTP/1.1\r\n" + b"a:\r\n" * 7000 + b"\r\n")
        said = answers(connection)
    assert said.startswith(b"HTTP/1.1 431")
    assert b"more than 128 headers" in said


# Bodies.


@pytest.mark.fault("F23")
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"bad_words": [1] * 990_000}, "bad_words[0]"),
        ({"bad_words": ["a"] * 400_000}, "bad_words"),
        ({"stop_token_ids": [None] * 300_000}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 900_000}, "stop_token_ids"),
        ({"allowed_token_ids": ["1"] * 300_000}, "allowed_token_ids[0]"),
    ],
)
def test_wrong_lists(server: HttpProcess, fields: dict[str, Any], param: str) -> None:
    """An error was made for each wrong item: 0.9 GB for 2 MB, and nobody was answered for 8 s."""
    body = json.dumps({"prompt": "x"} | fields).encode()
    with server.growth() as growth:
        said: list[tuple[int, Any]] = []
        assert server.waits(lambda: said.append(server.post(COMPLETIONS, body))) < PATIENCE
        assert growth() < MOST + 32  # of which two thirds are its JSON
    status, answer = said[0]
    assert (status, answer["error"]["param"]) == (400, param)
    assert len(answer["error"]["message"]) < 500


def test_many_lists_and_objects(server: HttpProcess) -> None:
    """Half a million objects were made of 4 MB: 120 MB."""
    body = json.dumps({"prompt": "x", "metadata": [{"a": 1}] * 400_000}).encode()
    with server.growth() as growth:
        status, answer = server.post(COMPLETIONS, body)
        assert growth() < MOST
    assert status == 400
    assert "more than 100000 lists and objects" in answer["error"]["message"]


@pytest.mark.fault("F23")
def test_bodies_that_stay_unfinished(server: HttpProcess) -> None:
    """Sixteen of them, each a byte short of 15.7 MB, took 241 MB, and nothing was refused."""
    whole, connections = 15_700_000, []
    with server.growth() as growth:
        for _ in range(16):
            connections.append(server.connect(head(whole + 1)))
            with contextlib.suppress(ConnectionError):
                for _ in range(157):
                    connections[-1].sendall(b"x" * (whole // 157))
        assert server.post(COMPLETIONS, {"prompt": "x"})[0] == 503  # there is no engine, and room for its body
        assert growth() < MOST
    refused = 0
    for connection in connections:
        with connection:
            connection.settimeout(0.2)
            with contextlib.suppress(OSError):
                refused += connection.recv(1000).startswith(b"HTTP/1.1 429")
    assert refused > 0


@pytest.mark.fault("F23")
def test_many_whole_bodies_at_once(server: HttpProcess) -> None:
    """All of them waited in memory for the threads that parse, and four were parsed together: 500 MB."""
    body = json.dumps({"prompt": "x", "metadata": ["y" * 24] * 440_000}).encode()
    said: list[int] = []

    def send() -> None:
        with contextlib.suppress(ConnectionError):  # refused before it was sent
            said.append(server.post(COMPLETIONS, body)[0])

    threads = [threading.Thread(target=send) for _ in range(12)]
    with server.growth() as growth:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert growth() < 2.5 * MOST
    assert set(said) <= {429, 503}  # there is no engine
    assert 503 in said


# Connections.


def drips(connection: socket.socket, seconds: float) -> bool:
    """Whether the server closes in time, while a byte comes now and then."""
    end = time.monotonic() + seconds
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < end:
            connection.sendall(b"x")
            time.sleep(0.2)
        return False
    return True


def test_a_body_that_nobody_reads(server: HttpProcess) -> None:
    """A byte now and then of a body that was refused already kept its connection for ever."""
    with server.connect(b"GET /version HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert drips(connection, 10)


@pytest.mark.fault("F23")
def test_idle_connections_make_room() -> None:
    """Silent ones took all open files, so that everybody else was reset until they had left."""
    with http_process(files=(160, 160)) as server:
        idle = [server.connect() for _ in range(150)]
        idle += [server.connect(b"GET /version HTTP/1.1\r\nHost: x\r\n") for _ in range(150)]
        idle += [server.connect(head(100) + b"{") for _ in range(150)]
        assert all(server.serves() for _ in range(20))
        for connection in idle:
            connection.close()
        assert server.serves()


def test_a_client_that_uploads_keeps_its_connection() -> None:
    """Whoever came while all files were taken was reset. Now those that have waited longest are closed, so a client
    that uploads goes on beside later ones that are silent."""
    with http_process(files=(160, 160)) as server:
        idle = [server.connect() for _ in range(100)]
        body = json.dumps({"prompt": "x"}).encode()
        with server.connect(head(len(body)) + body[:5]) as uploading:
            time.sleep(0.1)
            idle += [server.connect() for _ in range(80)]
            uploading.sendall(body[5:])
            assert uploading.recv(1000).startswith(b"HTTP/1.1 503")  # there is no engine
        assert server.serves()
        for connection in idle:
            connection.close()


def test_the_soft_limit_of_open_files_is_raised() -> None:
    """It stayed where the system had put it: 1,024 with systemd."""
    with http_process(files=(128, 700)) as server:
        assert server.soft_files() == 700
        connections = [server.connect() for _ in range(300)]
        assert server.serves()
        for connection in connections:
            connection.settimeout(0.01)
            with connection, pytest.raises(socket.timeout):
                connection.recv(1)  # still open


def test_a_client_behind_many_connections_is_taken_soon() -> None:
    """The event loop took one connection a turn: behind 60 clients that sent megabytes, another one waited 0.2 s."""
    count, turns = 64, [0]
    connected: list[asyncio.BaseTransport] = []

    class Connected(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            connected.append(transport)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as opened:
            first = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=count))
            listeners = _listeners(first)
            servers = [await loop.create_server(Connected, sock=opened.enter_context(each)) for each in listeners]
            for _ in range(count):
                opened.enter_context(socket.create_connection(first.getsockname()))
            while len(connected) < count:
                turns[0] += 1
                await asyncio.sleep(0)
            for each in (*connected, *servers):
                each.close()
            await asyncio.sleep(0.01)

    loop = uvloop.new_event_loop()
    loop.run_until_complete(run())
    loop.close()
    assert turns[0] < count / 2
