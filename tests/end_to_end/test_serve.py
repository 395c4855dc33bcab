"""The whole of `lamina serve`: real processes, a real model, HTTP from outside, and what clients see when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import aiohttp
import pytest
from evaluate.fault_injection.server import Server, ask, serving, until

from lamina import LLM
from lamina.models.resolve import GGUF_FILE, resolve

pytestmark = [pytest.mark.data, pytest.mark.real, pytest.mark.timeout(600)]

ENGINE = ("--threads", "1", "--kv-memory", "256MiB", "--weights", "float32")  # so that no near tie depends on the batch
ASKED = [{"role": "user", "content": "Name a king and a river, as JSON."}]
WORDS = ("the", "a", "sea", "ship", "king", "night", "river", "stone", "tree", "light", "under", "over", "again")


def prompt(seed: int, words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One that tests do not end: what they kill comes back."""
    with serving(*ENGINE, "--attention-workers", "2") as server:
        yield server


async def stream(session: aiohttp.ClientSession, url: str, **body: Any) -> str:
    """The raw events of a completion, to their end."""
    async with session.post(f"{url}/v1/completions", json={"stream": True, **body}) as response:
        return (await response.read()).decode()


def text_of(events: str) -> str:
    """The text of a stream that must end well."""
    assert events.rstrip().endswith("data: [DONE]"), events[-300:]
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert not any("error" in chunk for chunk in chunks), chunks
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def streams(url: str, count: int, meanwhile: Any = None, **body: Any) -> list[str]:
    """The texts of `count` streams at once; `meanwhile` is called once all have begun."""

    async def run() -> list[str]:
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            tasks = [asyncio.create_task(stream(session, url, prompt=prompt(at), **body)) for at in range(count)]
            if meanwhile is not None:
                await asyncio.to_thread(meanwhile)
            return await asyncio.gather(*tasks)

    return [text_of(events) for events in asyncio.run(run())]


def quiet(server: Server) -> bool:
    """Whether no request is open and only the prefix cache has pages."""
    snapshot = server.status()["engine"]
    return bool(snapshot["running"] == snapshot["waiting"] == 0 and not snapshot["sequences"])


def test_it_answers_as_the_engine_does(server: Server) -> None:
    texts = streams(server.url, 4, max_tokens=24, temperature=0)
    with LLM("smollm2-135m", threads=1, kv_memory="256MiB", weights="float32", attention_workers=2) as llm:
        expected = [c.text for c in llm.generate([prompt(at) for at in range(4)], max_tokens=24, temperature=0)]
    assert texts == expected


def restarts(server: Server) -> float:
    """How often the engine was started again."""
    name = 'lamina:engine_restarts_total{engine="0",model_name="smollm2-135m"}'
    return next(float(line.split()[-1]) for line in server.get("/metrics")[1].splitlines() if line.startswith(name))


@pytest.mark.fault("F01")
def test_a_killed_attention_worker_changes_no_text(server: Server) -> None:
    body = {"max_tokens": 100, "temperature": 0, "ignore_eos": True}
    reference = streams(server.url, 16, **body)
    lost = server.status()["engine"]["lost_holders"]

    def kill() -> None:
        until(lambda: server.status()["engine"]["running"] == 16, server)
        time.sleep(0.5)
        os.kill(server.attention_workers[0], signal.SIGKILL)

    assert streams(server.url, 16, kill, **body) == reference
    until(lambda: len(server.attention_workers) == 2, server)
    assert server.status()["engine"]["lost_holders"] == lost + 1
    assert streams(server.url, 4, **body) == reference[:4]


