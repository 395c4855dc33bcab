"""What the server does with bytes that are no ordinary request: over real sockets, with an application that echoes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from lamina.server.http import protocol
from lamina.server.http.protocol import MAX_AHEAD, MAX_HEAD, LimitedProtocol

KEEP_ALIVE = 2
BODY = b'{"a": 1}'
HEAD = b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Says what it was asked: headers and body, which it does not read for /early. `slow: N` waits so many seconds
    before the answer's end."""
    body = b""
    while scope["path"] != "/early":
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    said = json.dumps({"path": scope["path"], "headers": headers, "body": body.decode()}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(said))]})
    await send({"type": "http.response.body", "body": said[:5], "more_body": True})
    await asyncio.sleep(float(headers.get("slow", 0)))
    await send({"type": "http.response.body", "body": said[5:]})


@contextlib.contextmanager
def listening(most: int | None = None, app: Any = echo) -> Iterator[int]:
    """A server, with so many connections at most; gives its port."""
    config = uvicorn.Config(
        app, http=LimitedProtocol, ws="none", lifespan="off", log_config=None, access_log=False,
        timeout_keep_alive=KEEP_ALIVE, limit_concurrency=most,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield sock.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening() as port:
        yield port


class Talk:
    """One connection."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def hear(self) -> tuple[int, Any]:
        """The next answer: its status and JSON."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))[15:])
        while len(body) < length:
            body += self._more()
        return int(head.split()[1]), json.loads(body)

    def _more(self) -> bytes:
        part = self.socket.recv(65536)
        if not part:
            raise EOFError("the connection was closed")
        return part

    @property
    def closed(self) -> bool:
        with contextlib.suppress(ConnectionError):
            return not self.socket.recv(1)
        return True


def test_a_plain_request_is_answered_and_the_connection_kept(port: int) -> None:
    with Talk(port) as talk:
        for _ in range(2):
            talk.send(HEAD + b"\r\n" + BODY)
            status, said = talk.hear()
            assert (status, said["body"]) == (200, BODY.decode())


@pytest.mark.parametrize("cut", [1, 20, len(HEAD), len(HEAD) + 2, len(HEAD) + 6])
def test_a_request_may_come_in_pieces(port: int, cut: int) -> None:
    whole = HEAD + b"\r\n" + BODY
    with Talk(port) as talk:
        talk.send(whole[:cut])
        time.sleep(0.05)
        talk.send(whole[cut:])
        assert talk.hear()[1]["body"] == BODY.decode()


@pytest.mark.parametrize("cut", [None, 30, -8, -4])
def test_who_asks_for_http2_is_answered_in_http1(port: int, cut: int | None) -> None:
    more = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAM\r\nx-kept: yes\r\n\r\n"
    whole = HEAD + more + BODY
    with Talk(port) as talk:
        for _ in range(2):
            talk.send(whole[:cut])
            if cut is not None:
                time.sleep(0.05)
                talk.send(whole[cut:])
            status, said = talk.hear()
            assert (status, said["body"], said["path"]) == (200, BODY.decode(), "/x")
            assert said["headers"]["x-kept"] == "yes"
            assert "upgrade" not in said["headers"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_may_ask_for_http2(port: int) -> None:
    command = ["curl", "-s", "--http2", "-d", BODY.decode(), f"http://127.0.0.1:{port}/x"]
    said = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=20).stdout)
    assert said["body"] == BODY.decode()


CHUNKED = b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


def test_trailers_are_no_headers(port: int) -> None:
    with Talk(port) as talk:
        talk.send(CHUNKED + b"2\r\nab\r\n0\r\nauthorization: Bearer k\r\nx: y\r\n\r\n")
        status, said = talk.hear()
        assert (status, said["body"]) == (200, "ab")
        assert "authorization" not in said["headers"]
        talk.send(HEAD + b"\r\n" + BODY)
        assert talk.hear()[0] == 200


