"""What waits for clients to read it is counted for their keys: `Gate` over a scripted application, without sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.responses import Response
from unobserved import NoMetrics

from lamina.server.http import gate
from lamina.server.http.gate import AT_END, PIECE, Gate
from lamina.server.http.limits import ClientGone
from lamina.server.settings import ServerSettings
from lamina.server.shares import KeyShares

MOST = 100 * PIECE


class Client:
    """One request of a key, and what has come of its answer. It reads only once `reads` is set."""

    def __init__(self, size: int, key: str = "a") -> None:
        self.size = size
        self.reads = asyncio.Event()
        self.messages: list[Any] = []
        self.left: list[str] = []  # what was called once the answer was made
        headers = [(b"authorization", f"Bearer {key}".encode())]
        self.scope = {"type": "http", "method": "GET", "path": "/x", "headers": headers, "answer": self}

    async def receive(self) -> Any:
        raise AssertionError("nothing is read")

    async def send(self, message: Any) -> None:
        self.messages.append(message)
        if len(message.get("body", b"")) == PIECE:
            await self.reads.wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])


async def application(scope: Any, receive: Any, send: Any) -> None:
    answer: Client = scope["answer"]
    scope[AT_END].append(lambda: answer.left.append("model"))
    await Response(b"x" * answer.size)(scope, receive, send)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setattr(gate, "MAX_ANSWERS", MOST)
    return Gate(application, ServerSettings(model="m", api_keys=("a", "b")), NoMetrics(), ())


async def asks(server: Gate, client: Client) -> asyncio.Task[None]:
    """The request, once it has come as far as it can."""
    task = asyncio.ensure_future(server(client.scope, client.receive, client.send))
    for _ in range(10):
        await asyncio.sleep(0)
    return task


@pytest.mark.fault("F23")
def test_answers_that_are_not_read_count_for_their_key_until_they_are(server: Gate) -> None:
    """Nothing counted them: ten clients that read nothing took 800 MB."""

    async def run() -> None:
        unread, more, others, small = Client(MOST // 2), Client(MOST // 2), Client(MOST // 4, "b"), Client(PIECE // 2)
        first = await asks(server, unread)
        assert unread.left == ["model"]  # it is made: only its client is waited for
        assert len(unread.messages) == 2
        await asks(server, more)
        assert more.messages[0]["status"] == 429
        assert (b"retry-after", b"1") in more.messages[0]["headers"]
        assert f"{MOST // 2} bytes of answers" in json.loads(more.body)["error"]["message"]
        waiting = await asks(server, others)
        await asks(server, small)
        assert [client.messages[0]["status"] for client in (unread, others, small)] == [200] * 3
        for client in (unread, others):
            client.reads.set()
        await asyncio.gather(first, waiting)
        assert [len(client.body) for client in (unread, others, small)] == [MOST // 2, MOST // 4, PIECE // 2]
        assert max(len(message.get("body", b"")) for message in unread.messages) == PIECE
        later = Client(MOST // 2)
        await asks(server, later)
        assert later.messages[0]["status"] == 200

    asyncio.run(run())


@pytest.mark.fault("F23")
def test_a_key_that_reads_nothing_leaves_connections_to_the_others(server: Gate) -> None:
    """Answers, streams and requests in queues have bounds of their own: of one key they took all connections."""

    async def run() -> None:
        server._answered = KeyShares(8, 2)
        unread = [Client(2 * PIECE) for _ in range(7)]
        tasks = [await asks(server, client) for client in unread]
        assert [client.messages[0]["status"] for client in unread] == [200] * 6 + [429]
        assert b"6 requests are being answered" in unread[6].body
        others = [Client(2 * PIECE, "b") for _ in range(2)]
        tasks += [await asks(server, client) for client in others]
        assert [client.messages[0]["status"] for client in others] == [200] * 2
        for client in (*unread, *others):
            client.reads.set()
        await asyncio.gather(*tasks)
        assert not server._answered.held(ServerSettings.tenant("a"))

    asyncio.run(run())


def test_a_lone_answer_goes_however_large_it_is(server: Gate) -> None:
    async def run() -> None:
        client = Client(2 * MOST)
        client.reads.set()
        await (await asks(server, client))
        assert len(client.body) == 2 * MOST

    asyncio.run(run())


def test_a_stream_that_finds_no_room_is_cut_off(server: Gate) -> None:
    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data", "more_body": True})
        await send({"type": "http.response.body", "body": b"x" * (MOST // 2), "more_body": True})

    async def run() -> None:
        unread = await asks(server, Client(MOST // 2))
        server._app, streaming = stream, Client(0)
        with pytest.raises(ClientGone):
            await (await asks(server, streaming))
        assert streaming.body == b"data"
        assert not unread.done()

    asyncio.run(run())