def outlive(server: Server) -> None:
    """The engine is killed twice under streams and a chat: clients of both read on, new requests are refused."""
    body = {"max_tokens": 150, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    held = {"max_tokens": 60, "temperature": 0, "response_format": {"type": "json_object"}, "messages": ASKED}
    expected = streams(server.url, 6, **body)
    answer = server.post("/v1/chat/completions", **held)[1]["choices"]
    workers, starts = server.attention_workers, restarts(server)
    answers: list[Any] = []
    refused: list[int] = []

    def kill() -> None:
        thread = threading.Thread(
            target=lambda: answers.append(server.post("/v1/chat/completions", **held)[1]["choices"])
        )
        thread.start()
        for _ in range(2):
            before = server.engine
            until(lambda: server.status()["engine"]["running"] >= 6, server)
            time.sleep(0.7)
            os.kill(before, signal.SIGKILL)
            until(lambda: server.get("/health")[0] == 503, server)
            refused.append(server.post("/v1/completions", prompt="a")[0])
            until(lambda: server.get("/health")[0] == 200, server)
        thread.join()

    assert streams(server.url, 6, kill, **body) == expected
    assert answers == [answer]
    assert refused == [503, 503]
    until(lambda: quiet(server), server, 15)
    assert server.attention_workers == workers
    assert restarts(server) == starts + 2


@pytest.mark.fault("F03", "F15")
def test_streams_outlive_a_killed_engine(server: Server) -> None:
    outlive(server)


@pytest.mark.fault("F03", "F15")
@pytest.mark.soak
def test_streams_outlive_a_killed_engine_without_a_journal() -> None:
    with serving(*ENGINE, "--attention-workers", "1", "--no-journal") as server:
        outlive(server)


@pytest.mark.fault("F02")
def test_health_is_503_while_no_attention_worker_is_left() -> None:
    """It said 200 while every request waited for a worker."""
    with serving(*ENGINE, "--attention-workers", "1", "--local-share", "0") as server:
        assert server.get("/health")[0] == 200
        os.kill(server.attention_workers[0], signal.SIGKILL)
        until(lambda: "engine_halted" in str(server.get("/health")), server)  # another one takes seconds to start
        until(lambda: server.get("/health")[0] == 200, server)
        assert server.post("/v1/completions", prompt="One", max_tokens=2)[0] == 200


def go(server: Server, number: signal.Signals) -> None:
    """An attention worker gets the signal while the engine starts again."""
    before = server.engine
    os.kill(before, signal.SIGKILL)
    until(lambda: server.children("engine_main") not in ([], [before]), server)
    time.sleep(0.9)  # the engine loads, and knows its workers
    os.kill(server.attention_workers[0], number)
    until(lambda: server.get("/health")[0] == 200, server)
    assert streams(server.url, 2, max_tokens=4, temperature=0)
    assert server.process.poll() is None


@pytest.mark.fault("F15")
def test_an_attention_worker_that_goes_while_the_engine_starts_again_ends_nothing(server: Server) -> None:
    go(server, signal.SIGKILL)
    until(lambda: len(server.attention_workers) == 2, server)


@pytest.mark.fault("F15")
@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_only_attention_worker_goes_while_the_engine_starts_again(number: signal.Signals) -> None:
    with serving(*ENGINE, "--attention-workers", "1") as server:
        go(server, number)


@pytest.mark.fault("F17")
@pytest.mark.soak
def test_a_signal_to_every_process_of_the_service_lets_streams_end() -> None:
    with serving(*ENGINE) as server:

        def end() -> None:
            until(lambda: server.status()["engine"]["running"] == 2, server)
            for pid in (server.process.pid, server.engine, server.http):
                os.kill(pid, signal.SIGTERM)

        assert all(streams(server.url, 2, end, max_tokens=150, temperature=0, ignore_eos=True))
        assert server.process.wait(60) == 0


@pytest.mark.soak
def test_a_paused_engine_is_reached_again_by_a_new_http_process() -> None:
    with serving(*ENGINE) as server:
        os.kill(server.engine, signal.SIGSTOP)
        os.kill(server.http, signal.SIGKILL)
        time.sleep(6.0)  # longer than one try to connect
        os.kill(server.engine, signal.SIGCONT)
        until(lambda: connects(server.url), server, 20)
        assert streams(server.url, 2, max_tokens=4, temperature=0)


@pytest.mark.fault("F13")
def test_a_killed_http_process_comes_back_and_leaves_no_request_behind(server: Server) -> None:
    engine = server.engine
    thread = threading.Thread(target=lambda: streams_that_break(server.url), daemon=True)
    thread.start()
    until(lambda: server.status()["engine"]["running"] == 4, server)
    os.kill(server.http, signal.SIGKILL)
    until(lambda: connects(server.url), server)
    until(lambda: quiet(server), server, 10)
    assert server.engine == engine
    assert streams(server.url, 2, max_tokens=4, temperature=0)


def streams_that_break(url: str) -> None:
    with contextlib.suppress(aiohttp.ClientError, AssertionError):
        streams(url, 4, max_tokens=2000, ignore_eos=True)


def connects(url: str) -> bool:
    try:
        return ask(f"{url}/health")[0] == 200
    except OSError:
        return False


@pytest.mark.fault("F17")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_signal_lets_streams_end_and_refuses_new_ones(number: signal.Signals) -> None:
    with serving(*ENGINE) as server:
        refused: list[int] = []

        def end() -> None:
            until(lambda: server.status()["engine"]["running"] == 2, server)
            server.process.send_signal(number)
            until(lambda: server.get("/health")[0] == 503, server)
            refused.append(server.post("/v1/completions", prompt="a")[0])

        texts = streams(server.url, 2, end, max_tokens=150, temperature=0, ignore_eos=True)
        assert all(texts)
        assert refused == [503]
        assert server.process.wait(60) == 0
        with pytest.raises(OSError, match="refused"):
            server.get("/health")


@pytest.mark.fault("F17")
def test_a_second_signal_ends_at_once() -> None:
    with serving(*ENGINE) as server:
        thread = threading.Thread(target=lambda: streams_that_break(server.url), daemon=True)
        thread.start()
        until(lambda: server.status()["engine"]["running"] == 4, server)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        start = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - start < 15


def test_a_model_that_is_not_there_ends_it_with_an_error() -> None:
    server = Server(*ENGINE, model="/no/such/model")
    assert server.process.wait(60) == 2
    assert "/no/such/model" in server.log
    server.close()


@pytest.mark.fault("F15")
@pytest.mark.soak
def test_an_engine_that_cannot_start_again_ends_the_server(tmp_path: Any) -> None:
    folder = copytree(resolve("smollm2-135m"), tmp_path / "model")
    with serving(*ENGINE, model=str(folder)) as server:
        (folder / GGUF_FILE).unlink()
        os.kill(server.engine, signal.SIGKILL)
        assert server.process.wait(60) == 1
        assert "could not start again" in server.log


async def leave_at_random(url: str, total: int, seed: int, idle: int = 0) -> dict[str, int]:
    """Many short requests, of which clients leave half, beside idle connections."""
    rng = random.Random(seed)
    counts = {"done": 0, "left": 0, "failed": 0}
    port = int(url.rpartition(":")[2])
    idlers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(idle)]
    for _, writer in idlers:  # each has asked once, and is kept alive
        writer.write(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
    gate = asyncio.Semaphore(48)

    async def one(session: aiohttp.ClientSession, at: int) -> None:
        body = {"prompt": prompt(at, 6), "max_tokens": rng.randint(1, 6), "stream": rng.random() < 0.5}
        if rng.random() < 0.2:
            body["n"] = 2
        patience = rng.uniform(0, 0.4) if rng.random() < 0.5 else 120
        async with gate:
            try:
                request = session.post(f"{url}/v1/completions", json=body)
                async with await asyncio.wait_for(request, patience) as response:
                    await asyncio.wait_for(response.read(), patience)
                    counts["done" if response.status == 200 else "failed"] += 1
            except (TimeoutError, asyncio.TimeoutError):
                counts["left"] += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session, at) for at in range(total)))
    for reader, writer in idlers:
        assert not reader.at_eof()
        writer.close()
    return counts