@pytest.mark.parametrize("piece", [b"a: b\r\n" * 1000, b"a" * 10_000, b"a: " + b"b" * 10_000])
def test_endless_trailers_are_refused(port: int, piece: bytes) -> None:
    with Talk(port) as talk:
        talk.send(CHUNKED + b"0\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(4 * MAX_HEAD // len(piece)):
                talk.send(piece)
        with contextlib.suppress(ConnectionError):
            assert talk.hear()[0] in (400, 431)
        assert talk.closed


def test_a_large_body_in_many_pieces_is_no_trailer(port: int) -> None:
    with Talk(port) as talk:
        talk.send(CHUNKED)
        for _ in range(40):
            talk.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        talk.send(b"0\r\n\r\n")
        assert len(talk.hear()[1]["body"]) == 400_000


@pytest.mark.parametrize(
    "head", [b"GET /" + b"x" * MAX_HEAD, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEAD // 6 + 1)]
)
def test_a_head_that_is_too_large_is_refused(port: int, head: bytes) -> None:
    with Talk(port) as talk:
        with contextlib.suppress(ConnectionError):
            talk.send(head + b"x" * 100)
        status, said = talk.hear()
        assert (status, said["error"]["type"]) == (431, "invalid_request_error")
        assert talk.closed


@pytest.mark.parametrize("rest", [b"\r\n", b"\r\n\r\n", b"GET /ver", b"\x00garbage\r\n\r\n", b"x" * (MAX_HEAD + 10)])
def test_what_follows_a_request_does_not_spoil_its_answer(
    port: int, rest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.2)
    with Talk(port) as talk:
        talk.send(HEAD + b"slow: 0.6\r\n\r\n" + BODY)
        time.sleep(0.05)
        with contextlib.suppress(ConnectionError):
            talk.send(rest)
        status, said = talk.hear()
        assert (status, said["body"]) == (200, BODY.decode())


def test_pipelined_requests_are_answered_in_order(port: int) -> None:
    with Talk(port) as talk:
        talk.send(b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % at for at in range(5)))
        data = b""
        while data.count(b'"path"') < 5:
            data += talk._more()
        assert [data.index(b'"/%d"' % at) for at in range(5)] == sorted(data.index(b'"/%d"' % at) for at in range(5))


@pytest.mark.parametrize("later", [0, 1, 16])
def test_who_leaves_is_noticed_whatever_waits_behind_the_request(later: int) -> None:
    """A request behind another one paused reading: the first was computed to its end for nobody."""
    begun, gone = threading.Event(), threading.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        assert scope["path"] == "/0"
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    with listening(app=wait) as port:
        with Talk(port) as talk:
            talk.send(b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % at for at in range(1 + later)))
            assert begun.wait(10)
            assert not gone.is_set()
        assert gone.wait(10)


