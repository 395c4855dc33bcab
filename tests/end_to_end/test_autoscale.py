"""Attention workers as child processes that follow the load of an engine, and of a server."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from evaluate.fault_injection.server import Server, serving, until
from real_workers import TOKEN_BYTES

from lamina import LLM
from lamina.deploy.worker_events import WorkerStatus
from lamina.errors import ContextTooLong
from lamina.launch import attention_pool
from lamina.scheduling.autoscaling import Autoscaler

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

chance = random.Random(3)
PROMPTS = [[chance.randrange(101) for _ in range(120)] for _ in range(12)]
ROOM = 512 * TOKEN_BYTES  # of a holder; all together take 2,400 tokens
GREEDY = {"max_tokens": 80, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(model: Path) -> list[str]:
    with LLM(model, threads=1, dtype="float32", kv_memory="64MiB") as llm:
        return [completion.text for completion in llm.generate(PROMPTS, **GREEDY)]


def statuses(llm: LLM) -> tuple[WorkerStatus, ...]:
    pool = llm._runtime.pools.attention  # type: ignore[union-attr]
    return () if pool is None else pool.workers.status()


def test_child_processes_come_while_requests_wait_and_go_when_idle(
    model: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_pool, "Autoscaler", partial(Autoscaler, patience=1.0))
    most = 0
    with LLM(model, threads=1, dtype="float32", kv_memory=ROOM, autoscale=(0, 2), page_size=16) as llm:
        assert statuses(llm) == ()
        for _ in range(3):  # the first goes on with what is there, until a worker has been started
            texts = [completion.text for completion in llm.generate(PROMPTS, **GREEDY)]
            assert texts == expected
            most = max(most, sum(status.state == "up" for status in statuses(llm)))
            end = time.monotonic() + 20
            while most < 2 and not any(status.state == "up" for status in statuses(llm)) and time.monotonic() < end:
                time.sleep(0.1)
        assert most > 0
        until(lambda: statuses(llm) == (), seconds=60)
        assert [completion.text for completion in llm.generate(PROMPTS[:2], **GREEDY)] == expected[:2]


def test_request_that_needs_all_workers_waits_for_them(model: Path) -> None:
    prompt, options = PROMPTS[0] * 6, {**GREEDY, "max_tokens": 8}
    with LLM(model, threads=1, dtype="float32", kv_memory="64MiB") as llm:
        text = llm.generate(prompt, **options).text
    with LLM(model, threads=1, dtype="float32", kv_memory=ROOM, autoscale=(1, 2), local_share=0) as llm:
        assert llm.generate(prompt, **options).text == text  # of 720 tokens, and a worker has room for 512
        assert sum(status.state == "up" for status in statuses(llm)) == 2
        with pytest.raises(ContextTooLong, match="the KV memory holds no more"):
            llm.generate(prompt * 2, **options)


def names(server: Server) -> set[str]:
    """The attention workers of its engine; none where it does not answer at present."""
    engine = server.status().get("engine") or {"holders": ()}
    return {holder["name"] for holder in engine["holders"] if not holder["local"]}


def test_a_server_keeps_its_workers_when_its_engine_dies(model: Path, expected: list[str]) -> None:
    """The number of workers is the supervisor's: the next engine gets those that there are, and goes on from there."""
    options = ("--threads", "1", "--dtype", "float32", "--kv-memory", str(ROOM), "--autoscale", "1:2")
    with serving(*options, model=str(model)) as server:
        bodies = [{"prompt": prompt, **GREEDY} for prompt in PROMPTS]
        assert names(server) == {"attention-0"}
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = list(pool.map(lambda body: server.post("/v1/completions", **body), bodies * 3))
        assert {status for status, _ in answers} == {200}
        assert [answer["choices"][0]["text"] for _, answer in answers] == expected * 3
        until(lambda: names(server) == {"attention-0", "attention-1"}, server)
        os.kill(server.engine, signal.SIGKILL)
        until(lambda: server.get("/health")[0] == 200 and names(server) == {"attention-0", "attention-1"}, server)
        assert server.post("/v1/completions", **bodies[0])[1]["choices"][0]["text"] == expected[0]
