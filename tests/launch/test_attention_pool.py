"""How an engine lets its attention workers go."""

from __future__ import annotations

from typing import Any, cast

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
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def close(self) -> None:
        self._log.append("closed")

    def parted(self) -> None:
        self._log.append("parted")


def test_workers_that_do_not_answer_are_waited_for_together() -> None:
    log: list[str] = []
    pool = AttentionPool(cast(Any, Workers(log)), EngineConfig(), HOLDER, "model", "float32", Identity())
    pool._ports = cast(Any, [Port(log) for _ in range(3)])
    pool.close()
    assert log == ["closed"] * 3 + ["parted"] * 3 + ["workers"]