@pytest.mark.parametrize("pieces", [1, 10])
def test_what_comes_before_an_answer_is_bounded(port: int, pieces: int) -> None:
    """Beyond the bound the connection is closed after the answers to what came whole."""
    body = b"x" * (2 * MAX_AHEAD // pieces)
    with Talk(port) as talk:
        talk.send(HEAD + b"slow: 1\r\n\r\n" + BODY)
        time.sleep(0.05)
        for at in range(pieces):
            talk.send(b"POST /%d HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (at, len(body)) + body)
            time.sleep(0.01)
        data = b""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                data += talk._more()
        assert b'"path": "/x"' in data
        assert data.count(b'"path"') < 1 + pieces


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"POST /x HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(port: int, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.2)
    with Talk(port) as talk:
        talk.send(sent)
        status, said = talk.hear()
        assert (status, said["error"]["code"]) == (408, "timeout")
        assert talk.closed


@pytest.mark.fault("F23")
def test_a_body_has_a_whole_time(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte gave a body another minute."""
    monkeypatch.setattr(protocol, "BODY_TIMEOUT", 1.0)
    with Talk(port) as talk:
        talk.send(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        end = time.monotonic() + 10
        while not select.select([talk.socket], [], [], 0.1)[0]:
            assert time.monotonic() < end
            talk.send(b"x")
        assert talk.hear()[0] == 408
        assert talk.closed


@pytest.mark.fault("F23")
def test_a_client_that_reads_nothing_is_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer waited for it without end."""
    monkeypatch.setattr(protocol, "WRITE_TIMEOUT", 0.5)
    body = b"x" * 20_000_000
    with Talk(port) as talk:
        talk.send(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        time.sleep(3)
        with contextlib.suppress(ConnectionError):
            received = 0
            while piece := talk.socket.recv(1 << 20):
                received += len(piece)
            assert received < len(body)


class Line(asyncio.Transport):
    """A connection to a client, with so many bytes that it has not read."""

    def __init__(self, unread: int) -> None:
        super().__init__()
        self.unread = unread
        self.aborted = self.closing = False

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = True


class Clock:
    """In place of an event loop: its timers run when they are told to."""

    def __init__(self) -> None:
        self.timers: list[tuple[Any, ...]] = []

    def time(self) -> float:
        return 0.0

    def call_later(self, seconds: float, callback: Any, *arguments: Any) -> Any:
        self.timers.append((callback, *arguments))
        return _Timer(self.timers, self.timers[-1])

    def pass_time(self) -> None:
        """The timers run out that are set now."""
        timers, self.timers[:] = list(self.timers), []
        for callback, *arguments in timers:
            callback(*arguments)


class _Timer:
    def __init__(self, timers: list[tuple[Any, ...]], timer: tuple[Any, ...]) -> None:
        self._timers, self._timer = timers, timer

    def cancel(self) -> None:
        if self._timer in self._timers:
            self._timers.remove(self._timer)


@pytest.mark.fault("F23")
@pytest.mark.parametrize("closing", [False, True])
def test_a_client_that_reads_slowly_gets_all_of_its_answer(closing: bool) -> None:
    """It was cut off after 60 s, however steadily it read."""
    config, clock, line = uvicorn.Config(echo, lifespan="off", log_config=None), Clock(), Line(1000)
    client = LimitedProtocol(config, ServerState(), {}, clock)  # type: ignore[arg-type]
    client.transport, client.flow = line, FlowControl(line)
    client.pause_writing()
    if closing:
        client._close()
    for _ in range(5):
        line.unread -= 100
        clock.pass_time()
        assert not line.aborted
    if not closing:
        client.resume_writing()
        assert clock.timers == []
        client.pause_writing()
    clock.pass_time()
    assert line.aborted


def test_a_body_that_comes_after_its_answer_leaves_the_connection_open(port: int) -> None:
    """Nothing ended such a connection any more, however long it was idle."""
    with Talk(port) as talk:
        talk.send(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n\r\n")
        assert talk.hear()[0] == 200
        talk.send(BODY)
        talk.send(HEAD + b"\r\n" + BODY)
        assert talk.hear()[1]["body"] == BODY.decode()
        talk.send(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n\r\n")
        assert talk.hear()[0] == 200
        talk.send(BODY)
        talk.socket.settimeout(KEEP_ALIVE + 5)
        assert talk.closed


def test_an_answer_under_way_is_whole_where_the_next_request_is_refused(port: int) -> None:
    """A refusal of the second request was written into the middle of the first one's answer."""
    with Talk(port) as talk:
        talk.send(HEAD + b"slow: 0.5\r\n\r\n" + BODY)
        time.sleep(0.1)
        talk.send(b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\nZ\r\n")
        status, said = talk.hear()
        assert (status, said["body"]) == (200, BODY.decode())
        assert talk.closed


def test_answers_under_way_are_not_cut_off_for_other_connections() -> None:
    """There was no bound on connections but that of open files."""
    with listening(most=2) as port, Talk(port) as one, Talk(port) as two:
        for talk in (one, two):
            talk.send(HEAD + b"slow: 2\r\n\r\n" + BODY)
        time.sleep(0.5)
        with Talk(port) as third:
            status, said = third.hear()
            assert (status, said["error"]["code"]) == (503, "too_many_connections")
        assert [talk.hear()[0] for talk in (one, two)] == [200, 200]
        with Talk(port) as fourth:  # one of the idle ones makes room
            fourth.send(HEAD + b"\r\n" + BODY)
            assert fourth.hear()[0] == 200


def test_what_is_no_http_is_told_so(port: int) -> None:
    with Talk(port) as talk:
        talk.send(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        status, said = talk.hear()
        assert (status, said["error"]["message"]) == (400, "this is no HTTP request")
        assert talk.closed
