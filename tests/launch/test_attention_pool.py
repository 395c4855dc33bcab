"""How an engine lets its attention workers go."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from lamina.config import EngineConfig
from lamina.launch.attention_pool import AttentionPool
from lamina.launch.journal_setup import Identity
from lamina_protocols.messages import HolderConfig, LayerSpec

HOLDER = HolderConfig((LayerSpec(0, 4, 2, 16, 16, 0.25),), 16, "float32", 1 << 20)


class Workers:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def close(self) -> None:
        self._log.append("workers")


class Port:
    """It takes as long to close as all others do."""

    def __init__(self, all_there: threading.Barrier, log: list[str]) -> None:
        self._all_there = all_there
        self._log = log

    def close(self) -> None:
        try:
            self._all_there.wait(5.0)
        except threading.BrokenBarrierError:
            self._log.append("alone")
        else:
            self._log.append("together")


def test_workers_that_do_not_answer_are_waited_for_together() -> None:
    log: list[str] = []
    pool = AttentionPool(cast(Any, Workers(log)), EngineConfig(), HOLDER, "model", "float32", Identity())
    all_there = threading.Barrier(3)
    pool._ports = cast(Any, [Port(all_there, log) for _ in range(3)])
    pool.close()
    assert log == ["together"] * 3 + ["workers"]


def test_where_no_thread_can_be_started_any_more_all_is_closed_even_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", ending)
    log: list[str] = []
    pool = AttentionPool(cast(Any, Workers(log)), EngineConfig(), HOLDER, "model", "float32", Identity())
    pool._ports = cast(Any, [Port(threading.Barrier(1), log) for _ in range(2)])
    pool.close()
    assert log == ["together"] * 2 + ["workers"]