def resources(pid: int) -> tuple[int, int, int]:
    """Descriptors, threads, and resident KiB of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), int(status["VmRSS"].split()[0])


@pytest.mark.fault("F29")
@pytest.mark.soak
def test_random_disconnects_and_idle_connections_leave_nothing_behind(server: Server) -> None:
    """10,000 requests: all of them together take no more memory than the first 2,000."""
    pids = [server.engine, server.http, *server.attention_workers]
    asyncio.run(leave_at_random(server.url, 2000, 1, idle=500))
    until(lambda: quiet(server), server, 10)
    time.sleep(3.0)  # idle connections of the client are closed
    before = [resources(pid) for pid in pids]
    counts = asyncio.run(leave_at_random(server.url, 8000, 2, idle=500))
    until(lambda: quiet(server), server, 10)
    assert counts["failed"] == 0
    assert counts["left"] > 1000 < counts["done"]
    time.sleep(3.0)
    after = [resources(pid) for pid in pids]
    for (descriptors, threads, memory), (later_descriptors, later_threads, later_memory) in zip(
        before, after, strict=True
    ):
        assert later_descriptors <= descriptors + 8
        assert later_threads <= threads + 4
        assert later_memory <= memory * 1.1 + 30_000
    holders = server.status()["engine"]["holders"]
    for holder in holders:
        cached = holder["cached_pages"] if "cached_pages" in holder else holder["cached"]
        assert holder["total_pages"] - holder["free_pages"] == cached


@pytest.mark.fault("F14")
def test_a_client_that_leaves_frees_its_pages_within_a_second(server: Server) -> None:
    async def leave(body: dict[str, Any], after: float) -> None:
        async with aiohttp.ClientSession() as session:
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                request = session.post(f"{server.url}/v1/completions", json=body)
                async with await asyncio.wait_for(request, after) as response:
                    await asyncio.wait_for(response.read(), after)

    long = {"max_tokens": 2000, "ignore_eos": True}
    for body in (
        {"prompt": "once", "stream": True, **long},
        {"prompt": "once", "stream": True, "n": 3, **long},
        {"prompt": "once", **long},
        {"prompt": prompt(5, 5000), **long},  # leaves while it is read
    ):
        asyncio.run(leave(body, 0.7))
        until(lambda: quiet(server), server, 1.0)


@pytest.mark.fault("F21")
def test_it_does_not_listen_for_everybody_without_a_key() -> None:
    command = [sys.executable, "-m", "lamina", "serve", "--host", "0.0.0.0", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "LAMINA_API_KEY"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert ended.returncode == 2
    assert "--open" in ended.stderr
