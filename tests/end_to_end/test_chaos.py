"""Real workers killed, stopped and cut off at random steps: requests end with the same tokens, and no page is lost.

`LAMINA_CHAOS_SEED=n` replays the choices of that seed; what they meet depends on the machine too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluate.fault_injection.proxy import Proxy, Toxic
from real_workers import WorkerProcess, all_pages_free, ports, until, worker_process
from whole_engines import engine, streamed, texts

from lamina import LLM
from lamina.deploy.worker_events import WorkerStatus
from lamina.engine import kv_spares
from lamina.errors import EngineError
from lamina_workers.process.credentials import load_credentials, make_credentials

pytestmark = pytest.mark.real

ONE = os.environ.get("LAMINA_CHAOS_SEED")
FAST = [int(ONE)] if ONE else [1]
MORE = [] if ONE else range(2, 15)
TOKENS = 60
TIMEOUT = 1.0  # seconds after which a silent worker is lost

logger = logging.getLogger(__name__)
prompts = random.Random(29)
PROMPTS = [[prompts.randrange(101) for _ in range(n)] for n in (3, 20, 70, 150)]


def running(model: Path, **options: Any) -> LLM:
    """`worker_timeout` is short. The prefix cache keeps no page."""
    return engine(model, **{"prefix_cache": False, "worker_timeout": TIMEOUT, "recovery_timeout": 60.0, **options})


@pytest.fixture(scope="module")
def expected(model: Path) -> list[tuple[int, ...]]:
    with running(model) as llm:
        return texts(llm, PROMPTS, TOKENS)


def members(llm: LLM) -> tuple[WorkerStatus, ...]:
    pool = llm._runtime.pools.attention
    if pool is None:
        raise RuntimeError("there are no attention workers")
    return pool.workers.status()


def processes(llm: LLM) -> list[int]:
    return [status.process for status in members(llm) if status.process is not None and status.state == "up"]


def strike(rng: random.Random, llm: LLM, events: int) -> Callable[[int], None]:
    """A callback that kills or stops a worker, or two at once, at `events` moments of the run."""
    moments = sorted(rng.sample(range(1, len(PROMPTS) * TOKENS), events))
    blows = [(moment, rng.choice((signal.SIGKILL, signal.SIGSTOP)), rng.random() < 0.3) for moment in moments]
    logger.warning("blows: %s", [(moment, blow.name, 1 + two) for moment, blow, two in blows])

    def after(count: int) -> None:
        while blows and blows[0][0] <= count:
            _, blow, two = blows.pop(0)
            alive = processes(llm)
            for process in rng.sample(alive, min(len(alive), 1 + two)):
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process, blow)

    return after


def survive(model: Path, expected: list[tuple[int, ...]], seed: int) -> None:
    rng = random.Random(seed)
    options = {
        "attention_workers": rng.randint(2, 3),
        "shard": rng.choice(("heads", "sequence", "heads+sequence")),
        "lanes": rng.choice((1, 2)),
        "local_channel": rng.random() < 0.5,
        "data_channel": rng.choice(("grpc", "tcp")),
        "prefix_cache": rng.random() < 0.5,
    }
    spares = ("none", "replica", "replica(2)", "parity")
    options["redundancy"] = rng.choice(spares if options["attention_workers"] == 3 else spares[:2])
    logger.warning("seed %d: %s", seed, options)
    with running(model, **options) as llm:
        assert streamed(llm, PROMPTS, TOKENS, strike(rng, llm, events=rng.randint(1, 3))) == expected
        until(lambda: all(status.state == "up" for status in members(llm)), 60)
        assert sum(status.restarts for status in members(llm)) > 0
        until(lambda: len(ports(llm)) == options["attention_workers"], 60)
        assert streamed(llm, PROMPTS, TOKENS) == expected
        llm._runtime.engine._scheduler.check_integrity()
        if not options["prefix_cache"]:
            until(lambda: all_pages_free(llm))


@pytest.mark.fault("F01")
@pytest.mark.parametrize("seed", FAST)
def test_killed_and_stopped_workers_change_no_token(model, expected, seed):
    survive(model, expected, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", MORE)
def test_more_killed_and_stopped_workers_change_no_token(model, expected, seed):
    survive(model, expected, seed)


def share_with_spares(llm: LLM) -> float:
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    llm._runtime.engine.snapshot(answers.put)
    return answers.get(timeout=30).kv_redundant


@pytest.mark.parametrize(
    ("redundancy", "workers", "dead"), [pytest.param("replica(2)", 3, 2, marks=pytest.mark.soak), ("parity", 3, 1)]
)
def test_what_killed_workers_had_is_not_computed_again(model, expected, monkeypatch, redundancy, workers, dead):
    monkeypatch.setattr(kv_spares, "BEHIND", 16)
    monkeypatch.setattr(kv_spares, "SHARE", 1.0)
    with contextlib.ExitStack() as stack:
        there = [stack.enter_context(worker_process()) for _ in range(workers)]
        addresses = [worker.address for worker in there]
        llm = stack.enter_context(running(model, attention_workers=addresses, redundancy=redundancy))
        doomed = there[:dead]

        def after(count: int) -> None:
            if doomed and count > 20 and share_with_spares(llm) > 0.3:  # texts are short
                while doomed:
                    doomed.pop().process.kill()

        assert streamed(llm, PROMPTS, TOKENS, after) == expected
        assert not doomed
        counters = llm._runtime.engine._scheduler.counters
        assert 0 < counters.rebuilt_tokens < sum(map(len, PROMPTS))
        assert counters.preempted == 0
        until(lambda: all_pages_free(llm))


@pytest.mark.fault("F04")
def test_a_stopped_worker_is_lost_in_time_and_fenced_when_it_returns(model, expected):
    """The worker is no child of this engine: it goes on after its stop, and joins as a new one."""
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(worker_process()) for _ in range(2)]
        llm = stack.enter_context(
            running(model, attention_workers=[worker.address for worker in both], local_channel=False)
        )
        (first, _) = ports(llm)
        stalls: list[float] = []
        last = time.monotonic()

        def after(count: int) -> None:
            nonlocal last
            stalls.append(time.monotonic() - last)
            if count == 100:
                os.kill(both[0].process.pid, signal.SIGSTOP)
            last = time.monotonic()

        assert streamed(llm, PROMPTS, TOKENS, after) == expected
        assert max(stalls) < TIMEOUT + 3
        assert first.closed
        assert [port.address for port in ports(llm)] == [both[1].address]
        before = both[1].status().queries
        os.kill(both[0].process.pid, signal.SIGCONT)
        until(lambda: {port.address for port in ports(llm)} == {worker.address for worker in both})
        stale = both[0].status()
        assert stale.parts == 0  # of the old session nothing is left
        assert streamed(llm, PROMPTS, TOKENS) == expected
        assert both[0].status().queries > stale.queries
        assert both[1].status().queries > before
        until(lambda: all_pages_free(llm))


@pytest.mark.fault("F02")
def test_with_nobody_left_requests_end_with_an_error_in_time(model):
    """The only worker is no child of this engine, and does not come back."""
    with worker_process() as worker, running(model, attention_workers=[worker.address], recovery_timeout=1.0) as llm:
        events = llm.stream(PROMPTS[0], max_tokens=TOKENS, temperature=0)
        next(events)
        os.kill(worker.process.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineError, match="no attention worker is left, and none has joined for 1 s"):
            list(events)
        assert time.monotonic() - began < TIMEOUT + 1 + 3
        assert llm.alive


TOXICS = {
    "delay": Toxic(delay=0.002, jitter=0.004),
    "slices": Toxic(slices=7),
    "black hole": Toxic(black_hole=True),
    "truncation": Toxic(truncate=1.0),
    "reset": Toxic(reset=1.0),
    "bit flips": Toxic(flip=0.3),
    "duplicates": Toxic(duplicate=0.3),
}
HARMLESS = ("delay", "slices")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With certificates and a token."""
    folder = tmp_path_factory.mktemp("credentials")
    make_credentials(folder, ["127.0.0.1"])
    return folder


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[dict[bool, list[WorkerProcess]]]:
    """Two workers with TLS and a token, and two without. They serve one engine after another."""
    flags = ("--tls-dir", str(folder), "--token-file", str(folder / "token"))
    secret = load_credentials(folder, folder / "token")
    with contextlib.ExitStack() as stack:
        yield {
            True: [stack.enter_context(worker_process(*flags, credentials=secret)) for _ in range(2)],
            False: [stack.enter_context(worker_process()) for _ in range(2)],
        }


