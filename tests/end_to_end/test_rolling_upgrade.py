"""Processes of version 7 are replaced by those of version 8, one at a time, while requests run: no text changes, and no
request fails."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from real_workers import ports, until, worker_process

import lamina.llm
from lamina import LLM
from lamina.deploy.local import LocalModelWorkers, model_command
from lamina.launch.builder import start
from lamina_protocols.channels.versions import FEATURES

pytestmark = pytest.mark.real

SEVEN = Path(__file__).parents[1] / "support" / "version_seven.py"
OPTIONS: dict[str, Any] = {"dtype": "float32", "threads": 1, "page_size": 16, "kv_memory": "16MiB", "local_share": 0}
PROMPTS = [[(7 * n + at) % 101 for at in range(20 + 11 * n)] for n in range(4)]


class Load(threading.Thread):
    """Asks the same four questions again and again until `stop`, and keeps every answer."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(daemon=True)
        self._llm, self._over = llm, threading.Event()
        self.answers: list[list[str]] = []

    def run(self) -> None:
        while not self._over.is_set():
            self.answers.append(asked(self._llm))

    def stop(self) -> None:
        self._over.set()
        self.join(60)


def asked(llm: LLM) -> list[str]:
    completions = llm.generate(PROMPTS, max_tokens=60, temperature=0, ignore_eos=True)
    return [completion.text for completion in completions]  # type: ignore[union-attr]


@contextmanager
def loaded(llm: LLM) -> Iterator[Load]:
    load = Load(llm)
    load.start()
    try:
        yield load
    finally:
        load.stop()


@pytest.mark.fault("F18")
def test_attention_workers_are_replaced_one_by_one_under_load(model: Path) -> None:
    with ExitStack() as stack:
        old = [stack.enter_context(worker_process(script=SEVEN)) for _ in range(2)]
        with LLM(model, attention_workers=[worker.address for worker in old], **OPTIONS) as llm:
            runtime = llm._runtime
            assert [port.features for port in ports(llm)] == [frozenset()] * 2
            expected = asked(llm)
            with loaded(llm) as load:
                for worker in old:
                    (port,) = [port for port in ports(llm) if port.address == worker.address]
                    runtime.engine.drain(port.name).result(timeout=60)  # type: ignore[union-attr]
                    worker.process.kill()
                    worker.process.wait()
                    stack.enter_context(worker_process("--listen", worker.address))
                    until(lambda gone=port.name: len(ports(llm)) == 2 and gone not in {p.name for p in ports(llm)})
                seen = len(load.answers)
                until(lambda: len(load.answers) > seen + 1)
            assert all(answer == expected for answer in load.answers)
            assert [port.features for port in ports(llm)] == [FEATURES] * 2
            assert runtime.engine._scheduler.counters.rebuilt_tokens == 0  # type: ignore[union-attr]


@pytest.mark.fault("F31")
def test_a_rank_of_the_previous_version_is_followed_by_this_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 has version 7 until its process is killed; the features of its holders follow."""
    first = [True]

    def command(name: str, address: str) -> list[str]:
        plain = model_command(name, address, 1)
        module = plain.index("lamina_workers.model_main")
        return [sys.executable, str(SEVEN), *plain[module:]] if first else plain

    with LLM(model, **OPTIONS) as alone:
        expected = asked(alone)
    members = LocalModelWorkers(2, threads=1, command=command)
    monkeypatch.setattr(lamina.llm, "_start_runtime", lambda *given: start(*given, model_workers=members))
    with worker_process() as worker, LLM(model, model_workers=2, attention_workers=[worker.address], **OPTIONS) as llm:
        holders = llm._runtime.engine._holders._control.placement.holders  # type: ignore[union-attr]

        def features() -> list[frozenset[str]]:
            return [holders[number].features for number in sorted(holders)]

        assert features() == [FEATURES, frozenset()] * 2  # the ranks' own pools, then their seats at the worker
        with loaded(llm) as load:
            until(lambda: bool(load.answers))
            first.clear()
            os.kill(members.status()[0].process or 0, signal.SIGKILL)
            until(lambda: features() == [FEATURES] * 4, 60)
            seen = len(load.answers)
            until(lambda: len(load.answers) > seen + 1)
        assert all(answer == expected for answer in load.answers)
