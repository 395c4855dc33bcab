"""Workers that are not dead but bad, as processes: one that hangs again and again, one whose line changes bits, one
that gets no memory any more. Others serve meanwhile, and no token changes."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluate.fault_injection.proxy import FlipAt, Proxy, Toxic
from real_workers import ports, until, worker_process
from whole_engines import engine, streamed, texts

from lamina import LLM
from lamina.deploy.breakers import FLAPPING, QUARANTINE

pytestmark = pytest.mark.real

PROMPTS = [[index % 101 for index in range(length)] for length in (3, 40)]


def running(model: Path, workers: list[str], **options: Any) -> LLM:
    return engine(
        model, attention_workers=workers, worker_timeout=0.5, local_channel=False, prefix_cache=False, **options
    )


def gather(llm: LLM, after: Callable[[int], None] = lambda count: None) -> list[tuple[int, ...]]:
    return streamed(llm, PROMPTS, 30, after)


def held(llm: LLM) -> dict[str, str]:
    pool = llm._runtime.pools.attention  # type: ignore[union-attr]
    return dict(pool.held_back()) if pool else {}


@pytest.mark.fault("F04")
def test_a_worker_that_hangs_again_and_again_is_held_back(model: Path) -> None:
    """It was used each time that it answered again, and stopped everybody for `worker_timeout` each time."""
    with worker_process() as bad, worker_process() as good, running(model, [bad.address, good.address]) as llm:
        expected = gather(llm)

        def hang(count: int) -> None:
            if count == 10:
                os.kill(bad.process.pid, signal.SIGSTOP)

        for _ in range(3):
            until(lambda: len(ports(llm)) == 2)
            assert gather(llm, hang) == expected
            assert [port.address for port in ports(llm)] == [good.address]
            os.kill(bad.process.pid, signal.SIGCONT)
        until(lambda: list(held(llm).values()) == ["open"])
        assert gather(llm) == expected
        assert [port.address for port in ports(llm)] == [good.address]
        os.kill(good.process.pid, signal.SIGKILL)  # then the bad one is better than none
        until(lambda: [port.address for port in ports(llm)] == [bad.address])
        assert gather(llm) == expected


@pytest.mark.fault("F08")
def test_a_worker_behind_a_line_that_changes_bits_is_quarantined(model: Path) -> None:
    """Without TLS Lamina's checksum alone notices it. A host that is not loopback by its name gets one."""
    with contextlib.ExitStack() as stack:
        bad, good = (stack.enter_context(worker_process()) for _ in range(2))
        proxy = stack.enter_context(Proxy(bad.address))
        here = [address.replace("127.0.0.1", "0.0.0.0") for address in (proxy.address, good.address)]
        llm = stack.enter_context(running(model, here, insecure=True))
        expected = gather(llm)
        # Other losses are not to open the breaker.
        llm._runtime.pools.attention._limits = replace(FLAPPING, threshold=1000), QUARANTINE  # type: ignore[union-attr]

        def spoil(count: int) -> None:
            if count == 5:
                proxy.toxic = FlipAt(least=500)

        end = time.monotonic() + 60
        while "quarantined" not in held(llm).values():
            assert time.monotonic() < end
            until(lambda: len(ports(llm)) == 2 or bool(held(llm)))
            assert gather(llm, spoil) == expected
            proxy.toxic = Toxic()
            proxy.reset()
            time.sleep(0.1)
        assert gather(llm) == expected


@pytest.mark.fault("F12")
def test_a_worker_that_gets_no_memory_costs_no_token(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lamina")
    with worker_process() as bad, worker_process() as good, running(model, [bad.address, good.address]) as llm:
        expected = gather(llm)

        def starve(count: int) -> None:
            if count == 5:
                pages = int(Path(f"/proc/{bad.process.pid}/statm").read_text().split()[0])
                size = pages * resource.getpagesize()
                resource.prlimit(bad.process.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

        assert gather(llm, starve) == expected
        long = [[index % 101 for index in range(400)] for _ in range(8)]
        long_texts, end = texts(llm, long, 20), time.monotonic() + 60
        while f"attention worker {bad.address} is lost" not in caplog.text:  # it has needed no memory yet
            assert time.monotonic() < end, "the limit did not bite"
            long_texts += texts(llm, long, 20)
        resource.prlimit(bad.process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert set(long_texts) == set(texts(llm, long[:1], 20))
        assert good.process.poll() is None
