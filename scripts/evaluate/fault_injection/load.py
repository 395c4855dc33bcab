"""Clients that stream completions without a pause, on a thread of their own, and what became of each of their requests.

As many clients as `clients` each send one request after the other. The prompts are numbered: the same number is the
same text in every run, so that texts of an undisturbed engine are there to compare with. A client waits and tries again
where it is refused (HTTP 429 or 503), as OpenAI's own client does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from lamina.measure.bench.client import DONE, EventStream

WORDS = ("the", "a", "sea", "ship", "king", "night", "river", "stone", "tree", "light", "under", "over", "again")
REFUSED = (429, 503)
AGAIN = 0.5  # seconds after which a client that was refused, or could not connect, tries again


@dataclass(frozen=True, slots=True)
class Load:
    """So many clients; each prompt has so many words, each answer so many tokens. A client gives a request up after
    `patience` seconds."""

    clients: int = 4
    words: int = 60
    tokens: int = 48
    patience: float = 120.0

    def prompt(self, number: int) -> str:
        return f"Story {number}: " + " ".join(random.Random(number).choices(WORDS, k=self.words))

    def body(self, number: int) -> dict[str, Any]:
        """A completion of that prompt, streamed, greedy, with the count of its tokens in each chunk."""
        return {
            "prompt": self.prompt(number),
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }


@dataclass(slots=True)
class Answer:
    """One request. Times are seconds of the monotonic clock; `times` has one for each chunk with text. `tokens` and
    `text` are what came. `end`: "done", "refused" before its first token, "lost" (`why` says how), or "left" where
    the client went away on purpose."""

    prompt: int
    sent: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    text: str = ""
    ended: float = 0.0
    end: str = ""
    why: str = ""

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def tpot(self) -> float:
        return (self.times[-1] - self.times[0]) / (self.tokens - 1)


class Clients:
    """The clients of one server, from entering this context to leaving it. `answers` are those that have ended."""

    def __init__(self, url: str, load: Load) -> None:
        self._url = url
        self._load = load
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession
        self._stop = asyncio.Event()
        self._stop_more = asyncio.Event()
        self._more: list[asyncio.Task[None]] = []
        self._under_way: dict[int, tuple[Answer, asyncio.Task[None]]] = {}  # by client
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)
        self._served: dict[int, float] = {}  # by client, when it had its last token
        self.answers: list[Answer] = []

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let the requests that are under way end."""
        self.go()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    def served_since(self, moment: float) -> bool:
        """Whether each client has had a token since then."""
        served = [at for client, at in dict(self._served).items() if client < self._load.clients]
        return len(served) == self._load.clients and min(served) > moment

    def come(self, count: int) -> None:
        """So many clients more, until `go`."""

        def begin() -> None:
            first = self._load.clients + len(self._more)
            for client in range(first, first + count):
                self._more.append(asyncio.ensure_future(self._client(client, self._stop_more)))

        self._loop.call_soon_threadsafe(begin)

    def go(self) -> None:
        """Those that came send no further request."""
        self._loop.call_soon_threadsafe(self._stop_more.set)

    def leave(self, count: int) -> None:
        """So many clients close their connections in the middle of a stream; each goes on with its next request."""
        tasks = [task for answer, task in self._under_way.values() if answer.times][:count]
        for task in tasks:
            self._loop.call_soon_threadsafe(task.cancel)

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._load.patience)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as self._session:
            await asyncio.gather(*(self._client(number, self._stop) for number in range(self._load.clients)))
            await asyncio.gather(*self._more)

    async def _client(self, client: int, stop: asyncio.Event) -> None:
        prompt = next(self._numbers)
        while not stop.is_set():
            answer = Answer(prompt, time.monotonic())
            task = asyncio.ensure_future(self._ask(answer, client))
            self._under_way[client] = answer, task
            try:
                await task
            except asyncio.CancelledError:
                answer.end = "left"
            del self._under_way[client]
            answer.ended = time.monotonic()
            self.answers.append(answer)
            if answer.end in ("done", "left"):
                prompt = next(self._numbers)
            elif answer.end == "lost" and answer.times:  # its first token was shown, so it is not asked for again
                prompt = next(self._numbers)
                await asyncio.sleep(AGAIN)
            else:
                await asyncio.sleep(AGAIN)

    async def _ask(self, answer: Answer, client: int) -> None:
        try:
            body = self._load.body(answer.prompt)
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    answer.end = "refused" if response.status in REFUSED else "lost"
                    answer.why = (
                        f"HTTP {response.status}: {(await response.content.read(300)).decode(errors='replace')}"
                    )
                    return
                events = EventStream()
                async for data in response.content.iter_any():
                    for payload in events.feed(data):
                        self._take(answer, payload)
                    if answer.times:
                        self._served[client] = answer.times[-1]
            if not answer.end:
                answer.end, answer.why = "lost", "the stream ended without [DONE]"
        except aiohttp.ClientConnectorError as error:  # nothing was asked
            answer.end, answer.why = "refused", str(error)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            answer.end, answer.why = "lost", f"{type(error).__name__}: {error}"[:300]

    @staticmethod
    def _take(answer: Answer, payload: bytes) -> None:
        if payload == DONE:
            answer.end = answer.end or "done"
            return
        event = json.loads(payload)
        if "error" in event:
            answer.end, answer.why = "lost", str(event["error"].get("message"))[:300]
            return
        tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)
        if tokens > answer.tokens:
            answer.times.append(time.monotonic())
            answer.tokens = tokens
        answer.text += "".join(choice.get("text", "") for choice in event["choices"])


def warm(url: str, load: Load) -> None:
    """A few short answers, so that no first request is measured."""

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        body = load.body(-1 - number) | {"max_tokens": 4}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            with contextlib.suppress(aiohttp.ClientError):
                await response.read()

    async def run() -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=load.patience)) as session:
            await asyncio.gather(*(one(session, number) for number in range(load.clients)))

    asyncio.run(run())