def through_proxies(
    model: Path, expected: list[tuple[int, ...]], workers: Any, folder: Path, toxic: str, tls: bool, seed: int
) -> None:
    """Two workers, each behind a proxy; for a while one of them turns toxic."""
    rng = random.Random(seed)
    moment = rng.randrange(20, len(PROMPTS) * TOKENS // 2)
    logger.warning("seed %d: %s from token %d on", seed, toxic, moment)
    for worker in workers[tls]:
        until(lambda worker=worker: not worker.status().session)  # the last engine's
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(worker.address, seed)) for worker in workers[tls]]
        options = {"tls_dir": folder, "token_file": folder / "token"} if tls else {}
        llm = stack.enter_context(
            running(
                model,
                attention_workers=[proxy.address for proxy in proxies],
                local_channel=False,
                shard=rng.choice(("heads", "sequence")),
                lanes=rng.choice((1, 2)),
                **options,
            )
        )
        first = ports(llm)[0]

        def after(count: int) -> None:
            if count == moment:
                proxies[0].toxic = TOXICS[toxic]
            elif count == moment + 60:
                proxies[0].toxic = Toxic()

        assert streamed(llm, PROMPTS, TOKENS, after) == expected
        assert first.closed == (toxic not in HARMLESS)
        proxies[0].reset()  # what hangs in a black hole
        until(lambda: len(ports(llm)) == 2 and not any(port.closed for port in ports(llm)), 40)
        assert streamed(llm, PROMPTS, TOKENS) == expected
        until(lambda: all_pages_free(llm))


@pytest.mark.fault("F07", "F08")
@pytest.mark.parametrize("toxic", ["reset", "bit flips"])
def test_what_the_network_does_changes_no_token(model, expected, workers, folder, toxic):
    through_proxies(model, expected, workers, folder, toxic, True, int(ONE or 1))


@pytest.mark.fault("F05", "F06")
@pytest.mark.soak
@pytest.mark.parametrize("seed", [int(ONE)] if ONE else [2, 3, 4])
@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("toxic", TOXICS)
def test_more_that_the_network_does_changes_no_token(model, expected, workers, folder, toxic, tls, seed):
    if not tls and toxic == "bit flips":
        pytest.skip("loopback without TLS carries no checksum, so nothing could notice")
    through_proxies(model, expected, workers, folder, toxic, tls, seed)
