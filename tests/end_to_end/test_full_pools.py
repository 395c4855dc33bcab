"""The engine of a server is killed while no page of KV is free: the next engine goes on with every request."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from evaluate.fault_injection.server import Server, serving, until
from real_workers import TOKEN_BYTES
from whole_engines import engine, texts

pytestmark = [pytest.mark.fault("F11", "F15"), pytest.mark.timeout(900)]

PAGE = 32
PAGE_SET = 9  # pages: one in each layer for each head
CONTEXT = 256
LONGEST = CONTEXT // PAGE  # page sets of one sequence
VOCABULARY = 101


def is_full(server: Server) -> bool:
    """Whether sequences run, and the attention worker has less than a page set for them."""
    snapshot = server.status()["engine"]
    (worker,) = (holder for holder in snapshot["holders"] if not holder["local"])
    return bool(snapshot["running"]) and worker["free_pages"] + worker["cached_pages"] < PAGE_SET


async def answers(
    server: Server, prompts: list[list[int]], tokens: int, meanwhile: Callable[[], None]
) -> list[list[str]]:
    """The words of each prompt's text; `meanwhile` runs on a thread of its own."""
    body = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    timeout = aiohttp.ClientTimeout(total=300)

    async def answer(session: aiohttp.ClientSession, prompt: list[int]) -> list[str]:
        async with session.post(f"{server.url}/v1/completions", json={"prompt": prompt, **body}) as response:
            got: Any = await response.json()
            assert response.status == 200, (got, server.log)
            return str(got["choices"][0]["text"]).split()

    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        requests = [asyncio.create_task(answer(session, prompt)) for prompt in prompts]
        kill = asyncio.create_task(asyncio.to_thread(meanwhile))
        await asyncio.wait([*requests, kill], return_when=asyncio.FIRST_EXCEPTION)
        await kill
        return list(await asyncio.gather(*requests))


def killed_while_full(model: Path, seed: int, kills: int) -> None:
    """A server whose engine is killed so often, each time below 2 to 20 requests that run or wait."""
    chance = random.Random(seed)
    sets = chance.randint(LONGEST, 4 * LONGEST)
    options = ["--attention-workers", "1", "--local-share", "0", "--kv-memory", str(sets * PAGE * TOKEN_BYTES)]
    options += ["--dtype", "float32", "--threads", "1", "--max-model-len", str(CONTEXT)]
    options += ["--kv-local", "4MiB", *chance.choice((["--deterministic"], ["--lanes", "1"], []))]
    with engine(model, max_model_len=CONTEXT) as alone, serving(*options, model=str(model)) as server:
        killed: set[int] = set()
        while len(killed) < kills:
            count, tokens = chance.randint(sets // 6 + 1, 20), chance.randint(170, CONTEXT - 60)  # 6 page sets or more
            prompts = [[chance.randrange(VOCABULARY) for _ in range(chance.randint(20, 50))] for _ in range(count)]
            expected = [[f"w{token}" for token in text] for text in texts(alone, prompts, tokens)]

            def kill() -> None:
                until(lambda: server.status()["engine"]["running"], server, 60)
                until(lambda: is_full(server) or not server.status()["engine"]["running"], server, 60)
                if not is_full(server):
                    return  # it was too short a time: the next requests
                killed.add(before := server.engine)
                os.kill(before, signal.SIGKILL)
                until(lambda: server.get("/health")[0] == 503, server)
                until(lambda: server.get("/health")[0] == 200, server)

            assert asyncio.run(answers(server, prompts, tokens, kill)) == expected
            until(lambda: not server.status()["engine"]["running"], server, 20)


@pytest.mark.real
def test_an_engine_that_is_killed_while_no_page_is_free_goes_on(model: Path) -> None:
    killed_while_full(model, seed=1, kills=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 14))
def test_engines_that_are_killed_while_no_page_is_free_go_on(model: Path, seed: int) -> None:
    killed_while_full(model, seed, kills=4)
